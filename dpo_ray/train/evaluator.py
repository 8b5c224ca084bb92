"""Evaluations of the policy during a run, and their schedule."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np

from dpo_ray.config.schema import RunConfig
from dpo_ray.data.loader import PairLoader
from dpo_ray.data.store import PairStore
from dpo_ray.model.scorer import LogpsModel
from dpo_ray.reference.reference import Reference
from dpo_ray.train.checkpoint import save_due
from dpo_ray.train.logps import compute_sample_logps
from dpo_ray.train.reporter import Reporter
from dpo_ray.train.step import evaluate_pairs
from dpo_ray.train.trainer import Trainer
from dpo_ray.types import Metrics, TokenSample


def evaluation_due(run: RunConfig, position: int, total: int, *, stopping: bool = False) -> bool:
    """True if the policy is evaluated at ``position`` (steps offline, rounds online) of ``total``.

    At the start, at the end, every ``run.eval_every``, and with ``run.best_metric`` before each checkpoint, which is
    ranked by that metric.
    """
    if run.best_metric is not None and save_due(run, position, total, stopping=stopping):
        return True
    return position in (0, total) or (run.eval_every is not None and position % run.eval_every == 0)


class PairEvaluator:
    """Evaluates the policy on held-out pairs."""

    def __init__(
        self, trainer: Trainer, pairs: PairStore | None, reference: Reference, reporter: Reporter, *, total: int
    ) -> None:
        self.trainer, self.pairs, self.reference, self.reporter, self.total = trainer, pairs, reference, reporter, total
        self.last: int | None = None

    def maybe_run(self, step: int, *, stopping: bool = False) -> Metrics:
        """Evaluates if it is due after ``step`` and was not done yet; returns the metrics, or none."""
        config = self.trainer.config
        due = evaluation_due(config.run, step, self.total, stopping=stopping)
        if self.pairs is None or step == self.last or not due:
            return {}
        self.last = step
        self.reporter.phase("evaluating", step, self.total)
        shape, size = self.trainer.batch_shape, config.optim.pairs_per_step
        batches = PairLoader(self.pairs, shape, pairs_per_step=size, seed=config.run.seed, shuffle=False)
        steps = (next(batches) for _ in range(batches.steps_per_epoch))
        metrics = evaluate_pairs(self.trainer, steps, self.reference)
        self.reporter.evaluation({"step": step, **metrics})
        return metrics


class HeldOutPrompts(Protocol):
    """Source of held-out completions, and storage for their log-probabilities."""

    def held_out(self, version: int) -> Sequence[TokenSample]:
        """Completions of the held-out prompts by the engines' weights; empty without held-out prompts."""

    def scored(self, version: int, policy: np.ndarray, reference: np.ndarray | None) -> None:
        """Stores the log-probabilities of the held-out completions beside their judge scores."""


class PromptEvaluator:
    """Evaluates the policy on completions of held-out prompts: judge scores, and divergence from the reference."""

    def __init__(
        self, trainer: Trainer, prompts: HeldOutPrompts, frozen: LogpsModel | None, reporter: Reporter, *, total: int
    ) -> None:
        self.trainer, self.prompts, self.frozen, self.reporter, self.total = trainer, prompts, frozen, reporter, total
        self.last: int | None = None

    def maybe_run(self, round: int) -> None:
        """Evaluates if it is due after ``round`` rounds and was not done yet."""
        if round == self.last or not evaluation_due(self.trainer.config.run, round, self.total):
            return
        self.last = round
        if samples := self.prompts.held_out(round):
            self.reporter.phase("evaluating")
            logps = partial(compute_sample_logps, self.trainer, samples=samples)
            reference = logps(self.frozen) if self.frozen else None
            self.prompts.scored(round, logps(self.trainer.policy), reference)
