"""The device meshes of a run, and FSDP2 over each decoder layer and the root."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from dpo_ray.config.schema import ShardConfig


def build_mesh(shard: ShardConfig, device: torch.device) -> DeviceMesh:
    """Layout of the weights: dimensions ``replicate`` (HSDP), ``shard`` and ``tensor``.

    Dimensions of size 1 are left out, except ``shard``.
    """
    shards = dist.get_world_size() // (shard.replicate * shard.tensor_parallel)
    sizes = {"replicate": shard.replicate, "shard": shards, "tensor": shard.tensor_parallel}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def build_compute_mesh(shard: ShardConfig, device: torch.device) -> DeviceMesh:
    """Layout of the work, with ranks in the order of ``build_mesh``.

    Ranks along ``data`` compute different pairs, ranks along ``context`` different tokens of the same pairs, and ranks
    along ``tensor`` different parts of each layer.
    """
    ranks_per_pair = shard.context_parallel * shard.tensor_parallel
    shape = (dist.get_world_size() // ranks_per_pair, shard.context_parallel, shard.tensor_parallel)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "context", "tensor"))


def apply_fsdp(
    root: nn.Module,
    layers: nn.ModuleList,
    shard: ShardConfig,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    reshard_after_forward: bool,
    unused: Sequence[nn.Module] = (),
) -> None:
    """Shard each of ``layers``, and the remaining parameters of ``root``, over the mesh.

    Args:
        reshard_after_forward: of layers; otherwise their weights stay gathered until ``reshard``, like the root's.
        unused: modules that take no part in the forward pass; their weights are sharded and never gathered.
    """
    # Parameters of tensor parallelism are DTensors over the tensor dimension already, which FSDP2 takes into account.
    mesh = mesh[tuple(name for name in mesh.mesh_dim_names or () if name != "tensor")]
    offload = CPUOffloadPolicy() if shard.cpu_offload and device.type != "cpu" else OffloadPolicy()
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    shard_module = functools.partial(fully_shard, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for layer in layers:
        shard_module(layer, reshard_after_forward=reshard_after_forward)
    for module in unused:
        # With a reduce_dtype, FSDP would look for gradients of weights that it has never gathered.
        shard_module(module, mp_policy=MixedPrecisionPolicy())
    shard_module(root, reshard_after_forward=False)
    _prefetch(root, layers, shard.prefetch)


GradientSync = Literal["micro_batch", "step", "hand_over"]
"""When gradients are reduced over ranks: per micro-batch; once per step, so that weights and gradients stay gathered
until its last micro-batch; or not at all, see ``hand_over_gradients``."""


def gradient_sync(shard: ShardConfig, mesh: DeviceMesh) -> GradientSync:
    """When the policy's gradients are reduced: not at all on one CPU rank, where FSDP would only copy them."""
    if mesh.device_type == "cpu" and mesh.size() == 1:
        return "hand_over"
    return "micro_batch" if shard.reshard_after_forward else "step"


def _prefetch(root: nn.Module, layers: nn.ModuleList, ahead: int) -> None:
    """Gather the weights of the next ``ahead`` layers while a layer computes, in both passes."""
    forward_order: list[Any] = [root, *layers]
    backward_order: list[Any] = [root, *reversed(layers)]  # the head belongs to the root
    for i in range(len(forward_order)):
        forward_order[i].set_modules_to_forward_prefetch(forward_order[i + 1 : i + 1 + ahead])
        backward_order[i].set_modules_to_backward_prefetch(backward_order[i + 1 : i + 1 + ahead])


def load_full_state(
    model: nn.Module, weights: dict[str, Any], shard_device: torch.device, device: torch.device
) -> None:
    """Load rank 0's full state dict ``weights`` into the shards of all ranks.

    Args:
        shard_device: the CPU with ``shard.cpu_offload``.
        device: the device that computes.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to_empty(device=shard_device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
            buffer.data = buffer.to(device)
    set_model_state_dict(
        model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    )


def set_last_micro_batch(policy: nn.Module, last: bool, sync: GradientSync) -> None:
    """Communicate per micro-batch (less memory) or once per step (less traffic).

    Args:
        last: True before the backward pass of the step's last micro-batch.
        sync: with "micro_batch", gradients are still all-reduced over replicas only in the last. With "hand_over", call
            ``hand_over_gradients`` after the last.
    """
    assert isinstance(policy, FSDPModule)
    policy.set_requires_gradient_sync(sync == "micro_batch" or (last and sync == "step"))
    policy.set_requires_all_reduce(last)
    policy.set_is_last_backward(last)
    policy.set_reshard_after_backward(last or sync == "micro_batch")


def hand_over_gradients(policy: nn.Module) -> None:
    """Give the gradients of a single rank to its optimizer as they are.

    Reducing them would copy each three times: concatenated, as the output of a reduce-scatter and as the gradient.
    torch has no function for it, so this reads the private state of FSDP2, as torch 2.11 to 2.15 have it.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            group = cast("Any", module._get_fsdp_state())._fsdp_param_group
            for parameter in group.fsdp_params if group else ():
                _hand_over(parameter)


def _hand_over(parameter: Any) -> None:
    gathered = getattr(parameter, "_unsharded_param", None)
    grad = parameter.unsharded_accumulated_grad  # float32, unless the gathered parameter is
    if grad is None and gathered is not None:
        grad = gathered.grad
    if "unsharded_accumulated_grad" in vars(parameter):  # in torch 2.15 it is the gathered gradient itself
        parameter.unsharded_accumulated_grad = None
    if gathered is not None:
        gathered.grad = None
    if grad is not None:
        parameter.sharded_param.grad = parameter.to_sharded_dtensor(grad)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters after forward passes without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
