"""The run directory: made by the driver, and kept from a run that does not go on with what is in it."""

from pathlib import Path

import yaml

from dpo_ray.config import Config, first_difference, write_config
from dpo_ray.storage import storage_errors

WORK = ("rounds/*/manifest.json", "checkpoints/*/complete.json", "evaluations/*.jsonl")
"""What a run leaves that a later one of the same name goes on from."""


def has_work(run_dir: Path) -> bool:
    """Whether a run directory holds what a later run of the same name goes on from."""
    return any(next(iter(run_dir.glob(work)), None) for work in WORK)


def make_run_dir(config: Config) -> Path:
    """Create the run directory and write the resolved configuration to it.

    Raises:
        ValueError: it holds the work of a run with another model, reference, data or judge.
    """
    run_dir = config.run.path
    file = run_dir / "config.yaml"
    with storage_errors(run_dir):
        if file.exists() and has_work(run_dir):
            written = yaml.safe_load(file.read_text(encoding="utf-8"))
            if difference := first_difference(written, config):
                raise ValueError(f"{run_dir} was begun with {difference}")
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(config, file)
    return run_dir
