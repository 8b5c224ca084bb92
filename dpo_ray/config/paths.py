"""Files and folders of a configuration: absolute paths, and errors for missing ones before anything is started."""

from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path

from dpo_ray.config.tree import Config
from dpo_ray.storage import folder_at

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".arrow", ".gz", ".zst")
SOURCES_ACCEPTED = (
    "accepted are .json (a list of records), .jsonl, .ndjson and .csv files (also as .jsonl.gz or .jsonl.zst), "
    ".parquet and .arrow files, folders of files, patterns such as data/*.jsonl, folders written by "
    "datasets.save_to_disk, and hub datasets as org/name or org/name:split"
)


def with_absolute_paths(config: Config) -> Config:
    """``config`` with absolute local paths, which are valid in every process.

    A relative path that does not exist is kept: it may be the name of a hub model or dataset.
    """
    tree = config.model_dump(mode="json")
    if not config.run.remote:
        tree["run"]["dir"] = str(folder_at(config.run.dir).expanduser().absolute())
    tree["reference"]["cache_dir"] = str(config.reference.cache_path.absolute())
    for dotted, paths in _paths(config):
        section, key = dotted.split(".")
        absolute = [_absolute(path) for path in paths]
        tree[section][key] = absolute if isinstance(tree[section][key], list) else absolute[0]
    return Config.model_validate(tree)


def validate_paths(config: Config) -> None:
    """Raise a ValueError for a local path that does not exist.

    A name like ``org/name`` may be a model or dataset on the hub; it is validated when it is loaded.
    """
    accepted: dict[str, tuple[str, Callable[[Path], bool]]] = {
        "model.path": ("accepted is a model directory or a hub id, org/name", Path.is_dir),
        "model.chat_template": ("accepted is a file with a Jinja template", Path.is_file),
    }
    data = (SOURCES_ACCEPTED, _exists)
    for key, paths in _paths(config):
        description, exists = accepted.get(key, data)
        for path in paths:
            # A folder may be followed by the name of a split.
            if _only_local(path) and not any(exists(_local(p)) for p in (path, path.rpartition(":")[0] or path)):
                raise ValueError(f"{key}: {path}: no such file or folder; {description}")


def _paths(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "model.path", (config.model.path,)
    if config.model.chat_template is not None:
        yield "model.chat_template", (config.model.chat_template,)
    yield "data.train", config.data.train
    yield "data.eval", config.data.eval
    if config.online is not None:
        yield "online.prompts", config.online.prompts
        yield "online.eval_prompts", config.online.eval_prompts


def _only_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in (*DATA_SUFFIXES, ".jinja")


def is_pattern(path: str) -> bool:
    """True for a pattern of file names, such as data/*.jsonl."""
    return any(character in path for character in "*?[")


def _exists(path: Path) -> bool:
    return path.exists() or (is_pattern(str(path)) and bool(glob(str(path), recursive=True)))


def _absolute(path: str) -> str:
    if _exists(_local(path)):
        return str(_local(path).absolute())
    folder, colon, split = path.rpartition(":")
    return f"{_local(folder).absolute()}:{split}" if colon and _local(folder).is_dir() else path


def _local(path: str) -> Path:
    return Path(path).expanduser()
