"""FSDP2 over each decoder layer and the root, as functions over a plain model, and the meshes of a run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from dpo_ray.config.schema import ShardConfig


def build_mesh(shard: ShardConfig, device: torch.device) -> DeviceMesh:
    """How weights are laid over the ranks.

    One dimension to shard over, one before it to replicate over when ``shard.replicate`` > 1 (HSDP), and one of
    neighbours that split each layer when ``shard.tensor_parallel`` > 1.
    """
    over = dist.get_world_size() // (shard.replicate * shard.tensor_parallel)
    sizes = {"replicate": shard.replicate, "shard": over, "tensor": shard.tensor_parallel}
    kept = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def build_compute_mesh(shard: ShardConfig, device: torch.device) -> DeviceMesh:
    """Who computes what: ranks along ``data`` have different pairs, those along ``context`` different tokens of them,
    and those along ``tensor`` parts of each layer.

    The ranks are in the order of ``build_mesh``.
    """
    shared = shard.context_parallel * shard.tensor_parallel
    shape = (dist.get_world_size() // shared, shard.context_parallel, shard.tensor_parallel)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "context", "tensor"))


def apply_fsdp(
    root: nn.Module,
    layers: nn.ModuleList,
    shard: ShardConfig,
    mesh: DeviceMesh,
    compute: torch.dtype,
    device: torch.device,
) -> None:
    """Shard each of ``layers`` and what is left of ``root`` over the mesh.

    Args:
        compute: dtype of the forward and backward passes; gradients are reduced in float32.
        device: where the model computes.
    """
    # FSDP adds the tensor dimension by itself to parameters that tensor parallelism has split.
    mesh = mesh[tuple(name for name in mesh.mesh_dim_names or () if name != "tensor")]
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    offloading = CPUOffloadPolicy() if shard.cpu_offload and device.type != "cpu" else OffloadPolicy()
    for layer in layers:
        fully_shard(
            layer,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offloading,
            reshard_after_forward=shard.reshard_after_forward,
        )
    fully_shard(root, mesh=mesh, mp_policy=precision, offload_policy=offloading, reshard_after_forward=False)
    _prefetch(root, layers, shard.prefetch)


def _prefetch(root: nn.Module, layers: nn.ModuleList, ahead: int) -> None:
    """Gather the weights of the ``ahead`` next layers while one computes, in both passes."""
    forth: list[Any] = [root, *layers]
    back: list[Any] = [root, *reversed(layers)]  # the head is the root's
    for i in range(len(forth)):
        forth[i].set_modules_to_forward_prefetch(forth[i + 1 : i + 1 + ahead])
        back[i].set_modules_to_backward_prefetch(back[i + 1 : i + 1 + ahead])


def load_full_state(model: nn.Module, weights: dict[str, Any], parameters: torch.device, device: torch.device) -> None:
    """Send rank 0's weights to the shards of all ranks.

    Args:
        parameters: where the shards live; the CPU when they are offloaded.
        device: where the model computes.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to_empty(device=parameters)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
            buffer.data = buffer.to(device)
    set_model_state_dict(
        model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    )


def set_last_micro_batch(policy: nn.Module, last: bool, *, keep_gathered: bool) -> None:
    """Gather weights and reduce gradients as often in a step as its memory asks for.

    Args:
        last: whether the backward pass of the step's last micro-batch follows.
        keep_gathered: hold the weights and the gradients of the whole model on every rank until then, and exchange
            them once a step. Otherwise every micro-batch gathers and reduces, over replicas only the last.
    """
    assert isinstance(policy, FSDPModule)
    policy.set_requires_gradient_sync(last or not keep_gathered)
    policy.set_requires_all_reduce(last)
    policy.set_is_last_backward(last)
    policy.set_reshard_after_backward(last or not keep_gathered)


def reshard(scorer: nn.Module) -> None:
    """Put every parameter back to its shard, after forward passes that no backward follows."""
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
