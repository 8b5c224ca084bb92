"""Loading a Hugging Face model for training: built, parallelized and loaded in ``load_sharded``.

Only rank 0 reads the weights. Other ranks build the model on the meta device and receive their shards, so that a host
never holds more than one full copy.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dpo_ray.config.schema import ModelConfig, ShardConfig
from dpo_ray.model.adapters import add_adapters
from dpo_ray.model.architecture import (
    auto_class,
    computes_with_sdpa,
    decoder_layers,
    decoder_of,
    freeze_other_modalities,
    other_modalities,
    packing_obstacle,
    read_model_config,
)
from dpo_ray.model.scorer import Scorer
from dpo_ray.objective.precision import DTYPES, ROUNDED, Products
from dpo_ray.ops.attention import MASKED, PACKED, packed_attention
from dpo_ray.ops.flex import FLEX, flex_packed_attention
from dpo_ray.ops.float8 import use_float8, validate_float8_device
from dpo_ray.ops.linear import use_products
from dpo_ray.ops.norm import use_fused_norms
from dpo_ray.parallel.activations import apply_activation_checkpointing, offload_activations
from dpo_ray.parallel.collectives import broadcast_from_rank0
from dpo_ray.parallel.compiled import compile_layers
from dpo_ray.parallel.context import NO_CONTEXT_PARALLEL, ContextParallel
from dpo_ray.parallel.fsdp import apply_fsdp, gradient_sync, load_full_state
from dpo_ray.parallel.tensor import apply_tensor_parallel, tensor_parallel_plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

PACKED_ATTENTION: Mapping[str, str] = {"packed": PACKED, "flex": FLEX, "sdpa": MASKED}
"""``model.attention``, resolved, -> name in transformers' ``AttentionInterface``; packed is what auto is on CPUs."""


def resolve_attention(setting: str, device_type: str) -> str:
    """``model.attention`` with ``auto`` resolved: flex on GPUs, packed elsewhere, where flex has no gradients."""
    auto = "flex" if device_type == "cuda" else "packed"
    return auto if setting == "auto" else setting


def attention_implementation(model: ModelConfig, config: "PreTrainedConfig", device_type: str) -> str:
    """Name of the attention in transformers' ``AttentionInterface``; of its own ones for padded batches.

    Raises:
        ValueError: ``model.attention`` needs packed rows, or a kernel, that the architecture does not support.
    """
    obstacle, has_sdpa = packing_obstacle(config), computes_with_sdpa(config)
    if model.attention == "padded" or (model.attention == "auto" and obstacle):
        return "sdpa" if has_sdpa else "eager"
    subject = f"model.path: {model.path!r} is a {config.model_type}, which"
    if obstacle:
        raise ValueError(
            f"{subject} {obstacle} and needs padded batches; set model.attention: auto instead of {model.attention}"
        )
    if model.attention == "sdpa" and not has_sdpa:
        raise ValueError(f"{subject} has an attention that torch's sdpa does not compute; set model.attention: auto")
    return PACKED_ATTENTION[resolve_attention(model.attention, device_type)]


def build_model(
    model: ModelConfig, *, with_weights: bool, dtype: torch.dtype = torch.float32, device_type: str = "cpu"
) -> "PreTrainedModel":
    """The model at ``model.path`` on the CPU, without dropout; with all its parts if it has several modalities.

    Args:
        with_weights: False leaves parameters on the meta device; buffers are computed.
        device_type: type of the device that will compute; resolves ``model.attention: auto``.

    Raises:
        ValueError: the model cannot be read, or does not support ``model.attention``.
    """
    config = read_model_config(model.path)
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(part, name, 0.0)
    AttentionInterface.register(PACKED, packed_attention)
    AttentionInterface.register(FLEX, flex_packed_attention)
    AttentionInterface.register(MASKED, sdpa_attention_forward)
    attention = attention_implementation(model, config, device_type)
    if with_weights:
        built = _load_weights(model.path, config=config, dtype=dtype, attn_implementation=attention)
    else:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            built = auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention)
        built.tie_weights()
    built.config.use_cache = False
    return built


def _load_weights(path: str, **arguments: Any) -> "PreTrainedModel":
    """The model with all of its weights from the checkpoint; none is drawn at random.

    Raises:
        ValueError: weights are missing, or their shapes differ from the configuration.
    """
    try:
        loaded: Any = auto_class(arguments["config"]).from_pretrained(path, output_loading_info=True, **arguments)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"model.path: {path!r} has weights of other shapes than config.json says, such as a padded vocabulary "
            "without a changed vocab_size; correct config.json"
        ) from None
    built, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"model.path: {path!r} lacks {_some(missing)}, which would be random; give a complete checkpoint"
        )
    if extra := sorted(info["unexpected_keys"]):
        logger.warning("model.path: %r has weights that the architecture has no place for: %s", path, _some(extra))
    built.config.tie_word_embeddings = head_is_tied(built)
    return built


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more weights" if len(names) > 3 else "")


def head_is_tied(model: "PreTrainedModel") -> bool:
    """True if the output projection has the weights of the embedding."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def untie_head(model: "PreTrainedModel") -> None:
    """Give the output projection weights of its own, on the meta device, for a checkpoint whose head is not tied."""
    head: Any = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.empty_like(head.weight, device="meta"))
    model.config.tie_word_embeddings = False


def load_sharded(
    model: ModelConfig,
    shard: ShardConfig,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    trainable: bool,
    context: ContextParallel = NO_CONTEXT_PARALLEL,
    products: Products = ROUNDED,
    frozen_dtype: torch.dtype | None = None,
    adapter_copies: Sequence[str] = (),
) -> Scorer:
    """Build a model, parallelize it over the mesh and load its weights.

    Trainable weights are float32, compute in ``model.dtype`` and have their gradients reduced in float32. Frozen
    weights are stored in the compute dtype: with ``model.lora`` all but the adapters, and those of other modalities
    than text.

    Args:
        products: paths of the products on a CPU with ``model.dtype: bfloat16``.
        frozen_dtype: dtype of the weights of a model that is not trainable, if it is not the compute dtype.
        adapter_copies: names of frozen copies of the adapters, with ``model.lora``.
    """
    if model.fp8:
        validate_float8_device(device)
    is_rank0 = dist.get_rank() == 0
    compute_dtype = DTYPES[model.dtype]
    dtype = torch.float32 if trainable and model.lora is None else frozen_dtype or compute_dtype
    built = build_model(model, with_weights=is_rank0, dtype=dtype, device_type=device.type)
    if dist.get_world_size() > 1 and not broadcast_from_rank0(lambda: head_is_tied(built)) and head_is_tied(built):
        untie_head(built)
    layers, unused = decoder_layers(built), other_modalities(built)
    freeze_other_modalities(built)
    for module in unused:
        module.to(compute_dtype)
    if trainable and model.lora is not None:
        add_adapters(built, model.lora, copies=adapter_copies)
    if model.fp8:
        use_float8(layers)
    if device.type == "cpu" and compute_dtype == torch.bfloat16:
        use_products(built, products.linear)
        use_fused_norms(built)

    weights = {f"model.{name}": tensor for name, tensor in built.state_dict().items()} if is_rank0 else {}
    if shard.tensor_parallel > 1:
        apply_tensor_parallel(built, mesh["tensor"])
    if shard.compile:
        compile_layers(layers, device)
    if trainable:
        apply_activation_checkpointing(layers, shard.activation_checkpointing)
        if shard.activation_offload:
            offload_activations(decoder_of(built), device)

    scorer = Scorer(built, context, products).train(trainable)
    if not trainable:
        scorer.requires_grad_(False)
    # Steps end with a resharded policy; a frozen copy would stay gathered beside its shards for the whole run.
    reshards = gradient_sync(shard, mesh) == "micro_batch" if trainable else shard.reshard_after_forward
    apply_fsdp(scorer, layers, shard, mesh, compute_dtype, device, reshard_after_forward=reshards, unused=unused)
    if dist.get_world_size() > 1:
        load_full_state(scorer, weights, torch.device("cpu") if shard.cpu_offload else device, device)
    return scorer


def validate_model(config: ModelConfig, shard: ShardConfig) -> None:
    """Check everything that depends on the architecture, without loading weights.

    Raises:
        ValueError: naming the key.
    """
    empty = build_model(config, with_weights=False)
    Scorer(empty, ContextParallel(ranks=shard.context_parallel))
    if shard.tensor_parallel > 1:
        tensor_parallel_plan(empty, shard.tensor_parallel)
