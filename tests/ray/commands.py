"""Run the project's commands as a person does, and look at what they leave behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


def environment() -> dict[str, str]:
    """The environment of a command, without an enclosing cluster."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}


def run_command(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m jobs.JOB ...`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def start_command(job: str, *arguments: str, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """``python -m jobs.JOB ...``, left running."""
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr, preexec_fn=heed_ctrl_c
    )


def heed_ctrl_c() -> None:
    """Undo what a shell does to what it runs in the background: there Ctrl-C is ignored, and so it is by children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Poll ``ready`` while the process runs."""
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert process.poll() is None, f"the command ended with {process.returncode} before its time"
        assert time.monotonic() < deadline, "what the test waits for never happened"
        time.sleep(0.1)


def kill_when(job: str, *arguments: str, ready: Callable[[], bool], signal_number: int = signal.SIGKILL) -> int:
    """Start a command, wait until ``ready``, and send a signal to it; SIGKILL goes to its whole tree at once.

    Returns:
        The exit status.
    """
    with start_command(job, *arguments) as process:
        wait_until(ready, process)
        tree = [process.pid]
        if signal_number == signal.SIGKILL:
            tree += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)
        return process.wait(timeout=90)


def ray_processes() -> set[int]:
    """Processes of Ray clusters on this machine."""
    found = set()
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["status"] != psutil.STATUS_ZOMBIE and (
            "ray::" in line or "/raylet/" in line or "gcs_server" in line
        ):
            found.add(process.info["pid"])
    return found


def left_over(before: set[int], patience_s: float = 15) -> set[int]:
    """Ray processes that were not there before; those on their way out get a moment."""
    deadline = time.monotonic() + patience_s
    while (left := ray_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.3)
    return left


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_yaml(path: Path, tree: dict[str, Any]) -> Path:
    """Write a configuration; JSON is YAML."""
    path.write_text(json.dumps(tree))
    return path


def pick(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """One key of the rows that have it."""
    return [row[key] for row in rows if key in row]
