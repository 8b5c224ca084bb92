"""What a decoder layer keeps of its forward pass for its backward pass, and where.

All of it, only what is dear to compute, or only its input (``shard.activation_checkpointing``); on the GPU or in host
memory (``shard.activation_offload``). Names of parameters and modules stay as they are.
"""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._higher_order_ops import flex_attention, inductor_compiled_code
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
SAVED_OPS = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    flex_attention,
    # flex_attention compiled by itself, in a layer that is not.
    inductor_compiled_code,
]
"""Operations whose results ``selective`` keeps: matrix products and attention, nearly all of a layer's arithmetic."""
IN_FLIGHT = 32
"""Tensors, those of about two layers, that are copied to host memory at a time: the host would let all layers' wait."""
SMALLEST = 1 << 16
"""Bytes below which a tensor is not worth a copy to host memory."""


def apply_activation_checkpointing(layer: nn.Module, kind: Literal["none", "full", "selective"]) -> None:
    """Compute what ``layer`` does not keep of its forward pass again in its backward pass (arXiv:1604.06174).

    The layer's forward is replaced, below its hooks: FSDP's gathering is not repeated. One that is compiled stays so;
    torch compiles nothing of what runs within ``selective``.

    Args:
        layer: its forward must be deterministic.
        kind: ``full`` keeps the input alone; ``selective`` also the results of DEAR operations.
    """
    keep = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    if kind == "selective":
        keep = functools.partial(keep, context_fn=functools.partial(create_selective_checkpoint_contexts, SAVED_OPS))
    if kind != "none":
        layer.forward = keep


def offload_activations(decoder: nn.Module, device: torch.device) -> None:
    """Hold what ``decoder`` saves for its backward pass in host memory; without effect on a CPU.

    Args:
        decoder: all layers; its forward is replaced.
        device: where it computes.
    """
    if device.type != "cpu":
        host = HostMemory(device)
        decoder.forward = functools.partial(_with_hooks, decoder.forward, host.store, host.fetch)


def _with_hooks(
    forward: Callable[..., Any],
    store: Callable[[Tensor], Tensor],
    fetch: Callable[[Tensor], Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``forward``, where activations of SMALLEST bytes and more are saved as what ``store`` makes of them.

    Weights are not stored: FSDP frees and gathers them itself.
    """

    def pack(saved: Tensor) -> Tensor | tuple[Tensor]:
        activation = type(saved) is Tensor and not isinstance(saved._base, nn.Parameter)
        return (store(saved),) if activation and saved.nbytes >= SMALLEST else saved

    def unpack(packed: Tensor | tuple[Tensor]) -> Tensor:
        return fetch(packed[0]) if isinstance(packed, tuple) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)


class HostMemory:
    """Pinned host memory, reached over a stream of its own: copies run beside the GPU's work in both passes.

    torch's ``save_on_cpu`` copies on the stream that computes, which waits for each copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.Stream(device)
        self.copying: deque[tuple[Tensor, torch.Event]] = deque()

    def store(self, tensor: Tensor) -> Tensor:
        """A copy in host memory; ``tensor`` is held until it is made, and computing waits where many are."""
        current = torch.accelerator.current_stream(self.device)
        self.stream.wait_stream(current)
        with self.stream:
            held = torch.empty_like(tensor, device="cpu", pin_memory=True)
            held.copy_(tensor, non_blocking=True)
        self.copying.append((tensor, self.stream.record_event()))
        if len(self.copying) > IN_FLIGHT:
            current.wait_event(self.copying.popleft()[1])
        return held

    def fetch(self, held: Tensor) -> Tensor:
        """The tensor back on the device. The host runs ahead of the GPU: copies begin before they are needed."""
        current = torch.accelerator.current_stream(self.device)
        with self.stream:
            tensor = held.to(self.device, non_blocking=True)
        current.wait_stream(self.stream)
        self.copying.clear()
        tensor.record_stream(current)
        return tensor
