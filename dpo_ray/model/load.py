"""Reading a Hugging Face model for training: master weights in float32, read once by rank 0.

Other ranks build the architecture without weights and receive their shards, so that a host never holds more than one
full copy.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from dpo_ray.config.schema import ModelConfig
from dpo_ray.model.attention import use_packed_attention
from dpo_ray.model.flex import use_flex_attention
from dpo_ray.model.tensor_parallel import plan_split

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WEIGHT_INDEX_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


ATTENTION: Mapping[str, Callable[[], str]] = {
    "auto": use_packed_attention,
    "flex": use_flex_attention,
    "sdpa": lambda: "sdpa",
}
"""Settings of ``model.attention``, and what gives transformers' name for each."""


def build_model(model: ModelConfig, *, with_weights: bool, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The causal language model at ``model.path``, with dropout off.

    Args:
        with_weights: False gives the architecture on the meta device, its buffers computed.
        dtype: of the parameters.

    Raises:
        ValueError: the model cannot be read, or attends in a way that packed rows cannot express.
    """
    config = read_model_config(model.path)
    _refuse_fixed_attention(model, config)
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    attention = ATTENTION[model.attention]()
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


def read_model_config(path: str) -> "PreTrainedConfig":
    """The architecture's configuration.

    Raises:
        ValueError: nothing usable is at ``path``, or not all layers have full causal attention and nothing else.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "" if Path(path).is_dir() else " (no folder of that name is here, so it is a name on the hub)"
        raise ValueError(
            f"model.path: no model could be read from {path!r}{where}: {str(error).splitlines()[0]}"
        ) from None
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"model.path: {path!r} has layers of {', '.join(sorted(kinds))}; "
            "only full_attention can be trained in packed rows"
        )
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_is_stateful", False):
        raise ValueError(
            f"model.path: {path!r} is a {config.model_type}, whose layers carry a state from token to token; "
            "only attention keeps the sequences of a packed row apart"
        )
    return config


def refuse_unusable_model(model: ModelConfig, *, tensor_parallel: int) -> None:
    """Check what the configuration of a model decides, before its weights are read.

    Raises:
        ValueError: see ``read_model_config`` and ``plan_split``; or the attention cannot be exchanged.
    """
    _refuse_fixed_attention(model, read_model_config(model.path))
    if tensor_parallel > 1:
        plan_split(build_model(model, with_weights=False), tensor_parallel)


def _refuse_fixed_attention(model: ModelConfig, config: "PreTrainedConfig") -> None:
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model.attention != "sdpa" and not getattr(architecture, "_supports_attention_backend", True):
        masked = getattr(architecture, "_supports_sdpa", False)
        raise ValueError(
            f"model.path: {model.path!r} is a {config.model_type}, whose attention cannot be exchanged for that of "
            f"packed rows; {'set model.attention: sdpa' if masked else 'such models cannot be trained'}"
        )


def model_digest(path: str) -> str:
    """A digest of all that decides a model's log-probabilities: weights and architecture."""
    config = read_model_config(path).to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    written = json.dumps(config, sort_keys=True, default=str)
    return hashlib.blake2b(f"{weights_digest(path)}|{written}".encode(), digest_size=16).hexdigest()


def weights_digest(path: str) -> str:
    """A digest of the weights' content, whatever the folder is called.

    Files of the hub's cache are links to blobs named by their hash; other files are read.
    """
    files = _weight_files(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name}:{_file_digest(file)}\n".encode())
    return digest.hexdigest()


def _weight_files(path: str) -> list[Path]:
    for name in WEIGHT_INDEX_FILES:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        if not name.endswith(".json"):
            return [Path(found)]
        shards = sorted(set(json.loads(Path(found).read_text())["weight_map"].values()))
        return [Path(str(cached_file(path, shard))) for shard in shards]
    raise ValueError(f"model.path: no weights ({', '.join(WEIGHT_INDEX_FILES)}) in {path!r}")


def _file_digest(file: Path) -> str:
    if file.is_symlink() and file.resolve().parent.name == "blobs":
        return file.resolve().name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
