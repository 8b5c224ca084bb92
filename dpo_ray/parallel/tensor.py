"""Tensor parallelism: the matrices of each decoder layer and the vocabulary, split over neighboring ranks.

Layers are split according to the architecture's plan in transformers (``model.tp_plan``). Every parameter becomes a
DTensor over the tensor ranks, so FSDP, checkpoints and gradient norms know its placement; modules compute with local
tensors. Hidden states between layers are replicated (Megatron-LM, arXiv:1909.08053, section 3).

torch's ``parallelize_module`` styles give the same gradients at 1.4 times the CPU time per step of a small model: all
operations dispatch on DTensors, and sibling column-wise layers all-reduce the gradient of their input separately.
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
from dpo_ray.objective.precision import Products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]
ON_SHARDS = "replicated_with_grad_allreduce"
"""transformers' style of a module with replicated parameters and sharded activations, such as a norm per head."""
STYLES = ("colwise", "rowwise", ON_SHARDS)
"""Supported styles of a plan: linear layers split by output or by input features, and ``ON_SHARDS``."""


def apply_tensor_parallel(model: "PreTrainedModel", mesh: DeviceMesh) -> None:
    """Split ``model`` over the ranks of a one-dimensional mesh, in place.

    Parameters are left on the meta device; weights are loaded after FSDP has sharded them further. The vocabulary is
    replicated if the ranks do not divide it.

    Raises:
        ValueError: see ``tensor_parallel_plan``.
    """
    plan = tensor_parallel_plan(model, mesh.size())
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    split_vocabulary = all(end.weight.shape[0] % mesh.size() == 0 for end in (embedding, head))
    if not split_vocabulary and dist.get_rank() == 0:
        logger.warning(
            "shard.tensor_parallel: %d does not divide the vocabulary, %d; embedding and head are replicated",
            mesh.size(), head.weight.shape[0],
        )  # fmt: skip
    group, distributed = mesh.get_group(), {}
    inputs = {_parent(name): _SharedInput() for name, style in plan.items() if style == "colwise"}
    for name, module in list(model.named_modules()):
        style = "vocabulary" if module in (embedding, head) and split_vocabulary else plan.get(name)
        for key, parameter in module.named_parameters(recurse=False):
            # Tied weights stay one parameter.
            if parameter not in distributed:
                distributed[parameter] = _distribute(parameter, mesh, _placement(style, key))
            module.register_parameter(key, distributed[parameter])
        if style == "vocabulary" and module is embedding:
            module.forward = partial(_embedding, embedding, module.forward, mesh)
        elif style == "colwise":
            module.forward = partial(_colwise, module, module.forward, inputs[_parent(name)], group)
        elif style == "rowwise":
            module.forward = partial(_rowwise, module, module.forward, group)
        elif module._parameters:
            module.forward = partial(_replicated, module, module.forward, style == ON_SHARDS)
        if name in inputs:
            module.forward = partial(_clear_after, inputs[name], module.forward)


def local_head(model: "PreTrainedModel", transform: LogitTransform, products: Products) -> Head:
    """This rank's rows of the model's head, for use in the forward pass; all rows without tensor parallelism.

    Args:
        products: paths of its products on a CPU.
    """
    head: Any = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if not isinstance(weight, DTensor):
        return Head(weight, bias, transform, products=products)
    local, mesh = weight.to_local(), weight.device_mesh
    bias = None if bias is None else bias.to_local()
    if not weight.placements[0].is_shard():
        return Head(local, bias, transform, products=products)
    return Head(local, bias, transform, mesh.get_group(), mesh.get_local_rank() * local.shape[0], products)


def tensor_parallel_plan(model: "PreTrainedModel", ranks: int) -> dict[str, str]:
    """Module name -> style of each module that is split, without embedding and head.

    Raises:
        ValueError: the architecture has no plan, its plan has unsupported styles or leaves most weights unsplit, or
            ``ranks`` does not divide a dimension that is split.
    """
    by_pattern: Mapping[str, str] = model.tp_plan
    modules = dict(model.named_modules())
    ends: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    patterns = {name: re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules if modules[name] not in ends}
    plan = {name: by_pattern[pattern] for name, pattern in patterns.items() if pattern in by_pattern}
    architecture = f"model.path: {type(model).__name__}"
    remedy = "set shard.tensor_parallel: 1"
    if "rowwise" not in plan.values():
        raise ValueError(f"{architecture} has no tensor-parallel plan in transformers; {remedy}")
    if unknown := sorted(set(plan.values()) - set(STYLES)):
        raise ValueError(
            f"{architecture} has a tensor-parallel plan with {', '.join(unknown)}; supported are {', '.join(STYLES)}: "
            f"{remedy}"
        )
    parents = tuple(f"{_parent(name)}." for name, style in plan.items() if style == "colwise")
    for name, module in modules.items():
        if f"{name}.".startswith(parents) and name not in plan and any(True for _ in module.parameters(recurse=False)):
            # It would compute on sharded activations, and its gradient would not be summed over the ranks.
            raise ValueError(f"{architecture} has {name}, which is missing from its tensor-parallel plan; {remedy}")
    split = sum(p.numel() for name, style in plan.items() if style != ON_SHARDS for p in modules[name].parameters())
    vocabulary = {parameter for end in ends for parameter in end.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters() if parameter not in vocabulary)
    if 2 * split < total:
        raise ValueError(
            f"{architecture} has a tensor-parallel plan that splits only {split / total:.0%} of its layers' weights; "
            f"{remedy}"
        )
    _validate_even_split(model, plan, ranks)
    return plan


def _validate_even_split(model: "PreTrainedModel", plan: Mapping[str, str], ranks: int) -> None:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
    }
    for name, style in plan.items():
        if style in ("colwise", "rowwise"):
            layer: Any = model.get_submodule(name)
            side = "out_features" if style == "colwise" else "in_features"
            sizes[f"{name}.{side}"] = getattr(layer, side)
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(f"shard.tensor_parallel is {ranks}, which does not divide the model's {name} {size}")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _placement(style: str | None, key: str) -> Placement:
    match style:
        case "colwise" | "vocabulary":
            return Shard(0)
        case "rowwise" if key == "weight":
            return Shard(1)
    return Replicate()


def _distribute(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(distribute_tensor(empty, mesh, [placement], src_data_rank=None), parameter.requires_grad)


@contextmanager
def _local_parameters(module: nn.Module, grad_placement: Placement | None = None) -> Iterator[dict[str, Any]]:
    """Replace the parameters of ``module`` by their local tensors, which are also yielded."""
    parameters: dict[str, Any] = dict(module._parameters)
    grad_placements = None if grad_placement is None else [grad_placement]
    local = {key: p.to_local(grad_placements=grad_placements) for key, p in parameters.items() if p is not None}
    module._parameters.update(local)
    try:
        yield local
    finally:
        module._parameters.update(parameters)


def _replicated(module: nn.Module, forward: Forward, on_shards: bool, *args: Any, **kwargs: Any) -> Any:
    with _local_parameters(module, Partial() if on_shards else None):
        return forward(*args, **kwargs)


class _SharedInput:
    """The common input of sibling column-wise layers: its gradient is all-reduced once for all of them."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.copied: Tensor | None = None


def _clear_after(shared: _SharedInput, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    try:
        return forward(*args, **kwargs)
    finally:
        shared.input = shared.copied = None


def _colwise(
    module: nn.Module, forward: Forward, shared: _SharedInput, group: dist.ProcessGroup, x: Tensor
) -> Tensor:  # (..., D) -> (..., out / ranks)
    if shared.input is not x:
        shared.input, shared.copied = x, CopyToTP.apply(x, group)
    with _local_parameters(module):
        return forward(shared.copied)


def _rowwise(
    module: nn.Module, forward: Forward, group: dist.ProcessGroup, x: Tensor
) -> Tensor:  # (..., in / ranks) -> (..., D)
    with _local_parameters(module) as local:
        bias = local.get("bias")
        if bias is not None:
            module._parameters["bias"] = None
        out = ReduceFromTP.apply(forward(x), group)
    return out if bias is None else out + bias


def _embedding(module: nn.Embedding, forward: Forward, mesh: DeviceMesh, ids: Tensor) -> Tensor:
    """Look up the ids with local rows and sum over the ranks."""
    with _local_parameters(module) as local:
        rows = local["weight"].shape[0]
        first, padding = mesh.get_local_rank() * rows, module.padding_idx
        is_local = (ids >= first) & (ids < first + rows)
        # The row of the padding token gets no gradient.
        module.padding_idx = padding - first if padding is not None and 0 <= padding - first < rows else None
        try:
            embedded = forward(torch.where(is_local, ids - first, 0))  # (..., D)
        finally:
            module.padding_idx = padding
        return ReduceFromTP.apply(embedded.masked_fill(~is_local[..., None], 0.0), mesh.get_group())


class CopyToTP(torch.autograd.Function):
    """Identity; backward all-reduces the gradient (Megatron-LM's f)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


class ReduceFromTP(torch.autograd.Function):
    """All-reduce; backward is the identity (Megatron-LM's g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Out of place: autograd may use the same memory elsewhere.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
