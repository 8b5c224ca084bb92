"""The run directory of a sweep, which only the same sweep may continue."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dpo_ray.config import Config
from dpo_ray.config.sweeps import START_TOGETHER
from dpo_ray.launch.run_dir import make_run_dir
from dpo_ray.sweep.trials import SweepDefinition, as_read, read_definition, write_definition

FREE_KEYS = (
    "run.trackers", "run.tracker_args", "run.dir", "run.keep_checkpoints", "run.save_every", "cluster", "sweep",
)  # fmt: skip
"""Keys in which a sweep may be continued with another configuration; ``sweep`` is compared by its definition."""
ABSENT = "no such key"


def open_sweep_dir(config: Config, definition: SweepDefinition) -> tuple[Path, SweepDefinition]:
    """Creates the run directory, or opens that of a sweep to continue.

    Returns:
        the directory, and the definition with at least the trials and with the data that the sweep had.

    Raises:
        ValueError: it belongs to another sweep, or to a run; the message names the difference.
    """
    run_dir = config.run.path
    file, journal = run_dir / "sweep.json", run_dir / "journal.jsonl"
    if journal.exists() and file.exists():
        if difference := _difference(read_definition(file), as_read(definition), run_dir, config):
            raise ValueError(
                f"{run_dir} holds a sweep with {difference}; set another run.name, or remove the directory"
            )
        earlier = read_definition(file)
        if definition.samples > earlier.samples and definition.scheduler["use"] in START_TOGETHER:
            raise ValueError(
                f"sweep.samples is {definition.samples}, and {run_dir} was started with {earlier.samples}: "
                f"sweep.scheduler.use: {definition.scheduler['use']} compares trials that start together; set another "
                "run.name"
            )
        definition = replace(definition, samples=max(definition.samples, earlier.samples), data=earlier.data)
    make_run_dir(config)
    write_definition(file, definition)
    return run_dir, definition


def _difference(earlier: SweepDefinition, current: SweepDefinition, run_dir: Path, config: Config) -> str | None:
    """The first part in which a sweep differs from the one that it would continue, as a clause."""
    if earlier.keys != current.keys:
        for name in {**earlier.keys, **current.keys}:
            before, after = earlier.keys.get(name), current.keys.get(name)
            if before != after:
                return f"another space, {name}: {before or 'no such key'}; this one has {after or 'no such key'}"
    for part in ("objective", "scheduler", "search", "seed", "time"):
        before, after = getattr(earlier, part), getattr(current, part)
        if before != after:
            return f"another {part}: {before}, this one has {after}"
    saved = Config.model_validate(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")))
    before, after = (dict(_leaves(tree.model_dump(mode="json"))) for tree in (saved, config))
    for key in {**after, **before}:
        if before.get(key, ABSENT) != after.get(key, ABSENT) and not _is_free(key):
            return f"{key}: {before.get(key, ABSENT)!r}, this one has {after.get(key, ABSENT)!r}"
    return None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
