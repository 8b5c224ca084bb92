"""Reading a Hugging Face model for training: master weights in float32, read once by rank 0.

Other ranks build the architecture without weights and receive their shards, so that a host never holds more than one
full copy.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from dpo_ray.config.schema import ModelConfig, ShardConfig
from dpo_ray.model.adapters import add_adapters
from dpo_ray.model.architecture import read_model_config
from dpo_ray.model.scorer import Scorer
from dpo_ray.objective.precision import DTYPES
from dpo_ray.ops.attention import use_packed_attention
from dpo_ray.ops.flex import use_flex_attention
from dpo_ray.ops.float8 import use_float8, validate_float8_device
from dpo_ray.ops.linear import use_float32_products
from dpo_ray.parallel.activations import apply_activation_checkpointing, offload_activations
from dpo_ray.parallel.context import Context
from dpo_ray.parallel.fsdp import apply_fsdp, load_full_state
from dpo_ray.parallel.tensor import apply_tensor_parallel, plan_split

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION: Mapping[str, Callable[[], str]] = {
    "packed": use_packed_attention,
    "flex": use_flex_attention,
    "sdpa": lambda: "sdpa",
}
"""How packed rows attend, and what gives transformers' name for each."""


def attention_on(device_type: str, setting: str) -> str:
    """``model.attention`` with auto decided: flex where it has gradients, else torch's kernels on each span."""
    auto = "flex" if device_type == "cuda" else "packed"
    return auto if setting == "auto" else setting


def build_model(
    model: ModelConfig,
    *,
    with_weights: bool,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
) -> "PreTrainedModel":
    """The causal language model at ``model.path`` on the CPU, with dropout off.

    Args:
        with_weights: False gives the architecture on the meta device, its buffers computed.
        dtype: of the parameters.
        device_type: of the device that it will compute on, which decides how it attends.

    Raises:
        ValueError: the model cannot be read, or attends in a way that packed rows cannot express.
    """
    config = read_model_config(model.path)
    _validate_attention(model, config)
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    attention = ATTENTION[attention_on(device_type, model.attention)]()
    if with_weights:
        built = AutoModelForCausalLM.from_pretrained(
            model.path, config=config, dtype=dtype, attn_implementation=attention
        )
    else:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            built = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        built.tie_weights()
    built.config.use_cache = False
    return built


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
        validate_float8_device(device)
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
        apply_tensor_parallel(built, mesh["tensor"])
    scorer = Scorer(built, context)
    if not trainable:
        scorer.requires_grad_(False)
    for layer in scorer.layers:
        if shard.compile:
            # Without the hooks of FSDP, which are not compiled. Rows have any length.
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if trainable:
            apply_activation_checkpointing(layer, shard.activation_checkpointing)
    if trainable and shard.activation_offload:
        offload_activations(built.get_decoder(), device)
    scorer.train(trainable)
    apply_fsdp(scorer, scorer.layers, shard, mesh, compute, device)
    if dist.get_world_size() > 1:
        load_full_state(scorer, weights, torch.device("cpu") if shard.cpu_offload else device, device)
    return scorer


def validate_tensor_parallel(model: ModelConfig, ranks: int) -> None:
    """Check, without its weights, that the layers of a model can be split over ``ranks``.

    Raises:
        ValueError: see ``plan_split``.
    """
    plan_split(build_model(model, with_weights=False), ranks)


def _validate_attention(model: ModelConfig, config: "PreTrainedConfig") -> None:
    """Only attention that is told of them keeps the sequences of a packed row apart."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    what = f"model.path: {model.path!r} is a {config.model_type}"
    if getattr(architecture, "_is_stateful", False):
        raise ValueError(
            f"{what}, whose layers carry a state from token to token, over the sequences of a packed row; "
            "such models cannot be trained"
        )
    if model.attention != "sdpa" and not getattr(architecture, "_supports_attention_backend", True):
        masked = getattr(architecture, "_supports_sdpa", False)
        raise ValueError(
            f"{what}, whose attention cannot be exchanged for that of packed rows; "
            + ("set model.attention: sdpa" if masked else "such models cannot be trained")
        )
