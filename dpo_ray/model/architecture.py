"""Configuration and digest of a Hugging Face model, read without building it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from dpo_ray.ops.windows import layer_windows
from dpo_ray.storage import cached_text, error_summary, file_version

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WEIGHT_INDEX_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)

PACKED_WINDOWS = frozenset(
    [
        "afmoe",
        "cohere2",
        "exaone4",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "gpt_oss",
        "llama4_text",
        "ministral",
        "mistral",
        "mixtral",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    ]
)
"""Architectures (text configurations) whose local attention is tested to be exact in packed rows."""
UNTRAINABLE: Mapping[str, str] = {
    "rwkv": "whose backward pass in transformers fails without a CUDA kernel of its own",
    "xlstm": "whose forward pass in transformers fails without a state",
    "zamba": "whose layers share weights, which FSDP cannot shard by layer",
    "zamba2": "whose layers share weights, which FSDP cannot shard by layer",
}
"""Architectures that no layout of the rows makes trainable, and why."""

OFFLINE_ONLY: Mapping[str, str] = {"gpt_oss": "whose attention sinks and experts vLLM cannot update"}
"""Architectures that the engines of online runs do not support, and why."""


def read_model_config(path: str) -> "PreTrainedConfig":
    """Configuration of the model at ``path``.

    Raises:
        ValueError: no model can be read from ``path``, or its architecture cannot be trained.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "" if Path(path).is_dir() else " (not a local folder, so taken as a name on the hub)"
        raise ValueError(f"model.path: cannot read a model from {path!r}{where}: {error_summary(error)}") from None
    if config.model_type in UNTRAINABLE:
        raise ValueError(f"model.path: {path!r} is a {config.model_type}, {UNTRAINABLE[config.model_type]}")
    return config


def validate_online_model(path: str) -> None:
    """Raise a ValueError if engines cannot get new weights of the architecture at ``path``."""
    architecture = read_model_config(path).model_type
    if architecture in OFFLINE_ONLY:
        raise ValueError(
            f"model.path: {path!r} is a {architecture}, {OFFLINE_ONLY[architecture]}; train it by the command offline"
        )


def is_composite(config: "PreTrainedConfig") -> bool:
    """True if the model has a language model among others, such as a vision tower."""
    return config.get_text_config() is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _architecture(config: "PreTrainedConfig") -> Any:
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if is_composite(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping.get(type(config), None)


def auto_class(config: "PreTrainedConfig") -> type["AutoModelForCausalLM | AutoModelForImageTextToText"]:
    """The class that builds and loads all parts of the model."""
    return AutoModelForImageTextToText if is_composite(config) else AutoModelForCausalLM


def packing_obstacle(config: "PreTrainedConfig") -> str | None:
    """The feature that packed rows do not support, as a verb phrase for messages; None if they are exact."""
    architecture, text = _architecture(config), config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ())
    windows = layer_windows(text)
    if unknown := layer_types - set(windows):
        return f"has layers of {', '.join(sorted(unknown))}"
    if getattr(architecture, "_is_stateful", False):
        return "has layers with a state"
    if any(windows.values()) and text.model_type not in PACKED_WINDOWS:
        return "has local attention that is not tested in packed rows"
    if getattr(text, "attn_temperature_tuning", False):
        return "scales attention by the index in the row (attn_temperature_tuning)"
    if getattr(text, "keep_window_size", None):
        return "masks keys by their content (keep_window_size)"
    if not getattr(architecture, "_supports_attention_backend", True):
        return "has an attention that cannot be replaced"
    return None


def computes_with_sdpa(config: "PreTrainedConfig") -> bool:
    """True if torch's sdpa computes the attention of the architecture."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return getattr(_architecture(config), "_supports_sdpa", True) and not capped


def other_modalities(model: "PreTrainedModel") -> list[nn.Module]:
    """The modules that text does not pass through, such as a vision tower and its projector; the topmost ones."""
    if not is_composite(model.config):
        return []
    return list(_topmost_without(model, {module for part in _text_parts(model) for module in part.modules()}))


def freeze_other_modalities(model: "PreTrainedModel") -> None:
    """Freeze all weights but those of the decoder and the head."""
    model.requires_grad_(False)
    for part in _text_parts(model):
        part.requires_grad_(True)


def _text_parts(model: "PreTrainedModel") -> tuple[nn.Module, nn.Module]:
    head: Any = model.get_output_embeddings()
    return decoder_of(model), head


def _topmost_without(module: nn.Module, used: set[nn.Module]) -> Iterator[nn.Module]:
    for child in module.children():
        if used.isdisjoint(child.modules()):
            yield child
        elif child not in used:
            yield from _topmost_without(child, used)


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """The part of a language model that maps token ids to hidden states."""
    decoder: Any = model.get_decoder()
    return decoder.model if decoder.get_output_embeddings() is not None else decoder


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The layers of ``decoder_of(model)``, under the name that the architecture gives them."""
    return next(child for child in decoder_of(model).children() if isinstance(child, nn.ModuleList))


def model_digest(path: str, cache_dir: Path) -> str:
    """Digest of everything that log-probabilities depend on: architecture and weights, not the folder's name.

    Hub-cache files are symlinks to blobs named by hash; hashes of other files are cached in ``cache_dir``.
    """
    config = read_model_config(path).to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    architecture = json.dumps(config, sort_keys=True, default=str)
    weights = hashlib.blake2b(digest_size=16)
    for file in _weight_files(path):
        weights.update(f"{file.name}:{_file_digest(file, cache_dir)}\n".encode())
    return hashlib.blake2b(f"{weights.hexdigest()}|{architecture}".encode(), digest_size=16).hexdigest()


def _weight_files(path: str) -> list[Path]:
    for name in WEIGHT_INDEX_FILES:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        if not name.endswith(".json"):
            return [Path(file)]
        shards = sorted(set(json.loads(Path(file).read_text())["weight_map"].values()))
        return [Path(str(cached_file(path, shard))) for shard in shards]
    raise ValueError(f"model.path: no weights ({', '.join(WEIGHT_INDEX_FILES)}) in {path!r}")


def _file_digest(file: Path, cache_dir: Path) -> str:
    if file.is_symlink() and file.resolve().parent.name == "blobs":
        return file.resolve().name

    def compute() -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    return cached_text(file_version(file), cache_dir, compute)
