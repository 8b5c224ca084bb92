"""Configuration and digest of a Hugging Face model, read without building it."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoConfig
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


def read_model_config(path: str) -> "PreTrainedConfig":
    """Configuration of the model at ``path``.

    Raises:
        ValueError: no model can be read from ``path``, or packed rows do not support some layers.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "" if Path(path).is_dir() else " (not a local folder, so taken as a name on the hub)"
        raise ValueError(f"model.path: cannot read a model from {path!r}{where}: {error_summary(error)}") from None
    _validate_layer_types(path, config.get_text_config())
    return config


def _validate_layer_types(path: str, config: "PreTrainedConfig") -> None:
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4 takes the index in the row as position
        raise ValueError(
            f"model.path: {path!r} is a {config.model_type} with attn_temperature_tuning, which is not supported in "
            "packed rows"
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    windows = layer_windows(config)
    is_local = any(windows.values()) and config.model_type not in PACKED_WINDOWS
    if unsupported := layer_types - set(windows) or {name for name, window in windows.items() if window and is_local}:
        raise ValueError(
            f"model.path: {path!r} is a {config.model_type} with layers of {', '.join(sorted(unsupported))}, which are "
            "not supported in packed rows"
        )


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """The part of a causal language model that maps token ids to hidden states."""
    decoder: Any = model.get_decoder()
    return decoder.model if decoder is model else decoder


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
