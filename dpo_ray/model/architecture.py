"""What the directory of a Hugging Face model is, told without building the model: its configuration and its digest."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig
from transformers.utils import cached_file

from dpo_ray.storage import cached_text, file_version

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHT_INDEX_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_model_config(path: str) -> "PreTrainedConfig":
    """The architecture's configuration.

    Raises:
        ValueError: nothing usable is at ``path``, or not all layers have full causal attention.
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
    return config


def model_digest(path: str, notes: Path) -> str:
    """A digest of all that decides a model's log-probabilities: weights and architecture.

    Args:
        notes: a folder where the digests of files are noted, so that each is read through once.
    """
    config = read_model_config(path).to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    written = json.dumps(config, sort_keys=True, default=str)
    return hashlib.blake2b(f"{weights_digest(path, notes)}|{written}".encode(), digest_size=16).hexdigest()


def weights_digest(path: str, notes: Path) -> str:
    """A digest of the weights' content, whatever the folder is called.

    Files of the hub's cache are links to blobs named by their hash; other files are read.
    """
    files = _weight_files(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name}:{_file_digest(file, notes)}\n".encode())
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


def _file_digest(file: Path, notes: Path) -> str:
    if file.is_symlink() and file.resolve().parent.name == "blobs":
        return file.resolve().name

    def read_through() -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    return cached_text(file_version(file), notes, read_through)
