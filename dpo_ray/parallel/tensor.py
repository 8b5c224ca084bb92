"""Tensor parallelism: the matrices of each decoder layer and the vocabulary, split over neighbouring ranks.

Which matrices are split, and how, is transformers' plan of an architecture. Every parameter becomes a DTensor over the
tensor ranks, so that FSDP, checkpoints and gradient norms know which part of it a rank has; modules compute with their
local parts as plain tensors. Between layers each rank has all hidden states (Megatron-LM, arXiv:1909.08053, section 3).
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from dpo_ray.objective.head import Head, LogitTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]
WHOLE = ("replicated_with_grad_allreduce",)
STYLES = ("colwise", "rowwise", *WHOLE)
"""What a plan may ask for: a linear layer's outputs split, its inputs split, or a module whose parameters are whole on
each rank while what it works on is split."""


def apply_tensor_parallel(model: "PreTrainedModel", mesh: DeviceMesh) -> None:
    """Split ``model`` over the ranks of a mesh of one dimension, in place.

    Parameters are left on the meta device: weights are given to the parts when FSDP has cut them further. A vocabulary
    that the ranks do not divide stays whole on each of them.

    Raises:
        ValueError: see ``plan_split``.
    """
    plan = plan_split(model, mesh.size())
    ends: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    even_rows = all(end.weight.shape[0] % mesh.size() == 0 for end in ends)
    if not even_rows and dist.get_rank() == 0:
        logger.warning(
            "shard.tensor_parallel: %d does not divide the vocabulary, %d; each worker has all of embedding and head",
            mesh.size(), ends[1].weight.shape[0],
        )  # fmt: skip
    group, placed = mesh.get_group(), {}
    shared = {name.rpartition(".")[0]: _Shared() for name, style in plan.items() if style == "colwise"}
    for name, module in list(model.named_modules()):
        style = "vocabulary" if module in ends and even_rows else plan.get(name)
        for key, parameter in module.named_parameters(recurse=False):
            # Tied weights stay one parameter.
            if parameter not in placed:
                placed[parameter] = _placed(parameter, mesh, _placement(style, key))
            module.register_parameter(key, placed[parameter])
        if style == "vocabulary" and module is ends[0]:
            module.forward = partial(_embedding, ends[0], module.forward, mesh)
        elif style == "colwise":
            module.forward = partial(_colwise, module, module.forward, shared[name.rpartition(".")[0]], group)
        elif style == "rowwise":
            module.forward = partial(_rowwise, module, module.forward, group)
        elif module._parameters:
            module.forward = partial(_replicated, module, module.forward, style in WHOLE)
        if name in shared:
            module.forward = partial(clear_after, shared[name], module.forward)


def local_head(model: "PreTrainedModel", transform: LogitTransform) -> Head:
    """The rows of the model's head that this rank has, in the forward pass; all of them without tensor parallelism."""
    head: Any = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if not isinstance(weight, DTensor):
        return Head(weight, bias, transform)
    local, mesh = weight.to_local(), weight.device_mesh
    bias = None if bias is None else bias.to_local()
    if not weight.placements[0].is_shard():
        return Head(local, bias, transform)
    return Head(local, bias, transform, mesh.get_group(), mesh.get_local_rank() * local.shape[0])


def plan_split(model: "PreTrainedModel", ranks: int) -> dict[str, str]:
    """The style of each module that is split, by the module's name; embedding and head are not among them.

    Raises:
        ValueError: the architecture has no plan, or one that is not known here or leaves most of the layers whole; or
            the ranks do not divide what it splits.
    """
    by_pattern: Mapping[str, str] = model.tp_plan
    modules = dict(model.named_modules())
    plan = {
        name: by_pattern[found] for name in modules if (found := re.sub(r"\.\d+(?=\.|$)", ".*", name)) in by_pattern
    }
    ends: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    plan = {name: style for name, style in plan.items() if modules[name] not in ends}
    architecture = f"model.path: {type(model).__name__}"
    remedy = "set shard.tensor_parallel: 1"
    if "rowwise" not in plan.values():
        raise ValueError(f"{architecture} has no plan of tensor parallelism in transformers; {remedy}")
    if unknown := sorted({style for style in plan.values() if style not in STYLES}):
        raise ValueError(
            f"{architecture} asks for tensor parallelism by {', '.join(unknown)}; {', '.join(STYLES)} can be done: "
            f"{remedy}"
        )
    holders = tuple(name.rpartition(".")[0] + "." for name, style in plan.items() if style == "colwise")
    for name, module in modules.items():
        if f"{name}.".startswith(holders) and name not in plan and any(True for _ in module.parameters(recurse=False)):
            # It would work on a part of the heads without its gradient being summed over the parts.
            raise ValueError(f"{architecture} has {name}, which its plan of tensor parallelism leaves out; {remedy}")
    split = sum(p.numel() for name, style in plan.items() if style not in WHOLE for p in modules[name].parameters())
    of_ends = {parameter for end in ends for parameter in end.parameters()}
    whole = sum(parameter.numel() for parameter in model.parameters() if parameter not in of_ends)
    if 2 * split < whole:
        raise ValueError(
            f"{architecture} has a plan of tensor parallelism that splits {split / whole:.0%} of its layers' weights, "
            f"which leaves most of the work undivided; {remedy}"
        )
    _validate_even_split(model, plan, ranks)
    return plan


def _validate_even_split(model: "PreTrainedModel", plan: Mapping[str, str], ranks: int) -> None:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    counts = {
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
    }
    for name, style in plan.items():
        if style in ("colwise", "rowwise"):
            layer: Any = model.get_submodule(name)
            side = "out_features" if style == "colwise" else "in_features"
            counts[f"{name}.{side}"] = getattr(layer, side)
    for name, count in counts.items():
        if count % ranks:
            raise ValueError(
                f"shard.tensor_parallel is {ranks}, which must divide what it splits; the model has {name} {count}"
            )


def _placement(style: str | None, key: str) -> Placement:
    match style:
        case "colwise" | "vocabulary":
            return Shard(0)
        case "rowwise" if key == "weight":
            return Shard(1)
    return Replicate()


def _placed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(distribute_tensor(empty, mesh, [placement], src_data_rank=None), parameter.requires_grad)


@contextmanager
def _local_parameters(module: nn.Module, gradients: Placement | None = None) -> Iterator[dict[str, Any]]:
    """The module with this rank's parts for parameters, which it hands out as well.

    Args:
        gradients: how the gradients are spread over the ranks where not like the parameters.
    """
    held: dict[str, Any] = dict(module._parameters)
    local = {
        key: p.to_local(grad_placements=None if gradients is None else [gradients])
        for key, p in held.items()
        if p is not None
    }
    module._parameters.update(local)
    try:
        yield local
    finally:
        module._parameters.update(held)


def _replicated(module: nn.Module, forward: Forward, on_a_part: bool, *args: Any, **kwargs: Any) -> Any:
    with _local_parameters(module, Partial() if on_a_part else None):
        return forward(*args, **kwargs)


class _Shared:
    """The input that the split layers of one module share: its gradient is summed over the ranks once for all."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.entered: Tensor | None = None


def clear_after(shared: _Shared, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    try:
        return forward(*args, **kwargs)
    finally:
        shared.input = shared.entered = None


def _colwise(
    module: nn.Module, forward: Forward, shared: _Shared, group: dist.ProcessGroup, x: Tensor
) -> Tensor:  # (..., D) -> (..., out / ranks)
    if shared.input is not x:
        shared.input, shared.entered = x, CopyToTP.apply(x, group)
    with _local_parameters(module):
        return forward(shared.entered)


def _rowwise(
    module: nn.Module, forward: Forward, group: dist.ProcessGroup, x: Tensor
) -> Tensor:  # (..., in / ranks) -> (..., D)
    with _local_parameters(module) as local:
        bias = local.get("bias")
        if bias is not None:
            module._parameters["bias"] = None
        whole = ReduceFromTP.apply(forward(x), group)
    return whole if bias is None else whole + bias


def _embedding(module: nn.Embedding, forward: Forward, mesh: DeviceMesh, ids: Tensor) -> Tensor:
    """Each rank looks up the ids whose rows it has."""
    with _local_parameters(module) as local:
        rows = local["weight"].shape[0]
        first, padding = mesh.get_local_rank() * rows, module.padding_idx
        here = (ids >= first) & (ids < first + rows)
        # The row of the padding token gets no gradient.
        module.padding_idx = padding - first if padding is not None and 0 <= padding - first < rows else None
        try:
            found = forward(torch.where(here, ids - first, 0))  # (..., D)
        finally:
            module.padding_idx = padding
        return ReduceFromTP.apply(found.masked_fill(~here[..., None], 0.0), mesh.get_group())


class CopyToTP(torch.autograd.Function):
    """Whole on every rank; the gradients of what the ranks do with it are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class ReduceFromTP(torch.autograd.Function):
    """The sum of what the ranks have, on every rank."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(part, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Autograd may hold the same memory for another use.
    whole = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=group)
    return whole
