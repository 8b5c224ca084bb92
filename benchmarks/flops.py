"""How many operations a training step must do."""

from typing import Any, NamedTuple

import numpy as np

from dpo_ray.data.assignment import attended


class Shape(NamedTuple):
    """What decides the operations of a decoder with gated layers, such as Llama."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Of a transformers configuration."""
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.intermediate_size,
            config.vocab_size,
        )


def step_flops(shape: Shape, lengths: np.ndarray) -> tuple[float, float]:
    """Of one step on pairs: what must be done, and the same with each prompt counted twice as peers count.

    A multiplication and an addition for each weight and token, thrice for forward and backward; the head at completion
    tokens, by peers' count at all; attention at the pairs of tokens that see each other.

    Args:
        shape: of the model.
        lengths: (B, 3) tokens of prompt, chosen and rejected.
    """
    hidden, layers, heads, key_heads, between, vocabulary = shape
    size = hidden // heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * key_heads * size + 3 * hidden * between)
    prompt, chosen, rejected = lengths.astype(float).T
    once, twice = (prompt + chosen + rejected).sum(), (2 * prompt + chosen + rejected).sum()
    of_attention = 4 * hidden * layers
    useful = 2 * weights * once + 2 * hidden * vocabulary * (chosen + rejected).sum()
    counted = 2 * (weights + hidden * vocabulary) * twice
    whole = sum(((prompt + c) ** 2 / 2).sum() for c in (chosen, rejected))
    return 3 * (useful + of_attention * attended(lengths).sum()), 3 * (counted + of_attention * whole)
