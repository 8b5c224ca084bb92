"""Waiting for a round: a request to stop is heard while its candidates are written."""

from typing import Any

import pytest

from dpo_ray.train import online
from dpo_ray.types import RoundData


class Rounds:
    """A source that has a round after so many questions."""

    def __init__(self, after: int) -> None:
        self.asked, self.after = 0, after

    def take(self, round: int, *, wait_s: float) -> RoundData | None:
        """The round, or None."""
        self.asked += 1
        return RoundData(round, (), (), round) if self.asked > self.after else None


class Stops:
    """A reporter that is asked to stop at a question."""

    def __init__(self, at: int) -> None:
        self.heard, self.at = 0, at

    def stop_requested(self) -> bool:
        """From then on."""
        self.heard += 1
        return self.heard >= self.at


def await_round(rounds: Any, reporter: Any, monkeypatch: pytest.MonkeyPatch, *, others: list[bool]) -> Any:
    """Wait beside a rank that says ``others`` in turn: whether it is to stop, and whether it has no round yet."""
    said = iter(others)
    monkeypatch.setattr(online, "any_rank", lambda flag: flag | next(said, False))
    return online.await_round(rounds, 4, reporter)


def test_a_round_is_asked_for_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(after=2)
    assert await_round(rounds, Stops(99), monkeypatch, others=[]).index == 4
    assert rounds.asked == 3


def test_a_rank_that_has_the_round_waits_for_one_that_has_not_without_asking_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = Rounds(after=0)
    assert await_round(rounds, Stops(99), monkeypatch, others=[False, True, False, True]).index == 4
    assert rounds.asked == 1


@pytest.mark.parametrize("after", [0, 99])
def test_a_request_to_stop_is_heard_before_the_round_is_there_and_before_it_is_trained(
    monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    rounds = Rounds(after)
    assert await_round(rounds, Stops(3 if after else 1), monkeypatch, others=[]) is None
    assert rounds.asked == (3 if after else 1)
