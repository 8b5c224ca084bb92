"""The stream of rounds, fed by scripted collections."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpo_ray.rollout.stream import RoundStream, StalePairs
from dpo_ray.types import RoundData

PATIENCE_S = 10.0


def data_of(round: int, policy_version: int | None = None) -> RoundData:
    version = round if policy_version is None else policy_version
    return RoundData(index=round, pairs=(), samples=(), policy_version=version)


class Collections:
    """Records what is started and waited for; a round waits until it is let go."""

    def __init__(self, *, held: bool = False, versions: dict[int, int] | None = None) -> None:
        self.started: list[int] = []
        self.waited: list[int] = []
        self.versions = versions or {}
        self.go = threading.Event()
        if not held:
            self.go.set()

    def start(self, round: int) -> int:
        self.started.append(round)
        return round

    def wait(self, round: int) -> RoundData:
        self.waited.append(round)
        assert self.go.wait(PATIENCE_S)
        return data_of(round, self.versions.get(round))


def stream_of(collections, *, max_lag: int = 0, rounds: int = 10) -> RoundStream[int]:
    return RoundStream(collections.start, collections.wait, max_lag=max_lag, rounds=rounds)


def test_max_lag_zero_starts_a_round_only_when_it_is_taken():
    collections = Collections()
    stream = stream_of(collections)
    assert collections.started == []
    stream.take(0)
    assert collections.started == [0]
    stream.take(1)
    assert collections.started == [0, 1]


def test_max_lag_one_has_the_next_round_in_flight_while_one_is_trained():
    collections = Collections(versions={1: 0, 2: 1})
    stream = stream_of(collections, max_lag=1)
    stream.take(0)
    assert collections.started == [0, 1]
    assert collections.waited == [0]
    stream.take(1)
    assert collections.started == [0, 1, 2]
    assert collections.waited == [0, 1]


def test_no_round_after_the_last_is_started():
    collections = Collections(versions={1: 0, 2: 0})
    stream = stream_of(collections, max_lag=5, rounds=3)
    for round in range(3):
        stream.take(round)
    assert collections.started == [0, 1, 2]


def test_four_ranks_that_take_a_round_at_once_share_one_collection():
    collections = Collections(held=True)
    stream = stream_of(collections, max_lag=1, rounds=6)
    with ThreadPoolExecutor(4) as ranks:
        for round in range(6):
            collections.go.clear()
            taken = [ranks.submit(stream.take, round) for _ in range(4)]
            collections.go.set()
            first, *others = [take.result(PATIENCE_S) for take in taken]
            assert first.index == round
            assert all(data is first for data in others)
    assert collections.started == [0, 1, 2, 3, 4, 5]
    assert collections.waited == [0, 1, 2, 3, 4, 5]


def test_ranks_a_round_apart_get_the_data_of_their_round():
    collections = Collections()
    stream = stream_of(collections)
    first = stream.take(0)
    stream.take(1)
    assert stream.take(0) is first
    assert collections.started == [0, 1]


def test_rounds_long_past_are_not_kept_and_a_run_set_back_collects_them_again():
    collections = Collections()
    stream = stream_of(collections)
    for round in range(4):
        stream.take(round)
    stream.take(0)
    stream.take(1)
    assert Counter(collections.started) == {0: 2, 1: 2, 2: 1, 3: 1}


@pytest.mark.parametrize(("max_lag", "version", "accepted"), [(0, 5, True), (0, 4, False), (1, 4, True), (1, 3, False)])
def test_pairs_older_than_max_lag_are_refused(max_lag, version, accepted):
    stream = stream_of(Collections(versions={5: version}), max_lag=max_lag)
    if accepted:
        assert stream.take(5).policy_version == version
    else:
        with pytest.raises(
            StalePairs, match=rf"round 5 were written by policy version {version}, {5 - version} rounds"
        ):
            stream.take(5)


def test_a_failed_collection_raises_to_every_waiting_rank_and_starts_again_on_a_later_take():
    class FailsOnce(Collections):
        def wait(self, round: int) -> RoundData:
            data = super().wait(round)
            if self.waited.count(round) == 1:
                raise TimeoutError("no candidates after 1800 s")
            return data

    collections = FailsOnce(held=True)
    stream = stream_of(collections)
    everyone_waits = threading.Barrier(5)

    def take() -> RoundData:
        everyone_waits.wait(PATIENCE_S)
        return stream.take(0)

    with ThreadPoolExecutor(4) as ranks:
        taken = [ranks.submit(take) for _ in range(4)]
        everyone_waits.wait(PATIENCE_S)
        threading.Timer(0.5, collections.go.set).start()  # by then all four wait for the same collection
        for take_of_rank in taken:
            with pytest.raises(TimeoutError, match="no candidates"):
                take_of_rank.result(PATIENCE_S)
    assert collections.started == [0]
    assert stream.take(0).index == 0
    assert collections.started == [0, 0]


def test_a_round_that_cannot_be_started_ahead_does_not_disturb_the_round_taken(caplog):
    class CannotStartOne(Collections):
        def start(self, round: int) -> int:
            handle = super().start(round)
            if self.started.count(1) == 1 and round == 1:
                raise RuntimeError("no engine")
            return handle

    collections = CannotStartOne(versions={2: 1})
    stream = stream_of(collections, max_lag=1)
    assert stream.take(0).index == 0
    assert "round 1 could not be started ahead" in caplog.text
    assert stream.take(1).index == 1
    assert collections.started == [0, 1, 1, 2]


def test_a_round_that_cannot_be_started_raises_to_its_taker():
    def start(round: int) -> int:
        raise RuntimeError("no engine")

    with pytest.raises(RuntimeError, match="no engine"):
        RoundStream(start, data_of, max_lag=0, rounds=1).take(0)


@pytest.mark.parametrize("round", [-1, 3])
def test_a_round_outside_the_run_is_refused(round):
    with pytest.raises(ValueError, match=rf"round {round} was asked for; the run has rounds 0 to 2"):
        stream_of(Collections(), rounds=3).take(round)
