"""Waiting for a round: stop requests, evaluations that arrive, engines that lost their weights, errors."""

from typing import Any

import pytest

from dpo_ray.rollout.collector import Progress
from dpo_ray.rollout.evaluation import Evaluation
from dpo_ray.train import round_client
from dpo_ray.train.round_client import EnginesUnplaced, RoundClient, RoundsFailed
from dpo_ray.types import NonRetryableError

WAITING, FINISHED = Progress(), Progress(finished=True)


class Rounds:
    """Gives answers in turn, the last one again and again."""

    def __init__(self, *answers: Progress) -> None:
        self.answers, self.asked = list(answers), []

    def poll(self, version: int, *, round: int | None, evaluations: list[int], wait_s: float) -> Progress:
        """The next answer."""
        self.asked.append((version, round, list(evaluations)))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def read(self, round: int) -> Any:
        """The number of the round."""
        return round


class Evaluator:
    """Waits for the evaluations of versions 3 and 4."""

    def __init__(self) -> None:
        self.pending, self.received = [3, 4], []

    def receive(self, evaluation: Evaluation, version: int) -> None:
        """Keep what arrived, and the trainer's version then."""
        self.pending.remove(evaluation.version)
        self.received.append((evaluation.version, version))


class Client(RoundClient):
    """Publishes nothing and keeps the versions; its transport may have failed in the background."""

    def __init__(self, rounds: Any, evaluator: Any = None, reporter: Any = None, *, error: Exception | None = None):
        parts: Any = (None, rounds, self, evaluator or Evaluator(), reporter or Stops())
        super().__init__(*parts)
        self.published, self.error = [], error

    def publish(self, version: int) -> float:
        """Publish at once."""
        self.version = version
        self.published.append(version)
        return 0.0

    def check(self) -> None:
        """Raise the transport's error."""
        if self.error is not None:
            raise self.error


class Stops:
    """A reporter that is asked to stop at a question."""

    def __init__(self, at: int = 99) -> None:
        self.asked, self.at = 0, at

    def phase(self, name: str) -> None:
        """Not looked at."""

    def stop_requested(self) -> bool:
        """From then on."""
        self.asked += 1
        return self.asked >= self.at


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank."""
    monkeypatch.setattr(round_client, "any_rank", lambda flag: flag)


def wait(rounds: Any, evaluator: Any = None, reporter: Any = None) -> tuple[Any, list[int]]:
    """Publish version 4 and wait for round 4; returns its data and the versions published meanwhile."""
    client = Client(rounds, evaluator, reporter)
    client.version = 4
    return client.wait_for_round(4), client.published


def test_a_round_is_asked_for_until_it_is_there() -> None:
    rounds = Rounds(WAITING, WAITING, FINISHED)
    assert wait(rounds) == (4, [])
    assert rounds.asked == [(4, 4, [3, 4])] * 3


@pytest.mark.parametrize(("answer", "at"), [(WAITING, 3), (FINISHED, 1)])
def test_a_request_to_stop_is_heard_before_the_round_is_there_and_before_it_is_trained(
    answer: Progress, at: int
) -> None:
    rounds = Rounds(answer)
    assert wait(rounds, reporter=Stops(at)) == (None, [])
    assert len(rounds.asked) == at


def test_evaluations_are_received_while_a_round_is_awaited_and_with_it() -> None:
    evaluator = Evaluator()
    rounds = Rounds(Progress(evaluations=(Evaluation(4),)), Progress(evaluations=(Evaluation(3),), finished=True))
    assert wait(rounds, evaluator) == (4, [])
    assert evaluator.received == [(4, 4), (3, 4)]
    assert rounds.asked[1] == (4, 4, [3])


def test_weights_are_published_again_when_no_engine_has_them() -> None:
    assert wait(Rounds(Progress(needs_weights=True), FINISHED)) == (4, [4])


def test_an_error_of_the_collector_ends_the_run_with_its_message() -> None:
    with pytest.raises(RoundsFailed, match="9 of 16 groups failed"):
        wait(Rounds(WAITING, Progress(error="9 of 16 groups failed")))


def test_workers_start_again_to_place_engines_that_died_with_the_fleet() -> None:
    with pytest.raises(EnginesUnplaced, match=r"cluster\.colocate") as raised:
        wait(Rounds(WAITING, Progress(unplaced=True)))
    assert not isinstance(raised.value, NonRetryableError)


def test_a_publish_that_failed_in_the_background_ends_the_wait() -> None:
    client = Client(Rounds(WAITING), error=TimeoutError("the fleet did not answer"))
    with pytest.raises(TimeoutError, match="the fleet did not answer"):
        client.wait_for_round(4)


def test_at_the_end_only_the_missing_evaluations_are_awaited() -> None:
    rounds = Rounds(WAITING, Progress(evaluations=(Evaluation(3),)), Progress(evaluations=(Evaluation(4),)))
    client = Client(rounds)
    client.version = 5
    client.wait_for_evaluations()
    assert client.evaluator.pending == []
    assert rounds.asked == [(5, None, [3, 4]), (5, None, [3, 4]), (5, None, [4])]
