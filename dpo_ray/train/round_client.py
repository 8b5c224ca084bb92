"""The training loop's side of the engines: publishes weights, waits for rounds, and receives evaluations meanwhile."""

import logging
import time

from dpo_ray.data.packing import build_sample_row
from dpo_ray.model.export import AdapterWeights, CheckpointWeights
from dpo_ray.model.scorer import token_logps
from dpo_ray.objective.precision import DTYPES
from dpo_ray.parallel.collectives import any_rank
from dpo_ray.parallel.fsdp import reshard
from dpo_ray.rollout.ledger import RoundData
from dpo_ray.sync.base import WeightSync
from dpo_ray.train.checkpoint import Checkpointer
from dpo_ray.train.evaluator import PromptEvaluator
from dpo_ray.train.reporter import Reporter
from dpo_ray.train.rounds import Rounds
from dpo_ray.train.trainer import Trainer
from dpo_ray.types import NonRetryableError, Probe, TokenSample

logger = logging.getLogger(__name__)

STOP_POLL_S = 1.0
"""Seconds between two checks for a stop request."""
PROBE_TEXT = (
    "Weights that travel between processes can arrive late, cut or mixed up, so after each push the trainer and every "
    "engine read this sentence and compare what they think of it, token by token."
)


class RoundsFailed(NonRetryableError):
    """Rounds cannot be collected."""


class EnginesUnplaced(RuntimeError):
    """The engines died with the fleet, and start again where the training workers do."""


class RoundClient:
    """Publishes policy versions and waits for what the engines generate with them. Every method is a collective."""

    def __init__(
        self, trainer: Trainer, rounds: Rounds, sync: WeightSync, evaluator: PromptEvaluator, reporter: Reporter
    ) -> None:
        self.trainer, self.rounds, self.sync = trainer, rounds, sync
        self.evaluator, self.reporter = evaluator, reporter
        self.version = 0
        """The latest version that was published."""

    def publish(self, version: int) -> float:
        """Publishes the policy as ``version``; returns the seconds that training waited."""
        trainer, started = self.trainer, time.perf_counter()
        self.version = version
        self.reporter.phase("syncing")
        probe = self._probe()
        if self.sync.adapters_only:
            weights = AdapterWeights(trainer.policy)
        else:
            dtype = DTYPES[trainer.config.model.dtype]
            weights = CheckpointWeights(trainer.policy, dtype, every_rank=self.sync.every_rank)
        self.sync.publish(weights, version=version, probe=probe)
        return time.perf_counter() - started

    def wait_for_round(self, round: int) -> RoundData | None:
        """The pairs of a round; None if a stop is requested first: its groups stay on disk for the resumed run."""
        self.reporter.phase("waiting")
        while True:
            finished = self._poll(round)
            if any_rank(self.reporter.stop_requested()):
                return None
            if finished:
                return self.rounds.read(round)

    def wait_for_evaluations(self) -> None:
        """Waits for the evaluations that are not there yet, unless a stop is requested."""
        self.reporter.phase("evaluating")
        while self.evaluator.pending and not any_rank(self.reporter.stop_requested()):
            self._poll(None)

    def rank_checkpoints(self, checkpointer: Checkpointer) -> None:
        """Waits for the metrics by which ``run.best_metric`` ranks checkpoints, if it does, and records them.

        To be called before each further checkpoint, which would supersede one without metrics.
        """
        if self.trainer.config.run.best_metric is None:
            return
        self.wait_for_evaluations()
        for version, metrics in self.evaluator.take_unranked().items():
            checkpointer.add_metrics(version, metrics)

    def _poll(self, round: int | None) -> bool:
        """Waits a moment for a round, receives evaluations, and publishes again if all engines lost their weights.

        Returns:
            True if the round is finished.
        """
        self.sync.check()
        progress = self.rounds.poll(self.version, round=round, evaluations=self.evaluator.pending, wait_s=STOP_POLL_S)
        if progress.error is not None:
            raise RoundsFailed(progress.error)
        if progress.unplaced:
            raise EnginesUnplaced(
                "the fleet's process died and with it all engines, which share the GPUs of the training workers and "
                "start before them only (cluster.colocate): the workers are restarted"
            )
        for evaluation in progress.evaluations:
            self.evaluator.receive(evaluation, self.version)
        if progress.needs_weights:
            logger.warning("no engine has the weights of version %d; publishing them again", self.version)
            self.publish(self.version)
        return progress.finished

    def _probe(self) -> Probe:
        """Log-probabilities of a text, by which engines prove that they use the published weights."""
        trainer, config = self.trainer, self.trainer.config
        assert config.online is not None
        tokens = trainer.tokenizer(PROBE_TEXT)["input_ids"][: config.max_model_len - 1]
        row = build_sample_row([TokenSample(tuple(tokens[:1]), tuple(tokens[1:]))]).to(trainer.device)
        logps = token_logps(trainer.policy, row).tolist()
        reshard(trainer.policy)
        return Probe(tuple(tokens), tuple(logps), config.online.probe_tolerance)
