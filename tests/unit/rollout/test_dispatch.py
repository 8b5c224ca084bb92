"""Requests to engines: recent enough policies, the least busy engine, another one when it fails."""

import asyncio
from collections import Counter

import pytest

from dpo_ray.rollout.dispatch import Dispatcher, EngineError, FleetFailed, VersionGone
from dpo_ray.rollout.engine import Request, RequestTimedOut
from dpo_ray.rollout.membership import Membership
from tests.unit.rollout.fakes import FakeEngine, FakeFleet, online, prompts, raise_for

SAMPLING = online().sampling


def request(index=0):
    return Request(prompts(index + 1)[index], SAMPLING, 2, 7, 60.0)


def run(fleet_of, main):
    """Run ``main(dispatcher, fleet)`` beside a dispatcher that follows the fleet."""

    async def whole():
        fleet = FakeFleet(*fleet_of)
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


def test_a_prompt_that_kills_three_engines_fails():
    engines = [FakeEngine(0, raise_for([0], ConnectionError("died"))) for _ in range(4)]

    async def main(dispatcher, fleet):
        with pytest.raises(EngineError, match="3 engines failed over prompt 0: ConnectionError: died"):
            await dispatcher.generate(request(), oldest=0)
        return await dispatcher.generate(request(1), oldest=0)

    assert run(engines, main).prompt.index == 1


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
