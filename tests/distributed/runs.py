"""What the processes of the distributed tests run: real training on a tiny model, reported to a list."""

from pathlib import Path
from typing import Any

import torch

from dpo_ray.config.schema import Config
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_tokenizer
from dpo_ray.train.offline import train_offline
from dpo_ray.types import Metrics


class ListReporter:
    """Keeps every line of metrics."""

    def __init__(self) -> None:
        self.lines: list[Metrics] = []
        self.resumed_at: int | None = None

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Not kept."""

    def resumed(self, step: int, rounds: int | None = None) -> None:
        """Remember where the run went on."""
        self.resumed_at = step

    def step(self, metrics: Metrics) -> None:
        """Keep a step."""
        self.lines.append(metrics)

    def evaluation(self, metrics: Metrics) -> None:
        """Keep an evaluation."""
        self.lines.append(metrics)


def offline(rank: int, config: dict[str, Any]) -> list[Metrics]:
    """Train offline; returns the lines of metrics."""
    parsed = Config.model_validate(config)
    pairs = prepare_pairs(
        parsed.data.train,
        load_tokenizer(parsed.model.path),
        parsed.data,
        folder=Path(parsed.run.dir) / f"data-{rank}",
    )
    reporter = ListReporter()
    train_offline(parsed, pairs=pairs, held_out=None, device=torch.device("cpu"), reporter=reporter)
    return reporter.lines
