"""The thread that feeds requests to the engine and steps it; weight updates happen between two steps.

Independent of vLLM, of asyncio and of the contents of requests.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

from dpo_ray.rollout.engine import RequestAborted, RequestTimedOut


class EngineFailed(RuntimeError):
    """The engine cannot be used any more."""


class Serving(Enum):
    """The jobs that are taken, stepped and answered; the others wait."""

    ALL = auto()
    PROOFS = auto()
    """Jobs with ``proof``. The core steps others that it has, too; their results are withheld."""
    NONE = auto()
    """No job; no steps are run."""


class Core(Protocol):
    """The part of vLLM's ``LLMEngine`` that the thread uses itself."""

    def step(self) -> Sequence[Any]:
        """Run one step; returns outputs with ``request_id`` and ``finished``."""
        ...

    def abort_request(self, request_ids: list[str]) -> None:
        """Remove requests."""
        ...


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the engine."""

    add: Callable[[str], Any]
    """Adds the request to the core under an id; raises ValueError if the core rejects it."""
    read: Callable[[Any], Any]
    """Converts the core's last output of the request to the result."""
    sequences: int = 1
    pinned: bool = False
    """True if no weight update may happen while the request runs."""
    proof: bool = False
    """True for a request that shows whether the engine may serve."""
    deadline_s: float = float("inf")
    """Seconds from the arrival after which the request is aborted."""
    arrived: float = field(default_factory=time.monotonic)
    future: "Future[Any]" = field(default_factory=Future)

    def seconds_left(self, now: float) -> float:
        """Seconds until the deadline."""
        return self.arrived + self.deadline_s - now


@dataclass(slots=True, eq=False)
class Call:
    """A function to run between two steps, after all earlier calls."""

    run: Callable[[], Any]
    drains: Callable[[Job], bool] = lambda job: False
    """Running jobs to wait for."""
    urgent: bool = False
    """True for a call that overtakes those that wait."""
    serves: Serving | None = None
    """The jobs that are served if the call succeeds; NONE also if it fails, and later jobs wait from its arrival. None:
    no change."""
    future: "Future[Any]" = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Progress:
    """A consistent snapshot of the thread's work."""

    held: int = 0
    """Sequences that wait for the engine to serve them."""
    running: int = 0
    """Sequences that the core has, running or waiting."""
    busy_s: float = 0.0
    """Seconds spent in steps."""
    step_started: float | None = None
    """``time.monotonic()`` at the start of the step in progress; None between steps."""


class Stepper:
    """Owns a core and the only thread that uses it. The methods may be called from any thread.

    Args:
        fatal: exceptions of calls that end the thread; an exception of a step always does.
        on_failure: called on the thread with the exception that ends it, after all waiting futures got it.
    """

    def __init__(
        self,
        core: Core,
        *,
        fatal: tuple[type[Exception], ...] = (),
        on_failure: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.core, self.fatal, self.on_failure = core, fatal, on_failure
        self.progress = Progress()
        self.error: Exception | None = None
        """Why the thread has ended."""
        self._inbox: queue.SimpleQueue[Job | Call | None] = queue.SimpleQueue()
        self._calls: deque[Call] = deque()
        self._held: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._withheld: list[tuple[Job, Any]] = []
        """Finished jobs and their outputs."""
        self._serving = Serving.ALL
        self._ids = 0
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)
        self._thread.start()

    def submit(self, work: Job | Call) -> "Future[Any]":
        """Queue a job or a call; its future gets the result. Cancelling the future of a job aborts the job.

        Raises:
            EngineFailed: the thread has ended.
        """
        if self.error is not None:
            raise self.error
        self._inbox.put(work)
        if self.error is not None:  # the thread may have ended without seeing it
            _fail([work], self.error)
        return work.future

    def abort(self) -> None:
        """Abort all jobs that have arrived. To be run by a call."""
        self._abort(self._jobs(), lambda job: RequestAborted("aborted with all requests of this engine"))

    def close(self, timeout_s: float) -> None:
        """End the thread after the step in progress; waiting futures get an EngineFailed."""
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._receive():
                self._expire()
                self._run_calls()
                if self._stepping:
                    self._step()
                self._report(None)
        except BaseException as error:
            # Wrapped, because a ValueError would seem to concern the request that gets it.
            failure = EngineFailed(f"the engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._end(failure)
            self.on_failure(failure)
        else:
            self._end(EngineFailed("the engine is closed"))

    def _end(self, error: Exception) -> None:
        self.error = error
        left: list[Job | Call] = [*self._jobs(), *self._calls]
        with contextlib.suppress(queue.Empty):
            while True:
                work = self._inbox.get_nowait()
                left += [work] if work is not None else []
        _fail(left, error)

    @property
    def _stepping(self) -> bool:
        return any(map(self._served, self._running.values()))

    def _served(self, job: Job) -> bool:
        return self._serving is Serving.ALL or (self._serving is Serving.PROOFS and job.proof)

    def _receive(self) -> bool:
        """Take the work that has arrived; if idle, wait for work or a deadline. Returns False if closed."""
        wait = not self._stepping and not self._calls
        with contextlib.suppress(queue.Empty):
            while (work := self._inbox.get(wait, self._idle_s() if wait else None)) is not None:
                self._take(work)
                wait = False
            return False
        return True

    def _take(self, work: Job | Call) -> None:
        if isinstance(work, Call):
            (self._calls.appendleft if work.urgent else self._calls.append)(work)
        elif self._served(work) and not any(call.serves is Serving.NONE for call in self._calls):
            self._add(work)
        else:
            self._held.append(work)

    def _idle_s(self) -> float | None:
        """Seconds to the next deadline."""
        now = time.monotonic()
        left = min((job.seconds_left(now) for job in self._jobs()), default=float("inf"))
        return None if left == float("inf") else max(left, 0.0)

    def _jobs(self) -> list[Job]:
        return [*self._running.values(), *self._held, *(job for job, _ in self._withheld)]

    def _add(self, job: Job) -> None:
        self._ids += 1
        request_id = str(self._ids)
        try:
            job.add(request_id)
        except BaseException as error:
            _set_exception(job.future, error)
            if not isinstance(error, ValueError):
                raise
        else:
            self._running[request_id] = job

    def _expire(self) -> None:
        """Abort jobs whose deadline has passed or whose caller has gone."""
        now = time.monotonic()
        gone = [job for job in self._jobs() if job.future.cancelled() or job.seconds_left(now) <= 0]
        if gone:
            self._abort(gone, lambda job: RequestTimedOut(f"not complete {job.deadline_s:g} s after its arrival"))

    def _abort(self, jobs: Iterable[Job], error_of: Callable[[Job], Exception]) -> None:
        gone = set(jobs)
        self.core.abort_request([request_id for request_id, job in self._running.items() if job in gone])
        self._running = {request_id: job for request_id, job in self._running.items() if job not in gone}
        self._held = deque(job for job in self._held if job not in gone)
        self._withheld = [(job, output) for job, output in self._withheld if job not in gone]
        self._report(None)
        for job in gone:
            _set_exception(job.future, error_of(job))

    def _run_calls(self) -> None:
        """Run calls in order, up to one that waits for running jobs."""
        while self._calls:
            call = self._calls[0]
            # Jobs that are not served do not advance: they were drained before, or wait with their state.
            if any(self._served(job) and call.drains(job) for job in self._running.values()):
                return
            if call.serves is Serving.NONE:
                self._serving = Serving.NONE
            self._run_call(call)
            self._calls.popleft()

    def _run_call(self, call: Call) -> None:
        try:
            result = call.run()
        except self.fatal:
            raise
        except Exception as error:
            _set_exception(call.future, error)
            return
        if call.serves is not None:
            self._serve(call.serves)
        _set_result(call.future, result)

    def _serve(self, serving: Serving) -> None:
        self._serving = serving
        waiting, self._held = self._held, deque()
        for job in waiting:
            self._take(job)
        self._answer_finished()

    def _step(self) -> None:
        started = time.monotonic()
        self._report(started)
        outputs = self.core.step()
        self._busy_s += time.monotonic() - started
        done = [(self._running.pop(output.request_id), output) for output in outputs if output.finished]
        self._withheld += done
        self._answer_finished()

    def _answer_finished(self) -> None:
        answered = [(job, output) for job, output in self._withheld if self._served(job)]
        self._withheld = [(job, output) for job, output in self._withheld if not self._served(job)]
        self._report(None)  # before a caller learns of its result
        for job, output in answered:
            _read(job, output)

    def _report(self, step_started: float | None) -> None:
        running = sum(job.sequences for job in self._running.values())
        self.progress = Progress(
            held=sum(job.sequences for job in self._jobs()) - running,
            running=running,
            busy_s=self._busy_s,
            step_started=step_started,
        )


def _read(job: Job, output: Any) -> None:
    try:
        result = job.read(output)
    except Exception as error:
        _set_exception(job.future, error)
    else:
        _set_result(job.future, result)


def _fail(works: Iterable[Job | Call], error: BaseException) -> None:
    for work in works:
        _set_exception(work.future, error)


def _set_exception(future: "Future[Any]", error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled by the caller
        future.set_exception(error)


def _set_result(future: "Future[Any]", result: Any) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_result(result)
