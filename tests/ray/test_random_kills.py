"""Online runs of which random processes are killed or stopped, against undisturbed ones."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests.ray.commands import Commands, lines, pick, write_yaml
from tests.ray.test_online_job import ended_rounds, tiny_rounds, token_sum

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

ROUNDS, PROMPTS_PER_ROUND, PAIRS_PER_STEP = 5, 4, 2
DISTURBANCES = 3
"""Per run; ten runs have 30."""
PARTS = ("engine-0", "engine-1", "judge-0", "collector", "fleet", "worker-0", "worker-1")
RUN_TIMEOUT_S = 600
POLL_S = 0.002
"""Some moments of a run on the tiny model last for milliseconds."""


def slow_token_sum(groups: list[Any]) -> list[list[float]]:
    """A judge that takes a second, so that a round takes seconds and disturbances meet it."""
    time.sleep(1.0)
    return token_sum(groups)


class Disturbance(NamedTuple):
    """A signal to a part of a run, or to all of its driver's processes."""

    rounds: int
    """Finished rounds before it."""
    delay_s: float
    part: str
    signal_number: int


def disturbances(seed: int) -> list[Disturbance]:
    """Random ones, in the order of their moments."""
    draw = random.Random(seed)
    moments = sorted((draw.randrange(ROUNDS - 1), draw.uniform(0.0, 1.5)) for _ in range(DISTURBANCES))
    signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)
    chosen = []
    for rounds, delay_s in moments:
        part = draw.choice((*PARTS, "driver"))
        # A driver that is stopped goes on when its user says so.
        chosen.append(Disturbance(rounds, delay_s, part, signal.SIGKILL if part == "driver" else draw.choice(signals)))
    return chosen


def processes(run: Path, part: str) -> Iterator[int]:
    """The process of a part that runs at present."""
    with contextlib.suppress(OSError, IndexError, psutil.Error):
        pid = int(re.findall(r"pid (\d+)", (run / f"logs/{part}.log").read_text())[-1])
        if psutil.Process(pid).cmdline()[0].startswith("ray::"):
            yield pid


def disturb(command: subprocess.Popen[bytes], run: Path, disturbance: Disturbance) -> bool:
    """Send the signal; False if the part does not run at present."""
    if disturbance.part == "driver":
        if not (run / "logs").exists():
            return False
        driver = psutil.Process(command.pid)
        for process in (*driver.children(recursive=True), driver):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return True
    with contextlib.suppress(ProcessLookupError):
        for pid in processes(run, disturbance.part):
            os.kill(pid, disturbance.signal_number)
            return True
    return False


def run_to_the_end(commands: Commands, file: Path, disturb_next: Callable[[subprocess.Popen[bytes]], None]) -> None:
    """Run the command to its end, and again wherever its driver is killed; ``disturb_next`` is called all the time."""
    while True:
        with commands.start("online", file) as command:
            deadline = time.monotonic() + RUN_TIMEOUT_S
            try:
                while command.poll() is None:
                    assert time.monotonic() < deadline, f"not done after {RUN_TIMEOUT_S} s"
                    disturb_next(command)
                    time.sleep(POLL_S)
            finally:
                command.kill()
            if command.returncode == 0:
                return
            assert command.returncode == -signal.SIGKILL, f"exit status {command.returncode}"
        # Ray frees the resources of a driver that was killed after it has asked the State API a few times.
        assert not commands.left_over(60)


def run_disturbed(commands: Commands, file: Path, run: Path, events: list[Disturbance]) -> list[Disturbance]:
    """Run the command to its end with disturbances; returns what was sent."""
    remaining, sent = list(events), list[Disturbance]()

    def disturb_next(command: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ValueError):  # a line that is being written
            if remaining and len(ended_rounds(run)) >= remaining[0].rounds:
                time.sleep(remaining[0].delay_s)
                if disturb(command, run, remaining[0]):
                    sent.append(remaining.pop(0))

    run_to_the_end(commands, file, disturb_next)
    return sent


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """Five rounds of four prompts, in which everything that hangs is found within seconds."""
    tree = tiny_rounds(tmp_path_factory.mktemp("data"), tiny_model)
    tree["run"] |= {"export": False}
    tree["model"] |= {"dtype": "float32"}  # in bfloat16, sampling depends on which requests share a batch
    tree["cluster"] |= {"max_restarts": 10, "worker_timeout_s": 20}
    judge = {"use": "tests.ray.test_random_kills:slow_token_sum", "timeout_s": 5}
    tree["online"] |= {"rounds": ROUNDS, "judge": judge, "engine_timeout_s": 10, "sync_timeout_s": 60}
    return tree


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], shared_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at lag 0 that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = settings | {"run": settings["run"] | {"dir": str(folder), "name": "run"}}
    done = Commands(shared_cluster).run("online", write_yaml(folder / "run.yaml", settings))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def rounds_of(run: Path) -> list[list[dict[str, Any]]]:
    """The rows of each round by prompt, without their place: groups are written in the order in which they finish."""
    rounds = [lines(run / f"rounds/{index:06d}/pairs.jsonl") for index in range(ROUNDS)]
    without_place = [[{k: v for k, v in row.items() if k != "tokens"} for row in rows] for rows in rounds]
    return [sorted(rows, key=lambda row: row["prompt_index"]) for rows in without_place]


@pytest.mark.parametrize("seed", range(10))
def test_a_run_with_three_random_kills_or_hangs_ends_with_each_prompt_once_and_no_pair_trained_twice(
    joining: Commands,
    settings: dict[str, Any],
    undisturbed: Path,
    tmp_path: Path,
    seed: int,
) -> None:
    lag = seed % 3
    settings = settings | {
        "run": settings["run"] | {"dir": str(tmp_path), "name": "run"},
        "online": settings["online"] | {"max_lag": lag},
    }
    run = tmp_path / "run"
    sent = run_disturbed(joining, write_yaml(tmp_path / "run.yaml", settings), run, disturbances(seed))
    print(f"lag {lag}, sent {sent}")
    assert len(sent) == DISTURBANCES
    assert not joining.left_over()

    rounds = rounds_of(run)
    assert [len(rows) for rows in rounds] == [PROMPTS_PER_ROUND] * ROUNDS
    assert len({row["prompt_index"] for rows in rounds for row in rows}) == ROUNDS * PROMPTS_PER_ROUND
    for index, rows in enumerate(rounds):
        manifest = json.loads((run / f"rounds/{index:06d}/manifest.json").read_text())
        assert 0 <= index - manifest["policy_version"] <= lag
        assert not [row["error"] for row in rows if row["error"]]
    steps = lines(run / "metrics.jsonl")
    assert pick(steps, "step") == list(range(1, ROUNDS * PROMPTS_PER_ROUND // PAIRS_PER_STEP + 1)), "no pair again"
    assert pick(ended_rounds(run), "round") == list(range(ROUNDS))
    if lag == 0:
        assert rounds == rounds_of(undisturbed)
        losses = pick(lines(undisturbed / "metrics.jsonl"), "loss")
        assert pick(steps, "loss") == pytest.approx(losses, abs=1e-4)
