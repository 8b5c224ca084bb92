"""The fleet with fake engines: what happens to an engine, at which moment, and what callers then see."""

import asyncio
import contextlib
import functools
import gc
import itertools
import math
import random
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dpo_ray.rollout import fleet
from dpo_ray.rollout.engine import MessageLost
from dpo_ray.rollout.fleet import ConstructorError
from dpo_ray.rollout.membership import Membership
from dpo_ray.types import EngineLost
from tests.unit.rollout.fake_engines import PROBE, FakeEngine, World, dies, hangs, running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "FIRST_PAUSE_S", 0.01)


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test within 40 s."""

    @functools.wraps(test)
    def wrapped(**arguments: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**arguments), 40))

    return wrapped


def only(name: str, fault: Callable[[FakeEngine], Any]) -> Callable[[FakeEngine], Any]:
    """A fault of one engine."""
    return lambda engine: fault(engine) if engine.name == name else None


def fault(method: str, what: Callable[[], Any]) -> Callable[[FakeEngine], None]:
    """A fault of a method."""
    return lambda engine: engine.faults.update({method: what})


def loses_weights(engine: FakeEngine) -> None:
    """A fault: the last message is not loaded."""
    engine.faults["finish_update"] = lambda: engine.weights.clear()


def failing(error: Exception) -> Callable[[FakeEngine], None]:
    """A fault of the start."""

    def start(engine: FakeEngine) -> None:
        raise error

    return start


# ------------------------------------------------------------------------------------------------- one engine fails

FAULTS: dict[str, tuple[Callable[[FakeEngine], Any], dict[str, float]]] = {
    "dies while it starts": (failing(ConnectionError("died")), {}),
    "its constructor raises": (failing(ConstructorError("no such model")), {}),
    "gets no resources": (lambda engine: hangs(), {"start_timeout_s": 0.3}),
    "dies idle": (fault("status", dies()), {}),
    "does not answer": (fault("status", hangs), {"ping_timeout_s": 0.2}),
    "hangs in a step": (lambda engine: setattr(engine, "step_s", 31.0), {}),
    "dies as an update starts": (fault("start_update", dies()), {}),
    "hangs as an update starts": (fault("start_update", hangs), {"sync_timeout_s": 0.2}),
    "dies while it loads": (fault("load", dies()), {}),
    "hangs while it loads": (fault("load", hangs), {"sync_timeout_s": 0.2}),
    "dies as an update ends": (fault("finish_update", dies()), {}),
    "hangs as an update ends": (fault("finish_update", hangs), {"sync_timeout_s": 0.2}),
    "has other weights": (loses_weights, {}),
    "dies at its probe": (fault("token_logps", dies()), {}),
    "hangs at its probe": (fault("token_logps", hangs), {"sync_timeout_s": 0.2}),
    "dies as it begins to serve": (fault("serve", dies()), {}),
    "hangs as it begins to serve": (fault("serve", hangs), {"sync_timeout_s": 0.2}),
    "does not use its weights": (lambda engine: setattr(engine, "logps", [-1.0, -2.3]), {}),
    "computes no numbers": (lambda engine: setattr(engine, "logps", [math.nan, math.nan]), {}),
}


@pytest.mark.parametrize("case", FAULTS)
@run
async def test_an_engine_that_fails_is_replaced_and_the_others_serve_without_it(case: str) -> None:
    prepare, limits = FAULTS[case]
    world = World(3, only("1.1", prepare), **limits)
    async with running(world):
        await world.up("0.1", "2.1")
        await world.update(1, "a", "b")
        now = await world.serving("0.1", "1.2", "2.1")
        assert now.error is None
        assert not now.needs_weights
        assert {member.digest for member in now.members} == {"ab"}
        assert "1.1" in world.retired
        assert set(world.alive) == {"0.1", "1.2", "2.1"}
        assert world.engines["0.1"].calls.count("start_update") == 1


@pytest.mark.parametrize("what", ["dies", "hangs", "hangs in a step"])
@run
async def test_an_engine_that_serves_and_fails_disappears_at_once_and_its_successor_loads_the_same_weights(
    what: str,
) -> None:
    async with running(World(2, ping_timeout_s=0.2)) as world:
        await world.update(1, "a", "b")
        await world.serving("0.1", "1.1")
        held = asyncio.Event()
        world.prepare = lambda engine: held.wait()
        broken = world.engines["0.1"]
        if what == "hangs in a step":
            broken.step_s = 0.3
        else:
            broken.faults["status"] = dies() if what == "dies" else hangs
        await world.serving("1.1")
        held.set()
        await world.serving("0.2", "1.1")
        assert world.engines["0.2"].weights == ["a", "b"]
        assert world.engines["1.1"].calls.count("load") == 2


@run
async def test_engines_that_load_weights_are_expected_to_serve_and_say_how_much_they_take() -> None:
    held = asyncio.Event()
    async with running(World(2, only("1.1", fault("load", held.wait)))) as world:
        await world.up("0.1", "1.1")
        await world.update(1, "a")
        now = await world.serving("0.1")
        assert now.expected == 2
        held.set()
        now = await world.serving("0.1", "1.1")
        assert now.expected == 2
        assert [member.max_sequences for member in now.members] == [64, 64]


@run
async def test_statuses_are_those_of_the_moment() -> None:
    async with running(World(2, ping_interval_s=3600.0)) as world:
        await world.update(1, "a")
        await world.serving("0.1", "1.1")
        world.engines["1.1"].faults["status"] = dies()
        versions = {name: status.version for name, status in (await world.fleet.statuses()).items()}
        assert versions["0.1"] == 1
        assert set(versions) == {"0.1", "1.1"}, "the last known one of an engine that does not answer"


@run
async def test_a_suspect_that_is_dead_is_gone_when_the_call_returns_and_one_that_answers_stays() -> None:
    async with running(World(2, ping_interval_s=3600.0)) as world:
        await world.update(1, "a")
        now = await world.serving("0.1", "1.1")
        await world.fleet.suspect("0.1", "RuntimeError: a caller lost its connection")
        assert await world.fleet.membership(-1, 0.0) == now
        world.engines["0.1"].faults["status"] = dies()
        await world.fleet.suspect("0.1", "ActorDiedError")
        assert [member.id for member in (await world.fleet.membership(-1, 0.0)).members] == ["1.1"]
        await world.serving("0.2", "1.1")
        await world.fleet.suspect("0.1", "an old engine")
        await world.fleet.suspect("7.9", "an unknown engine")
        assert len((await world.serving("0.2", "1.1")).members) == 2


@run
async def test_callers_that_all_suspect_an_engine_at_once_count_once_and_the_third_time_replaces_it() -> None:
    async with running(World(1, ping_interval_s=3600.0)) as world:
        await world.update(1, "a")
        await world.serving("0.1")
        for _ in range(2):
            await asyncio.gather(*(world.fleet.suspect("0.1", "RuntimeError: CUDA") for _ in range(100)))
        await world.serving("0.1")
        await world.fleet.suspect("0.1", "RuntimeError: CUDA")
        await world.serving("0.2")


@run
async def test_pauses_between_the_starts_of_a_slot_double_and_nobody_waits_for_them() -> None:
    times: list[float] = []

    def prepare(engine: FakeEngine) -> None:
        if engine.name.startswith("1."):
            times.append(time.monotonic())
            raise ConnectionError("no place")

    async with running(World(2, prepare)) as world:
        await world.update(1, "a")
        await world.serving("0.1")
        while len(times) < 6:
            await asyncio.sleep(0.01)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert all(pause >= 0.01 * 2**number for number, pause in enumerate(pauses))


# ------------------------------------------------------------------------------------------------ when the run must end


@run
async def test_constructors_that_all_raise_end_the_run_at_once_with_their_error_and_the_log() -> None:
    async with running(World(3, failing(ConstructorError("no such model: x")))) as world:
        now = await world.until(lambda now: now.error)
    assert now.error is not None
    assert "no such model: x" in now.error
    assert "see engine.log" in now.error


@run
async def test_engines_that_all_die_as_they_start_end_the_run_only_after_the_limit() -> None:
    started = time.monotonic()
    async with running(World(2, failing(ConnectionError("out of memory")), start_timeout_s=0.5)) as world:
        now = await world.until(lambda now: now.error)
    assert time.monotonic() - started >= 0.5
    assert "no engine was up for 0.5 s (cluster.start_timeout_s)" in str(now.error)
    assert "out of memory" in str(now.error)


@pytest.mark.parametrize(
    ("wrong", "both"),
    [
        (lambda engine: engine.faults.update(finish_update=lambda: engine.weights.append("x")), ("abx", "ab")),
        (lambda engine: setattr(engine, "logps", [-2.0, -3.0]), ("differ by 1.0000 nats per token", "accepted is 0.1")),
    ],
    ids=["digest", "probe"],
)
@run
async def test_engines_that_all_fail_the_proof_of_a_version_end_the_run_with_both_values(
    wrong: Callable[[FakeEngine], Any], both: tuple[str, str]
) -> None:
    async with running(World(3, wrong)) as world:
        await world.fleet.started(5.0)
        await world.update(4, "a", "b")
        now = await world.until(lambda now: now.error)
        assert world.starts == {0: 1, 1: 1, 2: 1}
        assert not any(engine.served for engine in world.engines.values()), "wrong weights complete no prompt"
    assert "policy version 4" in str(now.error)
    assert all(value in str(now.error) for value in both)


@run
async def test_a_version_counts_as_failed_also_if_other_engines_do_not_start() -> None:
    def prepare(engine: FakeEngine) -> None:
        if engine.name.startswith("1."):
            raise ConnectionError("no place")
        loses_weights(engine)

    async with running(World(2, prepare)) as world:
        await world.update(1, "a")
        now = await world.until(lambda now: now.error)
    assert "policy version 1" in str(now.error)


@run
async def test_an_engine_that_serves_resets_the_attempts_and_the_pauses_of_its_slot() -> None:
    def prepare(engine: FakeEngine) -> None:
        if int(engine.name.split(".")[1]) % 3:
            engine.faults["load"] = dies()

    async with running(World(1, prepare)) as world:
        await world.update(1, "a")
        for number in (3, 6, 9, 12):
            await world.serving(f"0.{number}")
            started = time.monotonic()
            world.engines[f"0.{number}"].faults["status"] = dies()
        assert (await world.serving("0.15")).error is None
        assert time.monotonic() - started < 0.01 * 2**8  # of pauses of 0.01, 0.02 and 0.04 s


@run
async def test_an_engine_that_is_lost_in_the_moment_of_its_last_answer_does_not_serve() -> None:
    answered = asyncio.Event()

    async def dies_then() -> None:
        await answered.wait()
        raise ConnectionError("the process died")

    def prepare(engine: FakeEngine) -> Any:
        engine.faults = {"token_logps": answered.set, "status": dies_then}
        return None if engine.name == "0.1" else hangs()

    async with running(World(1, prepare)) as world:
        await world.update(1, "a")
        while "0.1" not in world.retired:
            await asyncio.sleep(0)
        assert (await world.fleet.membership(-1, 0.0)).members == ()


@run
async def test_an_engine_that_still_starts_is_waited_for_before_a_version_counts_as_failed() -> None:
    held = asyncio.Event()

    def prepare(engine: FakeEngine) -> Any:
        if engine.name.startswith("1."):
            return held.wait()
        engine.logps = [-2.0, -3.0]
        return None

    async with running(World(2, prepare)) as world:
        await world.update(1, "a")
        await world.up("0.3")
        assert (await world.fleet.membership(-1, 0.0)).error is None
        held.set()
        now = await world.until(lambda now: [member.id for member in now.members] == ["1.1"])
        assert now.error is None


@run
async def test_an_update_that_kills_every_engine_ends_the_run_after_three_attempts_per_slot() -> None:
    async with running(World(2, fault("load", dies()))) as world:
        await world.update(1, "a")
        now = await world.until(lambda now: now.error)
    assert "the process died" in str(now.error)
    assert world.starts[0] <= 4
    assert max(world.starts[0], world.starts[1]) >= 3


# -------------------------------------------------------------------------------------------------------------- updates


@run
async def test_an_update_does_not_wait_for_engines_and_one_that_comes_later_loads_its_messages() -> None:
    held = asyncio.Event()
    async with running(World(3, only("2.1", lambda engine: held.wait()))) as world:
        await world.up("0.1", "1.1")
        assert await world.fleet.begin_update(1, collective=False) == ["0.1", "1.1"]
        await world.fleet.load("a")
        held.set()  # joins in the middle
        await world.up("2.1")
        await world.fleet.load("b")
        await world.fleet.end_update("ab", PROBE)
        now = await world.serving("0.1", "1.1", "2.1")
        assert world.engines["2.1"].weights == ["a", "b"]
        assert now.metrics is not None
        assert now.metrics["sync/probe_difference"] == 0.0
        assert 0 < now.metrics["perf/push_s"] < 5


@run
async def test_members_keep_their_version_while_they_are_updated() -> None:
    async with running(World(2)) as world:
        await world.update(1, "a")
        await world.serving("0.1", "1.1")
        slow = asyncio.Event()
        world.engines["1.1"].faults["finish_update"] = slow.wait
        await world.update(2, "b")
        await world.until(lambda now: [member.version for member in now.members] == [2, 1])
        slow.set()
        await world.serving("0.1", "1.1", version=2)


@run
async def test_an_update_that_is_interrupted_is_superseded_by_the_next_one() -> None:
    async with running(World(2)) as world:
        await world.up("0.1", "1.1")
        slow = asyncio.Event()
        world.engines["1.1"].faults["load"] = slow.wait
        await world.fleet.begin_update(1, collective=False)
        await world.fleet.load("a")
        await asyncio.sleep(0.01)
        await world.update(2, "b", "c")
        await world.until(lambda now: [(m.id, m.version) for m in now.members] == [("0.1", 2)])
        assert world.engines["1.1"].calls.count("start_update") == 1  # until its call in progress is answered
        slow.set()
        await world.serving("0.1", "1.1", version=2)
        assert world.engines["1.1"].weights == ["b", "c"]


@run
async def test_a_sender_that_stays_away_leaves_no_engine_with_half_a_policy() -> None:
    async with running(World(2, sync_timeout_s=0.2)) as world:
        await world.update(1, "a")
        await world.serving("0.1", "1.1")
        await world.fleet.begin_update(2, collective=False)
        await world.fleet.load("b")
        now = await world.until(lambda now: not now.members)
        assert now.needs_weights
        with pytest.raises(EngineLost, match="sent nothing for 0"):
            await world.fleet.load("c")
        await world.update(3, "d")
        now = await world.serving("0.1", "1.1", version=3)
        assert not now.needs_weights


@run
async def test_a_message_whose_owner_died_costs_the_update_and_no_engine() -> None:
    async with running(World(2)) as world:
        await world.update(1, "a")
        await world.serving("0.1", "1.1")
        for engine in world.engines.values():
            engine.faults["load"] = dies(MessageLost)
        world.engines["0.1"].faults["status"] = dies()
        await world.serving("0.2", "1.1")  # a fake of its own: it has no fault
        world.prepare = fault("load", dies(MessageLost))
        world.engines["0.2"].faults["status"] = dies()
        await world.up("0.3")
        now = await world.serving("1.1")
        assert not now.needs_weights
        world.engines["1.1"].faults["status"] = dies()
        now = await world.until(lambda now: now.needs_weights)
        assert now.error is None
        for engine in world.engines.values():
            engine.faults = {}
        world.prepare = lambda engine: None
        await world.up("1.2")
        await world.update(2, "b")
        await world.serving("0.3", "1.2", version=2)


@run
async def test_the_messages_of_a_superseded_update_are_freed() -> None:
    class Message(str):
        pass

    async with running(World(1, lambda engine: hangs())) as world:
        message = Message("a")
        freed = weakref.ref(message)
        await world.update(1, message)
        del message
        gc.collect()
        assert freed() is not None
        await world.fleet.begin_update(2, collective=False)
        gc.collect()
        assert freed() is None


@run
async def test_weights_are_needed_from_the_first_engine_until_an_update_begins() -> None:
    async with running(World(2)) as world:
        await world.until(lambda now: now.needs_weights)
        await world.fleet.begin_update(1, collective=False)
        await world.until(lambda now: not now.needs_weights)


@run
async def test_a_fleet_that_restarted_needs_weights_and_has_no_update_to_continue() -> None:
    async with running(World(2)) as world:
        await world.until(lambda now: now.needs_weights)
        for call in (world.fleet.load("a"), world.fleet.init_transfer([]), world.fleet.end_update("a", PROBE)):
            with pytest.raises(EngineLost, match="restarted"):
                await call
        await world.update(7, "a")
        await world.serving("0.1", "1.1", version=7)


# --------------------------------------------------------------------------------------------------- collective updates


@run
async def test_a_collective_update_passes_each_engine_its_info_and_waits_for_all() -> None:
    world = World(3, only("2.1", failing(ConnectionError("no place"))))
    async with running(world):
        assert await world.update(1, "a", "b", collective=True) == ["0.1", "1.1"]
        assert [member.id for member in (await world.fleet.membership(-1, 0.0)).members] == ["0.1", "1.1"]
        assert [world.engines[name].infos for name in ("0.1", "1.1")] == [[{"rank": 0}], [{"rank": 1}]]


@pytest.mark.parametrize("what", [dies(), hangs], ids=["dies", "hangs"])
@run
async def test_a_collective_update_that_loses_an_engine_goes_through_without_it(what: Callable[[], Any]) -> None:
    async with running(World(3, sync_timeout_s=0.5)) as world:
        await world.up("0.1", "1.1", "2.1")
        world.engines["1.1"].faults["load"] = what
        if what is not hangs:  # the others hang in the transfer until it starts again
            world.engines["0.1"].faults["load"] = hangs
        with pytest.raises(EngineLost, match=r"engine 1\.1 failed"):
            await world.update(1, "a", collective=True)
        world.engines["0.1"].faults = {}
        await world.up("1.2")
        held = asyncio.Event()
        world.engines["1.2"].faults["start_update"] = dies()
        world.prepare = only("1.3", lambda engine: held.wait())
        started = time.monotonic()
        assert await world.update(1, "a", collective=True) == ["0.1", "2.1"]
        assert time.monotonic() - started < 0.4  # not for the answer that 0.1 still owes
        now = await world.serving("0.1", "2.1")
        held.set()
        await world.up("1.3")
        assert await world.fleet.membership(-1, 0.0) == now
        assert world.engines["1.3"].calls.count("start_update") == 0  # left out until the next update
        await world.update(2, "b", collective=True)
        await world.serving("0.1", "1.3", "2.1", version=2)


@run
async def test_survivors_of_a_broken_transfer_may_raise_without_being_replaced() -> None:
    async with running(World(2)) as world:
        await world.up("0.1", "1.1")
        aborted = asyncio.Event()

        async def broken_transfer() -> None:
            await aborted.wait()
            raise RuntimeError("NCCL error: remote process exited")

        world.engines["0.1"].faults["load"] = broken_transfer
        world.engines["1.1"].faults["load"] = dies()
        with pytest.raises(EngineLost):
            await world.update(1, "a", collective=True)
        aborted.set()  # the sender closes its communicator
        await asyncio.sleep(0.01)
        world.engines["0.1"].faults = {}
        await world.update(1, "a", collective=True)
        assert "0.1" not in world.retired


@run
async def test_after_a_collective_update_engines_that_all_died_need_weights() -> None:
    async with running(World(2)) as world:
        await world.up("0.1", "1.1")
        await world.update(1, "a", collective=True)
        for name in ("0.1", "1.1"):
            world.engines[name].faults["status"] = dies()
        await world.up("0.2", "1.2")
        now = await world.until(lambda now: now.needs_weights)
        assert now.members == ()
        await world.update(1, "a", collective=True)
        await world.serving("0.2", "1.2")


@run
async def test_only_the_first_collective_update_waits_for_engines_and_only_while_they_start() -> None:
    held = asyncio.Event()

    def prepare(engine: FakeEngine) -> Any:
        return {"0": lambda: None, "1": held.wait, "2": hangs}[engine.name[0]]()

    async with running(World(3, prepare, start_timeout_s=1.0)) as world:
        await world.up("0.1")
        first = asyncio.create_task(world.update(1, "a", collective=True))
        await asyncio.sleep(0.05)
        held.set()
        assert await first == ["0.1", "1.1"]
        await world.serving("0.1", "1.1")
        started = time.monotonic()
        assert await world.update(2, "a", collective=True) == ["0.1", "1.1"]
        assert time.monotonic() - started < 0.5


@run
async def test_without_an_engine_an_update_that_is_not_collective_ends_at_once() -> None:
    async with running(World(2, lambda engine: hangs())) as world:
        assert await asyncio.wait_for(world.update(1, "a"), 1) == []


@run
async def test_engines_with_half_a_policy_are_replaced_on_demand_and_the_others_stay() -> None:
    async with running(World(2)) as world:
        await world.update(1, "a")
        await world.serving("0.1", "1.1")
        world.engines["1.1"].faults["load"] = hangs
        await world.update(2, "b")
        await world.until(lambda now: (now.members[0].id, now.members[0].version) == ("0.1", 2))
        await world.fleet.replace_unfinished()
        assert world.alive == {"0.1", "1.2"}
        await world.serving("0.1", "1.2", version=2)


@run
async def test_one_engine_with_wrong_weights_after_others_have_proven_them_is_replaced_and_not_the_run() -> None:
    async with running(World(1)) as world:
        await world.update(1, "a")
        await world.serving("0.1")
        world.prepare = only("0.2", loses_weights)
        world.engines["0.1"].faults["status"] = dies()
        now = await world.serving("0.3")
        assert now.error is None


# --------------------------------------------------------------------------------------------------- sleep, stop, scale


@run
async def test_for_another_run_engines_stay_and_serve_nothing_before_its_first_update() -> None:
    async with running(World(2)) as world:
        await world.update(5, "a")
        await world.serving("0.1", "1.1", version=5)
        await world.fleet.reset()
        now = await world.fleet.membership(-1, 0.0)
        assert now.members == ()
        assert now.needs_weights
        assert [engine.calls.count("abort") for engine in world.engines.values()] == [1, 1]
        await world.update(0, "b", collective=True)
        await world.serving("0.1", "1.1", version=0)
        assert world.retired == []


@run
async def test_another_run_ends_the_update_of_the_last_one_and_replaces_engines_that_do_not_abort() -> None:
    held = asyncio.Event()
    async with running(World(2)) as world:
        await world.up("0.1", "1.1")
        world.engines["0.1"].faults["load"] = held.wait
        await world.fleet.begin_update(5, collective=False)
        await world.fleet.load("a")
        await asyncio.sleep(0.01)
        world.engines["1.1"].faults["abort"] = dies()
        await world.fleet.reset()
        held.set()
        with pytest.raises(EngineLost, match="no weight update has begun"):
            await world.fleet.end_update("a", PROBE)
        await world.update(0, "b")
        await world.serving("0.1", "1.2", version=0)
        assert world.engines["0.1"].weights == ["b"]


@run
async def test_a_fleet_that_has_failed_cannot_be_used_for_another_run() -> None:
    async with running(World(1, failing(ConstructorError("no such model: x")))) as world:
        await world.until(lambda now: now.error)
        with pytest.raises(RuntimeError, match="no such model: x"):
            await world.fleet.reset()


@run
async def test_engines_sleep_together_also_one_that_comes_later_and_one_that_dies_is_replaced() -> None:
    held = asyncio.Event()
    async with running(World(3, only("2.1", lambda engine: held.wait()))) as world:
        await world.up("0.1", "1.1")
        world.engines["1.1"].faults["sleep"] = dies()
        await world.fleet.sleep()
        held.set()
        await world.up("1.2", "2.1")
        assert all(world.engines[name].calls.count("sleep") == 1 for name in ("0.1", "1.2", "2.1"))


@run
async def test_a_fleet_runs_again_after_a_stop_with_new_engines() -> None:
    world = World(2)
    async with running(world):
        await world.fleet.started(5.0)
        assert world.alive == {"0.1", "1.1"}
        await world.update(1, "a")
        before = await world.serving("0.1", "1.1")
    assert (await world.fleet.membership(before.epoch, 0.0)).members == ()
    async with running(world):
        await world.serving("0.2", "1.2")


@run
async def test_a_poll_returns_at_once_for_an_old_epoch_and_after_its_wait_for_the_latest() -> None:
    async with running(World(1)) as world:
        await world.update(1, "a")
        now = await world.serving("0.1")
        assert await world.fleet.membership(now.epoch - 1, 60.0) == now
        started = time.monotonic()
        assert await world.fleet.membership(now.epoch, 0.1) == now
        assert 0.1 <= time.monotonic() - started < 1.0
        poll = asyncio.create_task(world.fleet.membership(now.epoch, 60.0))
        await asyncio.sleep(0)
        world.engines["0.1"].faults["status"] = dies()
        assert (await poll).members == ()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("collective", [False, True])
@run
async def test_under_random_failures_no_engine_is_listed_with_weights_that_it_does_not_have(
    seed: int, collective: bool
) -> None:
    chance = random.Random(seed)
    sent: dict[int, str] = {}
    faulty = True

    def answer(engine: FakeEngine, method: str) -> Any:
        async def later() -> None:
            await asyncio.sleep(chance.choice((0, 0, 0.001, 0.003)))
            what = chance.random() if faulty else 1.0
            if what < 0.01:
                engine.dead = True
            elif what < 0.015:
                await hangs()
            elif what < 0.025:
                engine.weights.append("flipped bit")
            if engine.dead:
                raise ConnectionError("died")

        return later()

    def prepare(engine: FakeEngine) -> None:
        if faulty and chance.random() < 0.1:
            raise ConnectionError("died as it started")
        methods = ("status", "start_update", "init_transfer", "load", "finish_update", "token_logps", "serve")
        engine.faults = {method: functools.partial(answer, engine, method) for method in methods}

    def check(now: Membership) -> None:
        assert now.error is None
        for member in now.members:
            engine: Any = member.engine
            assert engine.finished[member.version] == member.digest == sent[member.version]
            assert member.version in engine.served

    async def watch() -> None:
        now = await world.fleet.membership(-1, 0.0)
        while True:
            check(now)
            now = await world.fleet.membership(now.epoch, 60.0)

    limits = {"sync_timeout_s": 0.1, "ping_timeout_s": 0.1, "ping_interval_s": 0.005}
    async with running(World(5, prepare, **limits)) as world:
        watching = asyncio.create_task(watch())
        for version in range(40):
            messages = [f"{version}{letter} " for letter in "abc"[: chance.randint(1, 3)]]
            sent[version] = "".join(messages)
            with contextlib.suppress(EngineLost):
                if chance.random() < 0.2:  # the sender dies
                    await world.fleet.begin_update(version, collective=collective)
                    await world.fleet.load(messages[0])
                else:
                    await world.update(version, *messages, collective=collective)
            await asyncio.sleep(chance.choice((0, 0.01, 0.05)))
        faulty = False
        now = await world.fleet.membership(-1, 0.0)
        while not watching.done():
            sent[version := version + 1] = "last"
            with contextlib.suppress(EngineLost):
                await world.update(version, "last", collective=collective)
            await asyncio.sleep(0.3)
            now = await world.fleet.membership(-1, 0.0)
            if [member.version for member in now.members] == [version] * 5:
                break
        check(now)
        assert not watching.done()
        watching.cancel()


@pytest.mark.slow
@run
async def test_an_update_of_1000_engines_of_which_100_are_replaced_takes_less_than_15_s() -> None:
    async with running(World(1000, ping_interval_s=5.0)) as world:
        started = time.monotonic()
        await world.fleet.started(20.0)
        await world.update(1, *"abcd")
        await world.until(lambda now: len(now.members) == 1000)
        for slot in range(100):
            world.engines[f"{slot}.1"].faults["status"] = dies()
        await asyncio.gather(*(world.fleet.suspect(f"{slot}.1", "died") for slot in range(100)))
        expected = [f"{slot}.{2 if slot < 100 else 1}" for slot in range(1000)]
        await world.until(lambda now: [member.id for member in now.members] == expected)
        await world.update(2, *"abcd", collective=True)
        await world.serving(*expected, version=2)
        elapsed = time.monotonic() - started
    assert elapsed < 15, elapsed
