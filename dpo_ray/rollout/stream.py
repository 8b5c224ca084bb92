"""The stream of rounds that online training takes its pairs from.

Keeps up to ``max_lag`` collections in flight ahead of the round that is trained. Knows nothing of engines, judges, Ray
or files: it is given a function that starts a collection and one that waits for it.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dpo_ray.types import NonRetryableError, RoundData

logger = logging.getLogger(__name__)

Handle = TypeVar("Handle")

KEPT_ROUNDS = 2
"""Rounds whose data stays in memory for ranks that ask later: the one taken last and the one before it."""


class StalePairs(NonRetryableError):
    """A round's pairs were written by a policy more than ``max_lag`` rounds old."""


@dataclass(slots=True, eq=False)
class _Collection(Generic[Handle]):
    """One started collection."""

    handle: Handle
    awaited: bool = False
    """Whether a caller has taken on the waiting for all."""
    data: Future[RoundData] = field(default_factory=Future)


class RoundStream(Generic[Handle]):
    """Hands the data of each round to every rank that asks, collecting each round once. Safe to call from many threads.

    Example, with ``max_lag=1``:
        stream.take(0)      # starts rounds 0 and 1, waits for 0
        stream.take(0)      # another rank: the same object, nothing is started
        stream.take(1)      # starts round 2, waits for 1
    """

    def __init__(
        self,
        start: Callable[[int], Handle],
        wait: Callable[[Handle], RoundData],
        *,
        max_lag: int,
        rounds: int,
    ) -> None:
        """Start with nothing in flight.

        Args:
            start: begins the collection of a round and returns at once. For a round that was collected before the run
                was restarted, the handle may stand for reading it.
            wait: the data of a started collection. Brings its own time-out.
            max_lag: rounds that collection may run ahead of the round taken; 0 starts a round when it is taken.
            rounds: rounds of the run; none from there on is started.
        """
        self._start = start
        self._wait = wait
        self.max_lag = max_lag
        self.rounds = rounds
        self._lock = threading.Lock()
        self._collections: dict[int, _Collection[Handle]] = {}

    def take(self, round: int) -> RoundData:
        """The data of a round; blocks until its collection is done.

        Starts the collections of ``round`` to ``round + max_lag`` that were not started before. A collection that fails
        raises to every caller who waits for it and is forgotten: a later take starts it again.

        Raises:
            StalePairs: the pairs were written by a policy older than ``round - max_lag``.
            ValueError: the run has no such round.
        """
        if not 0 <= round < self.rounds:
            raise ValueError(f"round {round} was asked for; the run has rounds 0 to {self.rounds - 1}")
        with self._lock:
            self._start_from(round)
            self._forget_before(round + 1 - KEPT_ROUNDS)
            collection = self._collections[round]
            waits_for_all = not collection.awaited
            collection.awaited = True
        if waits_for_all:
            self._finish(round, collection)
        return collection.data.result()

    def _start_from(self, round: int) -> None:
        for ahead in range(round, min(round + self.max_lag + 1, self.rounds)):
            if ahead in self._collections:
                continue
            try:
                self._collections[ahead] = _Collection(self._start(ahead))
            except Exception:
                if ahead == round:
                    raise
                logger.warning("round %d could not be started ahead; its take starts it again", ahead, exc_info=True)
                return

    def _forget_before(self, round: int) -> None:
        for old in [index for index in self._collections if index < round]:
            del self._collections[old]

    def _finish(self, round: int, collection: _Collection[Handle]) -> None:
        try:
            data = self._wait(collection.handle)
            self._check_age(round, data)
        except BaseException as error:
            with self._lock:
                if self._collections.get(round) is collection:
                    del self._collections[round]
            collection.data.set_exception(error)
        else:
            collection.data.set_result(data)

    def _check_age(self, round: int, data: RoundData) -> None:
        lag = round - data.policy_version
        if lag > self.max_lag:
            raise StalePairs(
                f"the pairs of round {round} were written by policy version {data.policy_version}, {lag} rounds old; "
                f"online.max_lag allows {self.max_lag}"
            )
