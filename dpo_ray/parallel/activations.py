"""Activation checkpointing (``shard.activation_checkpointing``) and offloading (``shard.activation_offload``).

Checkpointing decides which activations a decoder layer saves for its backward pass, offloading whether they are saved
on the GPU or in host memory. Names of parameters and modules do not change.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable
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
    # Compiled flex_attention in an uncompiled layer.
    inductor_compiled_code,
]
"""Operations whose results ``selective`` saves: matrix products and attention, nearly all of a layer's FLOPs."""
MAX_COPIES_IN_FLIGHT = 32
"""Tensors, about two layers' worth, that wait on the GPU for their copy to host memory before computation pauses."""
MIN_OFFLOAD_BYTES = 1 << 16
"""Smaller tensors stay on the GPU."""


def apply_activation_checkpointing(layers: Iterable[nn.Module], kind: Literal["none", "full", "selective"]) -> None:
    """Recompute activations of ``layers`` in the backward pass instead of saving them (arXiv:1604.06174).

    Replaces each layer's forward, below its hooks, so FSDP does not gather again. A compiled forward stays compiled;
    with ``selective``, checkpointing itself is not.

    Args:
        layers: their forward passes must be deterministic.
        kind: ``full`` saves only the input; ``selective`` also the results of SAVED_OPS.
    """
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if kind == "selective":
        recompute.keywords["context_fn"] = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)
    if kind != "none":
        for layer in layers:
            layer.forward = functools.partial(recompute, layer.forward)


def offload_activations(decoder: nn.Module, device: torch.device) -> None:
    """Save the activations of ``decoder``, whose forward is replaced, in host memory; no effect on a CPU."""
    if device.type != "cpu":
        host = HostMemory(device)
        decoder.forward = functools.partial(_forward_with_offload, decoder.forward, host.offload, host.fetch)


def _forward_with_offload(
    forward: Callable[..., Any],
    offload: Callable[[Tensor], Tensor],
    fetch: Callable[[Tensor], Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``forward``, with saved activations of at least MIN_OFFLOAD_BYTES passed through ``offload`` and ``fetch``.

    Weights are left to FSDP, which frees and gathers them itself.
    """

    def pack(saved: Tensor) -> Tensor | tuple[Tensor]:
        is_activation = type(saved) is Tensor and not isinstance(saved._base, nn.Parameter)
        return (offload(saved),) if is_activation and saved.nbytes >= MIN_OFFLOAD_BYTES else saved

    def unpack(packed: Tensor | tuple[Tensor]) -> Tensor:
        return fetch(packed[0]) if isinstance(packed, tuple) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)


class HostMemory:
    """Pinned host memory with a copy stream of its own: copies overlap with computation in both passes.

    torch's ``save_on_cpu`` copies on the compute stream, which waits for each copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.Stream(device)
        self.in_flight: deque[tuple[Tensor, torch.Event]] = deque()

    def offload(self, tensor: Tensor) -> Tensor:
        """Start a copy to host memory and return it; keep ``tensor`` alive until the copy is complete."""
        current = torch.accelerator.current_stream(self.device)
        self.stream.wait_stream(current)
        with self.stream:
            host_copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host_copy.copy_(tensor, non_blocking=True)
        self.in_flight.append((tensor, self.stream.record_event()))
        if len(self.in_flight) > MAX_COPIES_IN_FLIGHT:
            current.wait_event(self.in_flight.popleft()[1])
        return host_copy

    def fetch(self, host_copy: Tensor) -> Tensor:
        """Return the tensor on the device. The host runs ahead of the GPU, so copies start before they are needed."""
        current = torch.accelerator.current_stream(self.device)
        with self.stream:
            tensor = host_copy.to(self.device, non_blocking=True)
        current.wait_stream(self.stream)
        self.in_flight.clear()
        tensor.record_stream(current)
        return tensor
