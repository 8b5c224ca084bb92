"""The keys that a resumed run must share with the run that it continues."""

import contextlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dpo_ray.config.schema import Config

FIXED_KEYS = (
    "model.path",
    "model.chat_template",
    "model.lora",
    "reference.kind",
    "reference.refresh",
    "data.train",
    "data.weights",
    "data.limit",
    "data.shuffle",
    "data.max_prompt_tokens",
    "data.max_completion_tokens",
    "run.seed",
    "optim.use",
    "loss.use",
    "loss.weights",
    "loss.weighting",
    "online.prompts",
    "online.prompts_per_round",
    "online.candidates",
    "online.sampling",
    "online.judge",
    "online.select",
)
"""Keys that decide what a run trains on, against what, and what its optimizer keeps; a resuming run shares them."""


def first_difference(written: Mapping[str, Any], config: Config) -> str | None:
    """The first of FIXED_KEYS in which ``config`` differs from the tree of an earlier run, as a clause of a message."""
    current = config.model_dump(mode="json")
    with contextlib.suppress(ValidationError):
        # A tree written before a key existed has its default.
        written = Config.model_validate(written).model_dump(mode="json")
    for dotted in FIXED_KEYS:
        section, key = dotted.split(".")
        before, after = ((tree.get(section) or {}).get(key) for tree in (written, current))
        if before != after:
            return (
                f"{dotted}: {before!r}, this run has {after!r}; give the run another run.name, "
                "or remove its directory to begin again"
            )
    return None
