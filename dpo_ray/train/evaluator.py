"""Evaluations of the policy during a run, and their schedule."""

from functools import partial

import numpy as np
import torch.distributed as dist

from dpo_ray.config.schema import RunConfig
from dpo_ray.data.loader import PairLoader
from dpo_ray.data.store import PairStore
from dpo_ray.model.scorer import LogpsModel
from dpo_ray.objective.metrics import LOG_RATIOS
from dpo_ray.reference.reference import Reference
from dpo_ray.rollout.evaluation import Evaluation
from dpo_ray.sweep.held_out import write_pair_results
from dpo_ray.train.checkpoint import save_due
from dpo_ray.train.logps import SampleList, compute_sample_logps
from dpo_ray.train.reporter import Reporter
from dpo_ray.train.rounds import Rounds
from dpo_ray.train.step import evaluate_pairs
from dpo_ray.train.trainer import Trainer
from dpo_ray.types import Metrics


def evaluation_due(run: RunConfig, position: int, total: int, *, stopping: bool = False) -> bool:
    """True if the policy is evaluated at ``position`` (steps offline, rounds online) of ``total``.

    At the start, at the end, every ``run.eval_every``, and with ``run.best_metric`` before each checkpoint, which is
    ranked by that metric. With ``run.eval_at``, there and at the end only.
    """
    if run.eval_at:
        return position == total or position in run.eval_at
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
        shape, size = self.trainer.forward_shape, config.optim.pairs_per_step
        batches = PairLoader(self.pairs, shape, pairs_per_step=size, seed=config.run.seed, shuffle=False)
        steps = (next(batches) for _ in range(batches.steps_per_epoch))
        metrics, results = evaluate_pairs(self.trainer, steps, self.reference, pairs=len(self.pairs))
        metrics |= drift(results)
        if dist.get_rank() == 0:
            # A trial is compared where others were stopped: its evaluations stay.
            keep = bool(config.run.eval_at)
            write_pair_results(config.run.path, results, step=step, pairs=self.pairs.digest, keep=keep)
        self.reporter.evaluation({"step": step, **metrics})
        return metrics


def drift(results: np.ndarray) -> Metrics:
    """``eval/drift``: how far the policy is from the reference on the held-out completions; empty without a reference.

    The mean absolute log-ratio of policy to reference, nats per completion. Unlike a KL divergence it needs no samples
    of the policy; unlike rewards it does not depend on beta.

    Args:
        results: (n, 4) PAIR_RESULTS.
    """
    log_ratios = results[:, LOG_RATIOS]
    present = log_ratios[~np.isnan(log_ratios)]
    return {"eval/drift": float(np.abs(present).mean())} if len(present) else {}


class PromptEvaluator:
    """Evaluates the policy on completions that the engines generate: judge scores, and divergence from the reference.

    An evaluation is a request: training continues, and its result is received when it is complete.
    """

    def __init__(
        self, trainer: Trainer, rounds: Rounds, frozen: LogpsModel | None, reporter: Reporter, *, total: int
    ) -> None:
        self.trainer, self.rounds, self.frozen = trainer, rounds, frozen
        self.reporter, self.total = reporter, total
        self.pending: list[int] = []
        """Versions whose evaluations have not been received."""
        self.latest: Metrics = {}
        """Metrics of the evaluations received since they were last reported."""
        self.unranked: dict[int, Metrics] = {}
        """Metrics by version of the evaluations received, or found on disk, since ``take_unranked``."""

    def maybe_request(self, round: int) -> None:
        """Requests an evaluation if it is due after ``round`` rounds and not on disk."""
        due = evaluation_due(self.trainer.config.run, round, self.total)
        if due and round not in self.pending and not self.rounds.recorded(round):
            self.pending.append(round)

    def resume(self, round: int) -> None:
        """Requests the evaluations that are due since the last one on disk.

        Of versions that the engines have no more, the one that they have is evaluated. The evaluation of this very
        version may have been recorded just before the run was interrupted, or by another trial of a sweep: its metrics
        are neither reported yet nor those of a checkpoint.
        """
        since = next((version for version in range(round, -1, -1) if self.rounds.recorded(version)), -1)
        for version in range(since + 1, round + 1):
            self.maybe_request(version)
        if evaluation_due(self.trainer.config.run, round, self.total) and self.rounds.recorded(round):
            self.unranked[round] = self.rounds.metrics_of(round)
            self.latest |= self.unranked[round]

    def receive(self, evaluation: Evaluation, version: int) -> None:
        """Computes the log-probabilities of an evaluation's samples and stores it.

        One of a later version than requested counts as that version's, unless it has one already.

        Args:
            version: version of the trainer's policy. If it has moved on, the engine's own log-probabilities count.
        """
        self.pending.remove(evaluation.requested)
        if evaluation.empty or (evaluation.instead_of is not None and self.rounds.recorded(evaluation.version)):
            return
        self.pending = [requested for requested in self.pending if requested != evaluation.version]
        samples = SampleList(evaluation.token_samples)
        policy = reference = None
        if self.frozen is not None and samples:
            self.reporter.phase("evaluating")
            logps = partial(compute_sample_logps, self.trainer, samples=samples)
            reference = logps(self.frozen)
            of_engine = np.array(evaluation.engine_logps)
            policy = logps(self.trainer.policy) if version == evaluation.version else of_engine
        metrics = self.rounds.record(evaluation, policy, reference)
        self.latest |= metrics
        self.unranked[evaluation.version] = metrics

    def take_unranked(self) -> dict[int, Metrics]:
        """The metrics by version of the evaluations received, or found on disk, since the last call."""
        unranked, self.unranked = self.unranked, {}
        return unranked

    def take_metrics(self) -> Metrics:
        """The metrics of the evaluations received since the last call."""
        metrics, self.latest = self.latest, {}
        return metrics
