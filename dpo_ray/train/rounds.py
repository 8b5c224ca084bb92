"""The protocol through which online training gets rounds and evaluations."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dpo_ray.rollout.collector import Progress
from dpo_ray.rollout.evaluation import Evaluation
from dpo_ray.rollout.ledger import RoundData
from dpo_ray.train.logps import SampleSource
from dpo_ray.types import Metrics


class Rounds(Protocol):
    """Source of rounds and evaluations.

    Every method is collective: all ranks call it with the same arguments and receive the same result.
    """

    def poll(self, version: int, *, round: int | None, evaluations: Sequence[int], wait_s: float) -> Progress:
        """Asks for a round and for evaluations, and waits for news; see ``Collector.poll``."""
        ...

    def read(self, round: int) -> RoundData:
        """A finished round; each rank reads the pairs that it trains on."""
        ...

    def samples(self, round: int) -> SampleSource:
        """All completions of a round."""
        ...

    def judge(self, round: int, scores: Sequence[float]) -> RoundData:
        """Writes the scores of all completions of a round; returns it with the pairs that the selector picks."""
        ...

    def write_reference(self, round: int, logps: np.ndarray) -> None:
        """Stores the reference log-probabilities of a round's pairs, for later rounds that replay them."""
        ...

    def recorded(self, version: int) -> bool:
        """True if the evaluation of a version is on disk."""
        ...

    def metrics_of(self, version: int) -> Metrics:
        """The metrics of an evaluation that is on disk."""
        ...

    def record(self, evaluation: Evaluation, policy: np.ndarray | None, reference: np.ndarray | None) -> Metrics:
        """Stores an evaluation with the log-probabilities of its samples; returns its metrics."""
        ...
