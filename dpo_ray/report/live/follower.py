"""Feeds experiment trackers and rewrites report.html from metrics.jsonl during a run.

The driver starts one process for the trackers of a run, so that their imports, hangs and crashes do not reach it.
There, each tracker has a thread that reads metrics.jsonl at its own pace. ``trackers.json`` in the run directory holds
the id of each tracker's run and the last line sent: restarted workers write lines again, and those are skipped.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dpo_ray.config import Config
from dpo_ray.config.resume import has_work
from dpo_ray.config.secrets import mask_secrets
from dpo_ray.plugins import build, check_arguments, resolve
from dpo_ray.report.live.trackers import TRACKERS, Row, Tracker
from dpo_ray.report.record import read_run
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.storage import error_summary, open_appendable, write_atomically
from dpo_ray.threads import in_background
from dpo_ray.types import Metrics, is_number

logger = logging.getLogger(__name__)

POLL_S, REMOTE_POLL_S = 1.0, 10.0
CLOSE_TIMEOUT_S = 120
"""Longest wait at the end of a run for trackers to send the last lines."""
SAMPLES = 4
"""Pairs per round that trackers get as a table."""
REPORT_INTERVAL_S = 60.0
REPORT_LOAD = 0.05
"""Share of the driver's time that report.html may take: a report that takes longer is written less often."""


class Position(NamedTuple):
    """Position of a line in metrics.jsonl; positions compare in the order of the lines."""

    step: int = -1
    line: int = 0
    """Number of the line within its step, from 1; held-out metrics are on a line of their own."""


class Tail:
    """Reads a metrics.jsonl that grows, and that a resumed run may replace by a shorter one."""

    def __init__(self, file: Path) -> None:
        self.file, self.offset, self.last_line, self.position = file, 0, b"", Position()

    def read(self) -> Iterator[tuple[Position, Metrics]]:
        """Lines since the last call, or all lines after a replacement."""
        try:
            with self.file.open("rb") as file:
                data = self._new_bytes(file)
        except FileNotFoundError:
            return
        for text in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            self.offset, self.last_line = self.offset + len(text), text
            with contextlib.suppress(json.JSONDecodeError):  # a line that a kill truncated
                metrics = json.loads(text)
                line = self.position.line + 1 if metrics["step"] == self.position.step else 1
                self.position = Position(metrics["step"], line)
                yield self.position, metrics

    def _new_bytes(self, file: Any) -> bytes:
        if file.seek(0, os.SEEK_END) >= self.offset:
            file.seek(self.offset - len(self.last_line))
            data = file.read()
            if data.startswith(self.last_line):
                return data[len(self.last_line) :]
        self.offset, self.last_line, self.position = 0, b"", Position()
        file.seek(0)
        return file.read()


class TrackerFeed:
    """Feeds the trackers of a run, each in a thread. An error stops its tracker only, and is reported once."""

    def __init__(self, config: Config, group: str | None, report: Callable[[str], None]) -> None:
        self.config, self.group, self.report, self.failed = config, group, report, True
        self.file, self.lock, self.end = config.run.path / "trackers.json", threading.Lock(), threading.Event()
        self.states: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.threads: dict[str, threading.Thread] = {}
        for name in config.run.trackers:
            self.threads[name] = threading.Thread(target=self._feed, args=(name,), daemon=True)
            self.threads[name].start()

    def close(self, *, failed: bool, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Send remaining metrics, then close all trackers; False if one times out."""
        self.failed, deadline = failed, time.monotonic() + timeout_s
        self.end.set()
        for name, thread in self.threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self.report(f"tracker {name} failed: no answer for {timeout_s:g} s; metrics.jsonl has every step")
        return not any(thread.is_alive() for thread in self.threads.values())

    def _feed(self, name: str) -> None:
        position = Position()
        try:
            tracker, position = self._start(name)
            tail, ended = Tail(self.config.run.path / "metrics.jsonl"), False
            while not ended:
                ended = self.end.wait(REMOTE_POLL_S if self.config.run.remote else POLL_S)
                try:
                    for at, metrics in tail.read():
                        if at > position:
                            self._log(tracker, metrics)
                            position = at
                finally:
                    self._save(name, tracker.id, position)
            tracker.close(failed=self.failed)
        except Exception as error:
            logger.exception(name)
            after = f" after step {position.step}" if position.step >= 0 else ""
            problem = mask_secrets(error_summary(error))
            self.report(f"tracker {name} failed{after}: {problem}; metrics.jsonl has every step")

    def _start(self, name: str) -> tuple[Tracker, Position]:
        run, state = self.config.run, self.states.get(name, {"id": None, "step": -1, "line": 0})
        tracker = build(
            name,
            run.tracker_args.get(name, {}),
            TRACKERS,
            "tracker",
            name=run.name,
            group=self.group,
            folder=None if run.remote else run.path,
            config=mask_secrets(self.config.model_dump(mode="json")),
            id=state["id"],
            next_step=state["step"] + 1,
        )
        self.report(f"{name}: {tracker.location}")
        return tracker, Position(state["step"], state["line"])

    def _save(self, name: str, id: str, position: Position) -> None:
        state = {"id": id, **position._asdict()}
        with self.lock:
            if state != self.states.get(name):
                self.states[name] = state
                write_atomically(self.file, json.dumps(self.states, indent=2) + "\n")

    def _log(self, tracker: Tracker, metrics: Metrics) -> None:
        step, round = metrics["step"], metrics.get("round")
        tracker.log({k: value for k, value in metrics.items() if is_number(value) and k != "step"}, step)
        if round is not None and (rows := _samples(self.config.run.path, round)):
            tracker.log_samples(rows, step)


def _samples(run_dir: Path, round: int) -> list[Row]:
    ledger = Ledger(run_dir)
    if not (ledger.path(round) / "pairs.jsonl").exists():  # online.keep_rounds
        return []
    pairs = ((line, pair) for line in ledger.lines(round) for pair in line["pairs"])
    return [
        {
            "round": round,
            "prompt": "\n".join(str(message["content"]) for message in line["prompt"]),
            **{side: line["candidates"][pair[side]]["text"] for side in ("chosen", "rejected")},
            **{f"{side}_score": pair[f"{side}_score"] for side in ("chosen", "rejected")},
        }
        for line, pair in islice(pairs, SAMPLES)
    ]


def main() -> None:
    """Entry point of the process: reads the settings from stdin, prints messages for the user, ends with the run."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of trackers go to the log
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run = json.loads(sys.stdin.readline())

    def report(text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the driver was killed
            print(text, file=output)

    feed = TrackerFeed(Config.model_validate(run["config"]), run["group"], report)
    finished = sys.stdin.readline()  # empty if the driver failed or was killed
    signal.alarm(CLOSE_TIMEOUT_S + 10)  # ends the process even if its exit handlers hang
    if not feed.close(failed=not finished):
        os._exit(0)


def validate_trackers(config: Config) -> None:
    """Raise a ValueError for a tracker that cannot be imported or does not take its arguments."""
    for name in config.run.trackers:
        check_arguments(resolve(name, TRACKERS, "tracker"), config.run.tracker_args.get(name, {}), name, "tracker")


@contextlib.contextmanager
def follow_run(config: Config, report: Callable[[str], None], *, group: str | None = None) -> Iterator[None]:
    """Feed ``run.trackers`` and rewrite report.html until the block ends; trackers then have every line.

    Args:
        report: prints a sentence for the user.
        group: name of the sweep that the run is a trial of; trials have no report.
    """
    trackers = _trackers(config, report, group) if config.run.trackers else contextlib.nullcontext()
    with trackers, contextlib.nullcontext() if group else _live_report(config.run.path):
        yield


@contextlib.contextmanager
def _trackers(config: Config, report: Callable[[str], None], group: str | None) -> Iterator[None]:
    process = _start_process(config, group)
    relay = threading.Thread(target=lambda: [report(line.rstrip("\n")) for line in process.stdout], daemon=True)
    relay.start()
    finished = ""
    try:
        yield
        finished = "finished\n"
    finally:
        with contextlib.suppress(OSError):  # the process is gone
            process.stdin.write(finished)
            process.stdin.close()
        try:
            process.wait(CLOSE_TIMEOUT_S + 20)
        except subprocess.TimeoutExpired:
            process.kill()
        relay.join(timeout=5)
        if process.wait():
            report(f"the trackers ended with exit code {process.returncode}; see {config.run.path}/logs/trackers.log")


class LiveReport:
    """Keeps the report of a running run or sweep up to date; call ``maybe_write`` after each evaluation or round.

    Args:
        write: writes the report.
    """

    def __init__(self, write: Callable[[], object]) -> None:
        self.write, self.next_write_s, self.failed = write, 0.0, False

    def maybe_write(self, now: float | None = None) -> bool:
        """Write the report unless the last attempt is too recent; returns True if it was written.

        Never raises: the first failure is logged, and later calls try again.
        """
        started = time.monotonic()
        now = started if now is None else now
        if now < self.next_write_s:
            return False
        try:
            self.write()
            return True
        except Exception as error:
            if not self.failed:
                logger.warning("report.html is not up to date: %s", error_summary(error))
            self.failed = True
            return False
        finally:
            self.next_write_s = now + max(REPORT_INTERVAL_S, (time.monotonic() - started) / REPORT_LOAD)


def _live_report(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    def write() -> None:
        from dpo_ray.report.page import write_report  # takes seconds to import, for matplotlib

        write_report(read_run(run_dir, running=True), running=True)

    tail, report = Tail(run_dir / "metrics.jsonl"), LiveReport(write)

    def rewrite(ended: threading.Event) -> None:
        due = False
        while not ended.wait(REMOTE_POLL_S):
            with contextlib.suppress(Exception):  # an unreachable object store is polled again
                due |= any("round" in metrics or "eval/loss" in metrics for _, metrics in tail.read())
            due = due and not report.maybe_write()

    return in_background(rewrite, "report", close_timeout_s=CLOSE_TIMEOUT_S)


def _start_process(config: Config, group: str | None) -> Any:
    run_dir = config.run.path
    if not has_work(run_dir):  # a new run: delete files of an earlier one
        for name in ("trackers.json", "metrics.jsonl"):
            (run_dir / name).unlink(missing_ok=True)
    with open_appendable(run_dir / "logs" / "trackers.log").open("ab") as log:
        process: Any = subprocess.Popen(
            [sys.executable, "-m", "dpo_ray.report.live.follower"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C in a terminal is for the driver
        )
    process.stdin.write(json.dumps({"config": config.model_dump(mode="json"), "group": group}) + "\n")
    process.stdin.flush()
    return process


if __name__ == "__main__":
    main()
