"""DPO on a fixed preference set (arXiv:2305.18290): the whole algorithm.

Every rank runs the same lines the same number of times. No Ray, no file formats: pairs come in as a source, metrics go
out through a reporter.
"""

import math
from typing import Protocol

import torch

from dpo_ray.config.schema import Config
from dpo_ray.data.loader import Mixture, PairLoader, PairSource
from dpo_ray.data.store import PairStore
from dpo_ray.model.export import export_policy
from dpo_ray.train.checkpoint import Checkpointer
from dpo_ray.train.logps import fixed_references
from dpo_ray.train.optim import learning_rate
from dpo_ray.train.state import TrainState
from dpo_ray.train.step import dpo_step, evaluate_pairs
from dpo_ray.train.trainer import Trainer, any_rank, build_trainer
from dpo_ray.types import Metrics, TrainResult


class Reporter(Protocol):
    """Where a loop tells what it is doing. Every rank calls; what is the same on all ranks is written once."""

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """What the run is busy with, and how far it is."""

    def note(self, text: str) -> None:
        """A line that the person who started the run should read."""

    def resumed(self, step: int, rounds: int | None = None) -> None:
        """The run continues after ``step``, and after ``rounds`` rounds; what is on record of later ones was lost."""

    def step(self, metrics: Metrics) -> None:
        """One line of metrics."""

    def evaluation(self, metrics: Metrics) -> None:
        """Held-out metrics at a step."""

    def stop_asked(self) -> bool:
        """Whether this rank has heard that the run should end early."""
        ...


def train_offline(
    config: Config, *, pairs: PairStore, held_out: PairStore | None, device: torch.device, reporter: Reporter
) -> TrainResult:
    """Train the policy on ``pairs``, to the end or until asked to stop."""
    reporter.phase("loading")
    t = build_trainer(config, device)
    mixture = Mixture(pairs.sizes, config.data.weights) if config.data.weights else None
    loader = _loader(t, pairs, mixture, shuffle=config.data.shuffle)
    total_steps = config.run.steps or math.ceil(config.run.epochs * loader.steps_per_epoch)

    # The policy scores the reference while it still is the reference: before a checkpoint is restored.
    sources = [pairs] if held_out is None else [pairs, held_out]
    references = fixed_references(t, sources, lambda done, total: reporter.phase("scoring", done, total))
    for whose, (_, line) in zip(("", "held-out "), references, strict=False):
        reporter.note(whose + line)
    reference, held_reference = references[0][0], references[-1][0]

    state, checkpoints = TrainState(t), Checkpointer(config.run.path / "checkpoints", config)
    if checkpoints.resume(state):
        loader.consumed = state.consumed
        reporter.note(f"resuming after step {state.step} of {total_steps}")
    reporter.resumed(state.step if state.step else -1)

    def evaluate() -> Metrics:
        assert held_out is not None
        reporter.phase("evaluating", state.step, total_steps)
        batches = _loader(t, held_out, shuffle=False)
        metrics = evaluate_pairs(t, (next(batches) for _ in range(batches.steps_per_epoch)), held_reference)
        reporter.evaluation({"step": state.step, **metrics})
        return metrics

    metrics: Metrics = {}
    if held_out is not None and state.step == 0:
        metrics = evaluate()
    while state.step < total_steps:
        reporter.phase("training", state.step, total_steps)
        batch = next(loader)
        metrics, nonfinite_pairs = dpo_step(
            t, batch, reference, lr=learning_rate(config.optim, state.step, total_steps)
        )
        state.consumed = loader.consumed
        state.count_step(nonfinite_pairs, pairs)
        reporter.step({"step": state.step, "epoch": batch.epoch, **metrics})
        last = state.step == total_steps
        stopping = any_rank(reporter.stop_asked()) and not last
        saving = stopping or _due(state.step, config.run.save_every) or (last and config.run.save_every is not None)
        compared = saving and config.run.best_metric is not None
        if held_out is not None and (last or compared or _due(state.step, config.run.eval_every)):
            metrics = evaluate()
        if saving:
            checkpoints.save(state, state.step, metrics)
        if stopping:
            checkpoints.wait()
            return TrainResult(metrics, f"step {state.step} of {total_steps}")
    checkpoints.wait()

    if config.run.export:
        reporter.phase("exporting")
        export_policy(t.policy, config.model, t.tokenizer, config.run.path)
    return TrainResult(metrics)


def _loader(t: Trainer, source: PairSource, mixture: Mixture | None = None, *, shuffle: bool) -> PairLoader:
    return PairLoader(
        source,
        t.batch_shape,
        pairs_per_step=t.config.optim.pairs_per_step,
        seed=t.config.run.seed,
        shuffle=shuffle,
        mixture=mixture,
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
