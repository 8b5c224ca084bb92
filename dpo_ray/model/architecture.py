"""Configuration and digest of a Hugging Face model, read without building it."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from dpo_ray.storage import cached_text, error_summary, file_version

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHT_INDEX_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def read_model_config(path: str) -> "PreTrainedConfig":
    """Configuration of the model at ``path``.

    Raises:
        ValueError: no model can be read from ``path``, or some layers do not have full causal attention.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "" if Path(path).is_dir() else " (not a local folder, so taken as a name on the hub)"
        raise ValueError(f"model.path: cannot read a model from {path!r}{where}: {error_summary(error)}") from None
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"model.path: {path!r} has layers with {', '.join(sorted(kinds))}; packed rows support only full_attention"
        )
    return config


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
