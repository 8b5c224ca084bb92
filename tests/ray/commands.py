"""Run the project's commands as a person does, and find the processes that they leave behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300
MARK = "DPO_RAY_TESTS_STARTED_BY"
"""Environment variable that every process of a test's commands inherits."""
CLUSTER_SERVICES = {
    "ray::IDLE",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "ray::TrainStateActor",
    "ray::_AutoscalingCoordinatorActor",
}
"""Titles of workers that a cluster keeps between jobs."""


def clean_environment() -> dict[str, str]:
    """The environment without an enclosing cluster; process titles leave the environment of a process readable."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"OMP_NUM_THREADS": "1", "SPT_NOENV": "1"}


@dataclass(frozen=True)
class SharedCluster:
    """A cluster that commands join."""

    pid: int
    environment: Mapping[str, str]
    """Variables with which a command joins it."""
    store: Mapping[str, str]
    """Variables of the object store that its workers know; nothing is served there by itself."""

    def busy_workers(self) -> set[int]:
        """Workers of jobs, by process id."""
        workers = set()
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = process.cmdline()[0].rstrip() if process.cmdline() else ""
                if title.startswith("ray::") and title not in CLUSTER_SERVICES:
                    workers.add(process.pid)
        return workers


class Commands:
    """Starts ``python -m jobs.JOB ...``, on a shared cluster or on one that the command starts for itself."""

    def __init__(self, cluster: SharedCluster | None = None) -> None:
        self.cluster, self.mark = cluster, uuid.uuid4().hex
        self.environment = clean_environment() | {MARK: self.mark} | dict(cluster.environment if cluster else {})

    def run(self, job: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command until it exits."""
        return subprocess.run(
            [sys.executable, "-m", f"jobs.{job}", *map(str, arguments)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def start(self, job: str, *arguments: str | Path, stderr: int | None = None) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own, as a shell does."""
        return subprocess.Popen(
            [sys.executable, "-m", f"jobs.{job}", *map(str, arguments)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=heed_ctrl_c,
            process_group=0,
        )

    def kill_when(
        self,
        job: str,
        *arguments: str | Path,
        ready: Callable[[], bool],
        signal_number: int = signal.SIGKILL,
    ) -> int:
        """Start a command, wait until ``ready``, and send it a signal; SIGKILL goes to its whole tree at once.

        Returns:
            The exit status.
        """
        with self.start(job, *arguments) as process:
            wait_until(ready, process)
            tree = [process.pid]
            if signal_number == signal.SIGKILL:
                tree += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
            return process.wait(timeout=90)

    def left_over(self, patience_s: float = 15) -> set[str]:
        """Processes that the commands left behind; those on their way out get a moment."""
        deadline = time.monotonic() + patience_s
        while (left := self._running()) and time.monotonic() < deadline:
            time.sleep(0.3)
        return {f"{pid} {_title(pid)}" for pid in left}

    def _running(self) -> set[int]:
        marked = {process.pid for process in psutil.process_iter() if _mark(process) == self.mark}
        return marked | (self.cluster.busy_workers() if self.cluster else set())


def _mark(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK)
    except psutil.Error:
        return None


def _title(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline()).rstrip()
    return ""


def heed_ctrl_c() -> None:
    """Restore Ctrl-C, which a shell disables for background processes and their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Poll ``ready`` while the process runs."""
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert process.poll() is None, f"the command exited early with status {process.returncode}"
        assert time.monotonic() < deadline, f"not ready after {TIMEOUT_S} s"
        time.sleep(0.1)


def lines(file: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_yaml(path: Path, tree: dict[str, Any]) -> Path:
    """Write a configuration; JSON is YAML."""
    path.write_text(json.dumps(tree))
    return path


def pick(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """Values of one key, from the rows that have it."""
    return [row[key] for row in rows if key in row]
