"""Single groups scored by replicas that take batches: overlap, isolation of the group at fault, hangs."""

import asyncio
import time

import pytest

from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.rollout.judging import JudgeDied, JudgeFailed, JudgePool
from dpo_ray.types import Judgement, JudgeUnavailable
from tests.unit.rollout.fakes import FakeReplica, raise_for


def score_all(groups, *replicas, batch=4, concurrency=1, capacity=None, timeout_s=5.0, retries=1):
    """Score all groups at once; returns the score of each, or its error."""

    async def main():
        limit = capacity or Capacity(concurrency)
        pool = JudgePool(replicas, batch=batch, capacity=limit, timeout_s=timeout_s, retries=retries)
        serving = asyncio.ensure_future(pool.run())
        results = await asyncio.gather(*(pool.score(group) for group in groups), return_exceptions=True)
        serving.cancel()
        return results

    return asyncio.run(main())


def test_groups_that_wait_share_a_call_up_to_the_batch_size(group):
    replica = FakeReplica()
    results = score_all([group("a", "b", index=i) for i in range(10)], replica)
    assert results == [Judgement((0.0, 1.0))] * 10
    assert [len(batch) for batch in replica.batches] == [4, 4, 2]


def test_groups_that_wait_are_spread_over_the_calls_that_may_begin(group):
    """A judge that takes a tenth of a second per group has 32 of them after that time if 32 calls may overlap."""
    wait = FakeReplica(lambda groups: asyncio.sleep(0.1 * len(groups)))
    started = time.perf_counter()
    score_all([group("a", "b", index=i) for i in range(32)], wait, batch=16, concurrency=32)
    assert time.perf_counter() - started < 0.8, "two calls of 16 take 1.6 s"
    assert [len(batch) for batch in wait.batches] == [1] * 32
    few = FakeReplica(lambda _: asyncio.sleep(0.1))
    score_all([group("a", "b", index=i) for i in range(12)], few, batch=16, concurrency=4)
    assert sorted(len(batch) for batch in few.batches) == [3, 3, 3, 3]


def test_only_the_group_at_fault_fails_and_it_is_tried_alone(group):
    replica = FakeReplica(raise_for([2], RuntimeError("cannot read this")))
    results = score_all([group("a", "b", index=i) for i in range(4)], replica, retries=2)
    assert [isinstance(result, JudgeFailed) for result in results] == [False, False, True, False]
    assert "raised RuntimeError: cannot read this" in str(results[2])
    assert replica.batches.count([2]) == 3, "once alone, and two retries"
    assert replica.restarts == 0


def test_a_judge_that_fails_once_is_asked_again(group):
    failures = iter([RuntimeError("busy")])

    def act(groups):
        if error := next(failures, None):
            raise error

    replica = FakeReplica(act)
    assert score_all([group("a", "b")], replica) == [Judgement((0.0, 1.0))]
    assert replica.batches == [[0], [0]]


def test_a_judge_that_hangs_over_one_group_is_restarted_and_the_others_get_their_scores(group):
    replica = FakeReplica(lambda groups: asyncio.sleep(60) if any(g.prompt.index == 1 for g in groups) else None)
    results = score_all([group("a", "b", index=i) for i in range(4)], replica, timeout_s=0.05)
    assert [isinstance(result, JudgeFailed) for result in results] == [False, True, False, False]
    assert "returned no scores in 0.05 s (online.judge.timeout_s)" in str(results[1])
    assert replica.restarts == 3, "in the batch, alone, and in its retry"


def test_replicas_share_the_groups_that_wait(group):
    replicas = [FakeReplica(lambda groups: asyncio.sleep(0.01)) for _ in range(3)]
    score_all([group("a", "b", index=i) for i in range(12)], *replicas, batch=1, concurrency=12)
    assert [len(replica.batches) for replica in replicas] == [4, 4, 4]


def test_a_judge_that_is_unavailable_is_not_asked_again(group):
    replica = FakeReplica(raise_for([2], JudgeUnavailable("the endpoint is down")))
    results = score_all([group("a", "b", index=i) for i in range(6)], replica, retries=2)
    assert [isinstance(result, JudgeUnavailable) for result in results] == [True] * 4 + [False] * 2
    assert replica.batches == [[0, 1, 2, 3], [4, 5]]


def test_a_timeout_that_the_judge_raises_itself_does_not_restart_it(group):
    replica = FakeReplica(raise_for([0], TimeoutError("http")))
    (result,) = score_all([group("a", "b")], replica, retries=0)
    assert "raised TimeoutError: http" in str(result)
    assert replica.restarts == 0


@pytest.mark.parametrize(("replicas", "concurrency", "together"), [(1, 1, 1), (1, 4, 4), (2, 4, 8)])
def test_calls_overlap_over_replicas_and_within_one(group, replicas, concurrency, together):
    running, most = 0, 0

    async def wait() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    waits = [FakeReplica(lambda groups: wait()) for _ in range(replicas)]
    score_all([group("a", "b", index=i) for i in range(8)], *waits, batch=1, concurrency=concurrency)
    assert most == together


@pytest.mark.parametrize(("completions", "most"), [(1, 5), (2, 3), (3, 2), (9, 2)])
def test_a_call_begins_while_a_request_is_free_so_that_small_groups_have_as_many_requests_as_large_ones(
    group, completions, most
):
    in_progress: list[int] = [0]

    async def wait():
        in_progress.append(in_progress[-1] + 1)
        await asyncio.sleep(0.01)
        in_progress.append(in_progress[-1] - 1)

    groups = [group(*"abcdefghi"[:completions], index=i) for i in range(12)]
    score_all(groups, FakeReplica(lambda groups: wait()), batch=1, capacity=Capacity(5, (1, 2, 3)))
    assert max(in_progress) == most


@pytest.mark.parametrize(("batch", "concurrency"), [(1, 8), (4, 2), (4, 1)])
def test_a_group_that_kills_the_process_takes_none_of_those_along_that_are_in_it(group, batch, concurrency):
    """Calls in progress fail together; only the group at fault kills a process that it has for itself."""

    class Dying(FakeReplica):
        lives = 0

        async def score(self, groups):
            life, fatal = self.lives, any(g.prompt.index == 3 for g in groups)
            await asyncio.sleep(0.01 if fatal else 0.02)
            self.lives += fatal
            if life != self.lives:
                raise JudgeDied("its process died")
            return await super().score(groups)

    replica = Dying()
    groups = [group("a", "b", index=i) for i in range(8)]
    results = score_all(groups, replica, batch=batch, concurrency=concurrency, retries=1)
    assert [isinstance(result, JudgeFailed) for result in results] == [i == 3 for i in range(8)]
    assert str(results[3]) == "the judge died: its process ended"
    assert replica.lives <= 2 + 2, "with others, and its attempt and retry alone"
    assert replica.restarts == 0


def test_a_group_whose_process_is_killed_because_another_one_hung_loses_no_attempt(group):
    async def killed():
        while not replica.restarts:
            await asyncio.sleep(0.001)
        raise JudgeDied("its process died")

    def act(groups):
        if groups[0].prompt.index == 0:
            return asyncio.sleep(60)
        return None if replica.restarts else killed()

    async def main():
        pool = JudgePool([replica], batch=1, capacity=Capacity(2), timeout_s=0.4, retries=0)
        serving = asyncio.ensure_future(pool.run())
        hung = asyncio.ensure_future(pool.score(group("a", "b", index=0)))
        await asyncio.sleep(0.2)  # the other call begins later, so that it is in progress when the first hangs
        other = await pool.score(group("a", "b", index=1))
        serving.cancel()
        return other, hung.exception()

    replica = FakeReplica(act)
    other, hung = asyncio.run(main())
    assert other == Judgement((0.0, 1.0))
    assert isinstance(hung, JudgeFailed)
    assert replica.restarts == 1


class Taken(FakeReplica):
    """A judge that still works on the call of a pool that died."""

    def __init__(self, left):
        super().__init__(lambda groups: asyncio.sleep(0.2))
        self.left, self.free = left, False

    async def idle(self):
        await self.left()
        self.free = True

    async def score(self, groups):
        assert self.free or self.restarts
        return await super().score(groups)


def test_calls_that_a_pool_has_left_are_awaited_and_take_no_time_of_the_next_ones(group):
    replica = Taken(lambda: asyncio.sleep(0.2))
    assert score_all([group("a", "b")], replica, timeout_s=0.3, retries=0) == [Judgement((0.0, 1.0))]
    assert replica.restarts == 0


def test_a_judge_that_hangs_over_a_call_that_a_pool_has_left_is_restarted(group):
    replica = Taken(lambda: asyncio.sleep(60))
    assert score_all([group("a", "b")], replica, timeout_s=0.3, retries=0) == [Judgement((0.0, 1.0))]
    assert replica.restarts == 1


def test_a_judge_that_dies_over_a_call_that_a_pool_has_left_is_waited_for(group):
    async def die():
        replica.free = True  # the next process has no calls
        raise JudgeDied("its process died")

    replica = Taken(die)
    assert score_all([group("a", "b")], replica, timeout_s=0.3, retries=0) == [Judgement((0.0, 1.0))]
    assert replica.restarts == 0
