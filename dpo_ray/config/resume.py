"""When a run is resumed, and the keys that must not change then."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_ray.config.tree import Config

WORK = ("rounds/*/pairs.jsonl", "rounds/*/manifest.json", "checkpoints/*/complete.json", "evaluations/*.jsonl")
"""Files from which a later run of the same name resumes."""
FIXED_KEYS = (
    "model.path",
    "model.chat_template",
    "model.lora",
    "reference.kind",
    "reference.refresh",
    "reference.mixup_alpha",
    "data.train",
    "data.weights",
    "data.strings",
    "data.pairs_per_prompt",
    "data.limit",
    "data.shuffle",
    "data.max_prompt_tokens",
    "data.max_completion_tokens",
    "run.seed",
    "optim.use",
    "optim.args",
    "loss.use",
    "loss.weights",
    "loss.weighting",
    "loss.divergence",
    "loss.router_aux",
    "online.prompts",
    "online.prompts_per_round",
    "online.source",
    "online.candidates",
    "online.sampling",
    "online.judge",
    "online.select",
)
"""Keys of the training data, the reference, the loss and the optimizer state."""


def has_work(run_dir: Path) -> bool:
    """True if a run of the same name would resume from this directory."""
    return any(next(iter(run_dir.glob(work)), None) for work in WORK)


def first_difference(saved: Mapping[str, Any], config: Config) -> str | None:
    """The first of FIXED_KEYS in which ``config`` differs from a saved configuration, as a clause."""
    current = config.model_dump(mode="json")
    with contextlib.suppress(ValidationError):
        # Keys that did not exist when the configuration was saved get their default.
        saved = Config.model_validate(saved).model_dump(mode="json")
    for dotted in FIXED_KEYS:
        section, key = dotted.split(".")
        before, after = ((tree.get(section) or {}).get(key) for tree in (saved, current))
        if before != after:
            return (
                f"{dotted}: {before!r}, this run has {after!r}; set it as it was to continue, set another run.name, "
                "or remove the run directory to start again"
            )
    return None
