"""Local attention: layers whose tokens attend to a part of the earlier tokens.

Windows are intervals of positions. Both completions of a row continue the positions of their prompt, so a window
reaches over the end of the prompt in the same way as in a separate forward pass.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

Positions = TypeVar("Positions", bound=Any)
"""An int, an integer array or an integer tensor."""


class Window(NamedTuple):
    """The earlier tokens that a token attends to."""

    size: int
    """Tokens of the window, including the token itself, or tokens of each chunk."""
    chunked: bool = False
    """The tokens are those of the token's own chunk of ``size`` positions, instead of the last ``size``."""

    def start(self, position: Positions) -> Positions:
        """First position that a token at ``position`` attends to."""
        start = position // self.size * self.size if self.chunked else position - self.size + 1
        return start * (start > 0)


def layer_windows(config: Any) -> Mapping[str, Window | None]:
    """Window of each kind of layer of an architecture; None is full causal attention.

    Args:
        config: a transformers text configuration.

    Returns:
        Window by the name of the layer type; names other than the three of the table below are left out.
    """
    size, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    windowed = size and getattr(config, "use_sliding_window", True)
    default = ["sliding_attention" if windowed else "full_attention"]
    by_type = {
        "full_attention": None,
        "sliding_attention": Window(size) if size else None,
        "chunked_attention": Window(chunk, chunked=True) if chunk else None,
    }
    layer_types = set(getattr(config, "layer_types", None) or default)
    return {name: window for name, window in by_type.items() if name in layer_types}


def layer_window(module: nn.Module, sliding_window: int | None) -> Window | None:
    """Window of one attention layer.

    Args:
        module: the attention layer.
        sliding_window: the argument that transformers passes to attention functions; chunks have none.
    """
    config: Any = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[module.layer_idx] == "chunked_attention":
        return Window(config.attention_chunk_size, chunked=True)
    return Window(sliding_window) if sliding_window else None
