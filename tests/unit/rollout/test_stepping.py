"""The stepping thread with a core that counts down the steps of each request and notes what happens to it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest

from dpo_ray.rollout.engine import RequestAborted, RequestTimedOut
from dpo_ray.rollout.stepping import Call, EngineFailed, Job, Serving, Stepper

WAIT_S = 10


@dataclass
class Output:
    request_id: str
    finished: bool = True


@dataclass
class CountingCore:
    """Each request is done after its number of steps; a step waits until ``go`` is set."""

    left: dict[str, int] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def step(self) -> list[Output]:
        assert self.go.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        self.events.append(("step", *sorted(self.left)))
        self.left = {request_id: left - 1 for request_id, left in self.left.items()}
        done = [request_id for request_id, left in self.left.items() if left == 0]
        self.left = {request_id: left for request_id, left in self.left.items() if left > 0}
        time.sleep(0.001)
        return [Output(request_id) for request_id in done]

    def abort_request(self, request_ids: list[str]) -> None:
        self.events.append(("abort", *request_ids))
        for request_id in request_ids:
            del self.left[request_id]

    def job(self, steps: int, **settings: Any) -> Job:
        def add(request_id: str) -> None:
            if steps < 0:
                raise ValueError(f"{steps} steps")
            self.left[request_id] = steps
            self.events.append(("add", request_id))

        return Job(add=add, read=lambda output: int(output.request_id), **settings)

    def call(self, name: str, **settings: Any) -> Call:
        return Call(run=lambda: self.events.append(name), **settings)

    def steps_between(self, first: Any, second: Any) -> list[Any]:
        return self.events[self.events.index(first) + 1 : self.events.index(second)]


@pytest.fixture
def core() -> CountingCore:
    return CountingCore()


@pytest.fixture
def stepper(core: CountingCore) -> Iterator[Stepper]:
    stepper = Stepper(core)
    yield stepper
    core.go.set()
    stepper.close(WAIT_S)


def finish(core: CountingCore, *futures: "Future[Any]") -> list[Any]:
    core.go.set()
    return [future.result(WAIT_S) for future in futures]


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def hold(core: CountingCore, stepper: Stepper) -> None:
    """Keep the thread busy until ``go`` is set: what is submitted until then arrives together."""
    stepper.submit(Call(lambda: core.go.wait(WAIT_S)))


def evaluations(job: Job) -> bool:
    return job.pinned


def everything(job: Job) -> bool:
    return True


def test_requests_join_and_leave_while_others_run(core: CountingCore, stepper: Stepper):
    long, short = stepper.submit(core.job(500)), stepper.submit(core.job(2))
    core.go.set()
    assert short.result(WAIT_S) == 2
    late = stepper.submit(core.job(2))
    assert late.result(WAIT_S) == 3
    assert not long.done()
    assert ("step", "1", "3") in core.events
    assert long.result(WAIT_S) == 1


def test_a_rejected_request_harms_no_other(core: CountingCore, stepper: Stepper):
    good, bad, other = (stepper.submit(core.job(steps)) for steps in (3, -1, 3))
    core.go.set()
    with pytest.raises(ValueError, match="-1 steps"):
        bad.result(WAIT_S)
    assert finish(core, good, other) == [1, 3]


def update(core: CountingCore, stepper: Stepper, drains: Callable[[Job], bool]) -> list["Future[Any]"]:
    return [
        stepper.submit(core.call("start", drains=drains, serves=Serving.NONE)),
        stepper.submit(core.call("load")),
        stepper.submit(core.call("finish", serves=Serving.ALL)),
    ]


def test_an_update_that_drains_all_starts_after_the_last_running_request(core: CountingCore, stepper: Stepper):
    hold(core, stepper)
    running = [stepper.submit(core.job(steps)) for steps in (3, 9)]
    update(core, stepper, everything)
    late = stepper.submit(core.job(1))
    finish(core, *running, late)
    assert core.events == [
        ("add", "1"),
        ("add", "2"),
        *[("step", "1", "2")] * 3,
        *[("step", "2")] * 6,
        "start",
        "load",
        "finish",
        ("add", "3"),
        ("step", "3"),
    ]


def test_an_update_that_drains_evaluation_leaves_the_others_between_two_steps(core: CountingCore, stepper: Stepper):
    hold(core, stepper)
    running = [stepper.submit(core.job(9)), stepper.submit(core.job(4, pinned=True))]
    update(core, stepper, evaluations)
    finish(core, *running)
    assert core.events == [
        ("add", "1"),
        ("add", "2"),
        *[("step", "1", "2")] * 4,
        "start",
        "load",
        "finish",
        *[("step", "1")] * 5,
    ]


def test_no_step_is_run_while_an_update_is_unfinished_and_requests_wait(core: CountingCore, stepper: Stepper):
    core.go.set()
    running = stepper.submit(core.job(300))
    stepper.submit(core.call("start", drains=evaluations, serves=Serving.NONE)).result(WAIT_S)
    late = stepper.submit(core.job(1, sequences=4))
    wait_for(lambda: stepper.progress.held == 4)
    steps = len(core.events)
    stepper.submit(core.call("load")).result(WAIT_S)
    time.sleep(0.05)
    assert core.events[steps:] == ["load"]
    stepper.submit(core.call("finish", serves=Serving.ALL)).result(WAIT_S)
    assert finish(core, running, late) == [1, 2]


def test_an_unfinished_update_can_be_started_again(core: CountingCore, stepper: Stepper):
    core.go.set()
    running = stepper.submit(core.job(300))
    for drains in (evaluations, everything):  # the second does not wait: nothing advances until the update is finished
        stepper.submit(core.call("start", drains=drains, serves=Serving.NONE))
        stepper.submit(core.call("load")).result(WAIT_S)
    stepper.submit(core.call("finish", serves=Serving.ALL)).result(WAIT_S)
    assert running.result(WAIT_S) == 1
    assert core.steps_between("start", "finish") == ["load", "start", "load"]


def test_between_update_and_proof_only_proofs_are_added_and_answered(core: CountingCore, stepper: Stepper):
    """The core steps the request in flight too; that is done after the update, and its caller learns of it later."""
    core.go.set()
    running = stepper.submit(core.job(300))
    stepper.submit(core.call("start", drains=evaluations, serves=Serving.NONE)).result(WAIT_S)
    late = stepper.submit(core.job(1, sequences=2))
    core.left["1"] = 2
    stepper.submit(core.call("finish", serves=Serving.PROOFS)).result(WAIT_S)
    assert stepper.submit(core.job(3, proof=True)).result(WAIT_S) == 2
    assert core.events[core.events.index("finish") + 1 :] == [("add", "2"), *[("step", "1", "2")] * 2, ("step", "2")]
    assert not running.done()
    assert stepper.progress.held == 3
    stepper.submit(core.call("serve", serves=Serving.ALL)).result(WAIT_S)
    assert finish(core, running, late) == [1, 3]
    assert core.steps_between("finish", "serve")[-1] == ("step", "2"), "no step without a proof to compute"


def test_an_answer_that_is_withheld_is_lost_at_its_deadline_and_with_the_engine(core: CountingCore, stepper: Stepper):
    core.go.set()
    running = [stepper.submit(core.job(10**6, deadline_s=seconds)) for seconds in (0.5, WAIT_S)]
    stepper.submit(core.call("start", drains=evaluations, serves=Serving.NONE)).result(WAIT_S)
    core.left |= {"1": 1, "2": 1}
    stepper.submit(core.call("finish", serves=Serving.PROOFS)).result(WAIT_S)
    stepper.submit(core.job(2, proof=True)).result(WAIT_S)
    with pytest.raises(RequestTimedOut):
        running[0].result(WAIT_S)
    stepper.close(WAIT_S)
    with pytest.raises(EngineFailed, match="closed"):
        running[1].result(WAIT_S)


def test_a_call_that_fails_raises_for_its_caller_and_the_engine_stays_closed_to_requests(
    core: CountingCore, stepper: Stepper
):
    def fail() -> None:
        raise ValueError("left out 1 parameters")

    core.go.set()
    stepper.submit(core.call("start", serves=Serving.NONE)).result(WAIT_S)
    with pytest.raises(ValueError, match="left out"):
        stepper.submit(Call(fail, serves=Serving.ALL)).result(WAIT_S)
    late = stepper.submit(core.job(1))
    wait_for(lambda: stepper.progress.held == 1)
    assert not late.done()
    stepper.submit(core.call("start", serves=Serving.NONE)).result(WAIT_S)
    stepper.submit(core.call("finish", serves=Serving.ALL)).result(WAIT_S)
    assert late.result(WAIT_S) == 1


def test_a_request_is_aborted_at_its_deadline_and_others_go_on(core: CountingCore, stepper: Stepper):
    core.go.set()
    other, late = stepper.submit(core.job(300)), stepper.submit(core.job(10_000, deadline_s=0.1))
    started = time.monotonic()
    with pytest.raises(RequestTimedOut, match=r"not complete 0\.1 s"):
        late.result(WAIT_S)
    assert 0.05 < time.monotonic() - started < 1
    assert ("abort", "2") in core.events
    assert other.result(WAIT_S) == 1


def test_the_deadline_also_ends_the_wait_for_an_update(core: CountingCore, stepper: Stepper):
    stepper.submit(core.call("start", serves=Serving.NONE)).result(WAIT_S)
    late = stepper.submit(core.job(1, deadline_s=0.05))
    with pytest.raises(RequestTimedOut):
        late.result(WAIT_S)
    wait_for(lambda: stepper.progress.held == 0)
    assert not any(event[0] == "add" for event in core.events)


def test_all_requests_are_aborted_together_and_later_ones_are_answered(core: CountingCore, stepper: Stepper):
    running = stepper.submit(core.job(5000))
    core.go.set()
    wait_for(lambda: ("step", "1") in core.events)
    stepper.submit(core.call("start", drains=everything, serves=Serving.NONE))
    held = stepper.submit(core.job(1))
    stepper.submit(Call(stepper.abort, urgent=True))
    for future in (running, held):
        with pytest.raises(RequestAborted, match="all requests"):
            future.result(WAIT_S)
    assert ("abort", "1") in core.events
    assert (stepper.progress.running, stepper.progress.held) == (0, 0)
    later = stepper.submit(core.job(1))
    stepper.submit(core.call("finish", serves=Serving.ALL))
    assert finish(core, later) == [2]


def test_a_cancelled_request_is_aborted(core: CountingCore, stepper: Stepper):
    abandoned, other = stepper.submit(core.job(10_000)), stepper.submit(core.job(50))
    wait_for(lambda: stepper.progress.running == 2)
    assert abandoned.cancel()
    assert finish(core, other) == [2]
    assert ("abort", "1") in core.events


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("bad shape")], ids=str)
def test_an_exception_of_a_step_ends_all_requests_and_every_later_call(core: CountingCore, error: Exception):
    failures: list[Exception] = []
    stepper = Stepper(core, on_failure=failures.append)
    core.error = error
    waiting = [stepper.submit(core.job(3)), stepper.submit(core.call("start", drains=everything, serves=Serving.NONE))]
    waiting.append(stepper.submit(core.job(3)))
    core.go.set()
    for future in waiting:
        with pytest.raises(EngineFailed, match=f"{type(error).__name__}: {error}"):
            future.result(WAIT_S)
    with pytest.raises(EngineFailed, match=str(error)):
        stepper.submit(core.job(3))
    wait_for(lambda: failures)
    assert failures == [stepper.error]
    assert failures[0].__cause__ is error


def test_a_fatal_exception_of_a_call_ends_the_engine_like_one_of_a_step(core: CountingCore):
    class Dead(Exception): ...

    def fail() -> None:
        raise Dead

    stepper = Stepper(core, fatal=(Dead,))
    with pytest.raises(EngineFailed, match="Dead"):
        stepper.submit(Call(fail)).result(WAIT_S)
    with pytest.raises(EngineFailed, match="Dead"):
        stepper.submit(core.job(1))


def test_progress_is_readable_during_a_step(core: CountingCore, stepper: Stepper):
    running = stepper.submit(core.job(2, sequences=3))
    wait_for(lambda: stepper.progress.step_started is not None)
    time.sleep(0.05)
    progress = stepper.progress
    assert (progress.running, progress.busy_s) == (3, 0)
    assert progress.step_started is not None
    assert time.monotonic() - progress.step_started > 0.04
    finish(core, running)
    wait_for(lambda: stepper.progress.running == 0)
    assert stepper.progress.step_started is None
    assert stepper.progress.busy_s > 0.05


def test_closing_fails_what_waits(core: CountingCore):
    stepper = Stepper(core)
    stepper.submit(core.call("start", serves=Serving.NONE)).result(WAIT_S)
    late = stepper.submit(core.job(1))
    stepper.close(WAIT_S)
    with pytest.raises(EngineFailed, match="closed"):
        late.result(WAIT_S)
