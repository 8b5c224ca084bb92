"""Sharding: FSDP2 over each decoder layer and the root, as a function over a plain model."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from dpo_ray.config.schema import ModelConfig, ShardConfig
from dpo_ray.model.activations import offload, recompute
from dpo_ray.model.adapters import add_adapters
from dpo_ray.model.context_parallel import Context
from dpo_ray.model.float8 import refuse_without_float8, use_float8
from dpo_ray.model.linear import use_float32_products
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer
from dpo_ray.model.tensor_parallel import split_over

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_mesh(shard: ShardConfig, device: torch.device) -> DeviceMesh:
    """How weights are laid over the ranks.

    One dimension to shard over, one before it to replicate over when ``shard.replicate`` > 1 (HSDP), and one of
    neighbours that split each layer when ``shard.tensor_parallel`` > 1.
    """
    over = dist.get_world_size() // (shard.replicate * shard.tensor_parallel)
    sizes = {"replicate": shard.replicate, "shard": over, "tensor": shard.tensor_parallel}
    kept = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def build_work_mesh(shard: ShardConfig, device: torch.device) -> DeviceMesh:
    """Who computes what: ranks along ``data`` have different pairs, those along ``context`` different tokens of them,
    and those along ``tensor`` parts of each layer.

    The ranks are in the order of ``build_mesh``.
    """
    shared = shard.context_parallel * shard.tensor_parallel
    shape = (dist.get_world_size() // shared, shard.context_parallel, shard.tensor_parallel)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "context", "tensor"))


def build_context(work: DeviceMesh) -> Context:
    """The ranks that share rows with this one."""
    return Context(work.get_local_rank("context"), work["context"].size(), work.get_group("context"))


def load_sharded(
    model: ModelConfig,
    shard: ShardConfig,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    context: Context,
    trainable: bool,
) -> Scorer:
    """A scorer with its weights spread over the mesh.

    Trainable weights are float32 masters that compute in ``model.dtype`` with gradients reduced in float32; frozen
    ones, and with ``model.lora`` all but the adapters, are kept in the compute dtype.
    """
    if model.fp8:
        refuse_without_float8(device)
    compute = DTYPES[model.dtype]
    first = dist.get_rank() == 0
    masters = trainable and model.lora is None
    built = build_model(model, with_weights=first, dtype=torch.float32 if masters else compute, device_type=device.type)
    if trainable and model.lora is not None:
        add_adapters(built, model.lora)
    if model.fp8:
        decoder: Any = built.get_decoder()
        use_float8(decoder.layers)
    if device.type == "cpu" and compute == torch.bfloat16:
        use_float32_products(built)
    weights = {f"model.{name}": tensor for name, tensor in built.state_dict().items()} if first else {}
    if shard.tensor_parallel > 1:
        split_over(built, mesh["tensor"])
    scorer = Scorer(built, context)
    if not trainable:
        scorer.requires_grad_(False)
    for layer in scorer.layers:
        if shard.compile:
            # Without the hooks of FSDP, which are not compiled. Rows have any length.
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if trainable:
            recompute(layer, shard.activation_checkpointing)
    if trainable and shard.activation_offload:
        offload(built.get_decoder(), device)
    scorer.train(trainable)
    # FSDP adds the tensor dimension by itself to parameters that are split.
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "tensor")
    _apply_fsdp(scorer, shard, mesh[names], compute, device)
    if dist.get_world_size() > 1:
        _fill(scorer, weights, torch.device("cpu") if shard.cpu_offload else device, device)
    return scorer


def _apply_fsdp(
    scorer: Scorer, shard: ShardConfig, mesh: DeviceMesh, compute: torch.dtype, device: torch.device
) -> None:
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    offloading = CPUOffloadPolicy() if shard.cpu_offload and device.type != "cpu" else OffloadPolicy()
    for layer in scorer.layers:
        fully_shard(
            layer,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offloading,
            reshard_after_forward=shard.reshard_after_forward,
        )
    fully_shard(scorer, mesh=mesh, mp_policy=precision, offload_policy=offloading, reshard_after_forward=False)
    _prefetch(scorer, shard.prefetch)


def _prefetch(scorer: Scorer, ahead: int) -> None:
    """Gather the weights of the ``ahead`` next layers while one computes, in both passes."""
    forth: list[Any] = [scorer, *scorer.layers]
    back: list[Any] = [scorer, *reversed(scorer.layers)]  # the head is the root's
    for i in range(len(forth)):
        forth[i].set_modules_to_forward_prefetch(forth[i + 1 : i + 1 + ahead])
        back[i].set_modules_to_backward_prefetch(back[i + 1 : i + 1 + ahead])


def _fill(scorer: Scorer, weights: dict[str, Any], parameters: torch.device, device: torch.device) -> None:
    """Send rank 0's weights to the shards of all ranks.

    Args:
        parameters: where the shards live; the CPU when they are offloaded.
        device: where the model computes.
    """
    if any(parameter.is_meta for parameter in scorer.parameters()):
        buffers = {name: buffer.clone() for name, buffer in scorer.named_buffers()}
        scorer.to_empty(device=parameters)
        for name, buffer in scorer.named_buffers():
            buffer.copy_(buffers[name])
            buffer.data = buffer.to(device)
    set_model_state_dict(
        scorer, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
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


def release_gathered(scorer: nn.Module) -> None:
    """Put every parameter back to its shard, after forward passes that no backward follows."""
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
