"""Requests to engines: recent enough policies, the least busy engine, another one when it fails."""

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import replace

import pytest

from dpo_ray.rollout.dispatch import Dispatcher, EngineError, FleetFailed, VersionGone
from dpo_ray.rollout.engine import Request, RequestTimedOut
from dpo_ray.rollout.membership import Membership
from tests.unit.rollout.fakes import FakeEngine, FakeFleet, online, prompts, raise_for

SAMPLING = online().sampling


def request(index=0):
    return Request(prompts(index + 1)[index], SAMPLING, 2, 7, 60.0)


def run(fleet_of, main):
    """Run ``main(dispatcher, fleet)`` beside a dispatcher that follows a fleet, given by engines or a function."""

    async def whole():
        fleet = fleet_of() if callable(fleet_of) else FakeFleet(*fleet_of)
        dispatcher = Dispatcher(fleet.membership, fleet.suspect)
        following = asyncio.ensure_future(dispatcher.follow())
        try:
            async with asyncio.timeout(10):
                return await main(dispatcher, fleet)
        finally:
            following.cancel()

    return asyncio.run(whole())


def test_requests_go_to_the_least_busy_engine_and_only_to_recent_enough_ones():
    engines = [FakeEngine(3, lambda _: asyncio.sleep(0.05)) for _ in range(3)]
    engines[2].version = 2

    async def main(dispatcher, fleet):
        return await asyncio.gather(*(dispatcher.generate(request(i), oldest=3) for i in range(10)))

    groups = run(engines, main)
    assert [group.prompt.index for group in groups] == list(range(10))
    assert [len(engine.requests) for engine in engines] == [5, 5, 0]


def test_a_request_waits_for_an_engine_that_serves_its_version():
    async def main(dispatcher, fleet):
        waiting = asyncio.ensure_future(dispatcher.generate(request(), oldest=1))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        fleet.publish(1)
        return await waiting

    assert run([FakeEngine(0)], main).policy_version == 1


def test_a_request_of_an_exact_version_ends_when_all_engines_are_newer():
    async def main(dispatcher, fleet):
        return await dispatcher.generate(request(), oldest=1, newest=1)

    with pytest.raises(VersionGone, match="all engines serve policy version 2, not 1"):
        run([FakeEngine(2)], main)


def test_the_groups_of_a_dead_engine_are_generated_by_another():
    async def die(request):
        await asyncio.sleep(0.02)
        raise ConnectionError("died")

    dead = FakeEngine(0, die)

    async def main(dispatcher, fleet):
        groups = await asyncio.gather(*(dispatcher.generate(request(i), oldest=0) for i in range(6)))
        return groups, fleet.suspected

    groups, suspected = run([dead, FakeEngine(0, lambda _: asyncio.sleep(0.02))], main)
    assert [group.prompt.index for group in groups] == list(range(6))
    assert Counter(suspected) == {("0", "ConnectionError: died"): 3}


def test_a_prompt_that_kills_four_engines_fails():
    engines = [FakeEngine(0, raise_for([0], ConnectionError("died"))) for _ in range(5)]

    async def main(dispatcher, fleet):
        with pytest.raises(EngineError, match="4 engines failed over prompt 0: ConnectionError: died"):
            await dispatcher.generate(request(), oldest=0)
        return await dispatcher.generate(request(1), oldest=0)

    assert run(engines, main).prompt.index == 1


class OneEngine(FakeFleet):
    """Replaces its engine when it is suspected."""

    def __init__(self, engine_of):
        super().__init__(engine_of())
        self.engine_of = engine_of

    async def suspect(self, member_id, reason):
        if int(member_id) in self.engines:
            self.engines[int(member_id) + 1] = self.engine_of()
        await super().suspect(member_id, reason)


def test_a_prompt_that_kills_the_only_engine_each_time_fails_alone():
    deaths = []

    def engine_of():
        """An engine that dies over prompt 5, with all that it works on."""
        death = asyncio.Event()

        async def act(request):
            if request.prompt.index == 5:
                deaths.append(engine.running)
                death.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(death.wait(), 0.02)
            if death.is_set():
                raise ConnectionError("died")

        engine = FakeEngine(0, act)
        return engine

    async def complete(dispatcher, index):
        try:
            return (await dispatcher.generate(request(index), oldest=0)).prompt.index
        except EngineError:
            return "failed"

    async def main(dispatcher, fleet):
        return await asyncio.gather(*(complete(dispatcher, index) for index in range(12)))

    assert run(lambda: OneEngine(engine_of), main) == [0, 1, 2, 3, 4, "failed", 6, 7, 8, 9, 10, 11]
    assert len(deaths) == 4
    assert 1 < deaths[2] <= 8, "suspects of at most 16 sequences"
    assert deaths[3] == 1


def test_the_death_of_the_fleet_is_not_blamed_on_requests(monkeypatch):
    monkeypatch.setattr("dpo_ray.rollout.dispatch.RESTART_S", 0.02)
    failures = iter([ConnectionError("died")] * 5)

    async def act(_):
        if error := next(failures, None):
            raise error

    async def main(dispatcher, fleet):
        async def suspect(member_id, reason):
            raise ConnectionError("the fleet died")

        dispatcher._suspect = suspect
        generating = asyncio.ensure_future(dispatcher.generate(request(), oldest=0))
        while not generating.done():
            await asyncio.sleep(0.01)
            fleet.change()
        return await generating

    assert run([FakeEngine(0, act)], main).prompt.index == 0


def test_an_engine_gets_its_share_of_a_round_while_others_load_the_same_weights():
    engines = [FakeEngine(0, lambda _: asyncio.sleep(0.1)) for _ in range(2)]

    async def main(dispatcher, fleet):
        fleet.loading = {1}
        fleet.change()
        round = asyncio.gather(*(dispatcher.generate(request(i), oldest=0) for i in range(32)))
        await asyncio.sleep(0.05)
        fleet.loading = set()
        fleet.change()
        return await round

    assert len(run(engines, main)) == 32
    assert [len(engine.requests) for engine in engines] == [16, 16]


def test_a_round_is_finished_by_one_engine_if_the_others_never_serve(monkeypatch):
    monkeypatch.setattr("dpo_ray.rollout.dispatch.HOLD_S", 0.1)
    engines = [FakeEngine(0, lambda _: asyncio.sleep(0.2)) for _ in range(2)]

    async def main(dispatcher, fleet):
        fleet.loading = {1}
        fleet.change()
        started = time.perf_counter()
        await asyncio.gather(*(dispatcher.generate(request(i), oldest=0) for i in range(32)))
        return time.perf_counter() - started

    assert run(engines, main) < 0.45, "0.1 s until nothing is held back, and 0.2 s"
    assert [len(engine.requests) for engine in engines] == [32, 0]


def test_a_suspect_that_the_fleet_is_still_checking_gets_nothing(monkeypatch):
    monkeypatch.setattr("dpo_ray.rollout.dispatch.POLL_S", 0.1)
    broken = FakeEngine(0, raise_for([0], ConnectionError("no answer")))

    async def main(dispatcher, fleet):
        async def suspect(member_id, reason):
            await asyncio.sleep(0.3)  # polls of the membership end meanwhile

        dispatcher._suspect = suspect
        first = asyncio.ensure_future(dispatcher.generate(request(0), oldest=0))
        await asyncio.sleep(0.01)
        await asyncio.gather(*(dispatcher.generate(request(i), oldest=0) for i in range(1, 9)))
        return await first

    assert run([broken, FakeEngine(0, lambda _: asyncio.sleep(0.02))], main).prompt.index == 0
    assert [asked.prompt.index for asked in broken.requests] == [0], "the others went elsewhere"


def test_an_engine_gets_no_more_sequences_than_it_generates_and_a_few_that_wait():
    engine = FakeEngine(0, lambda _: asyncio.sleep(0.01), max_sequences=8)

    async def main(dispatcher, fleet):
        return await asyncio.gather(*(dispatcher.generate(request(i), oldest=0) for i in range(20)))

    assert len(run([engine], main)) == 20
    assert engine.most == 5, "five requests of two completions: 8 sequences and a quarter of them"


def test_evaluations_and_earlier_rounds_go_first():
    engine = FakeEngine(0, lambda _: asyncio.sleep(0.01), max_sequences=2)

    async def main(dispatcher, fleet):
        asked = [replace(request(i), round=3 - i) for i in range(4)] + [replace(request(4), evaluation=True)]
        await asyncio.gather(*(dispatcher.generate(each, oldest=0) for each in asked))

    run([engine], main)
    assert [asked.prompt.index for asked in engine.requests] == [0, 4, 3, 2, 1], "0 found the engine idle"


def test_a_cancelled_request_leaves_its_engine_to_others():
    engine = FakeEngine(0, lambda _: asyncio.sleep(0.05), max_sequences=2)

    async def main(dispatcher, fleet):
        tasks = [asyncio.ensure_future(dispatcher.generate(request(i), oldest=0)) for i in range(4)]
        await asyncio.sleep(0.01)
        for task in tasks[:3]:
            task.cancel()
        return await asyncio.wait_for(tasks[3], 1)

    assert run([engine], main).prompt.index == 3


@pytest.mark.parametrize("error", [ValueError("too long"), RequestTimedOut("late")])
def test_an_error_of_the_request_itself_is_not_blamed_on_the_engine(error):
    async def main(dispatcher, fleet):
        with pytest.raises(type(error)):
            await dispatcher.generate(request(), oldest=0)
        return fleet.suspected

    assert run([FakeEngine(0, raise_for([0], error))], main) == []


def test_an_engine_that_does_not_answer_long_after_the_deadline_is_suspected(monkeypatch):
    monkeypatch.setattr("dpo_ray.rollout.dispatch.GRACE_S", 0.05)
    hung = FakeEngine(0, lambda _: asyncio.sleep(60))

    async def main(dispatcher, fleet):
        late = Request(prompts(1)[0], SAMPLING, 2, 7, 0.05)
        return await dispatcher.generate(late, oldest=0), fleet.suspected

    group, suspected = run([hung, FakeEngine(0)], main)
    assert group.completions[0].text == "7"
    assert [member for member, _ in suspected] == ["0"]


def test_an_error_of_the_fleet_ends_the_wait():
    async def main(dispatcher, fleet):
        waiting = asyncio.ensure_future(dispatcher.generate(request(), oldest=0))
        await asyncio.sleep(0.05)
        fleet.error = "no engine could be started"
        fleet.change()
        return await waiting

    with pytest.raises(FleetFailed, match="no engine could be started"):
        run([], main)


def test_a_fleet_that_dies_and_restarts_is_followed_again(monkeypatch):
    async def main(dispatcher, fleet):
        await dispatcher.generate(request(), oldest=0)
        failures = iter([ConnectionError("the fleet died")])
        membership = fleet.membership

        async def dying(after, wait_s):
            if error := next(failures, None):
                raise error
            assert after == -1, "a new fleet is asked from the beginning"
            dispatcher._membership = membership
            return await membership(after, wait_s)

        dispatcher._membership = dying
        fleet.change()
        await asyncio.sleep(0)
        return await dispatcher.generate(request(1), oldest=0)

    assert run([FakeEngine(0)], main).prompt.index == 1
    assert Membership(epoch=-1).members == ()
