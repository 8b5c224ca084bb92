"""Whole online runs in which random processes are killed, or stopped, at random moments."""

import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.ray.commands import TIMEOUT_S, Commands, lines, pick, wait_until, write_yaml
from tests.ray.test_online_job import PROMPTS, config, ended_rounds

__all__ = ["config"]  # a fixture

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROUNDS = 6
KILLED = ("engine-0", "engine-1", "judge-0", "collector", "fleet", "worker-0")
STOPPED = ("judge-0", "collector")
"""Processes whose hang is noticed within seconds here; others have limits of minutes."""


def victims(seed: int) -> dict[int, tuple[str, signal.Signals]]:
    """For each round but the last the process that gets a signal once it has ended, and the signal."""
    chance = random.Random(seed)
    chosen = {}
    for round in range(ROUNDS - 1):
        stops = chance.random() < 0.3
        chosen[round] = (chance.choice(STOPPED), signal.SIGSTOP) if stops else (chance.choice(KILLED), signal.SIGKILL)
    return chosen


@pytest.mark.parametrize("max_lag", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_with_random_failures_ends_well_with_each_prompt_once_and_each_pair_trained_once(
    joining: Commands, config: dict[str, Any], tmp_path: Path, max_lag: int, seed: int
) -> None:
    name = f"failures-{max_lag}-{seed}"
    config["run"] |= {"name": name, "export": False}
    config["cluster"] |= {"train_workers": 1, "max_restarts": ROUNDS}
    config["online"] |= {"max_lag": max_lag, "judge": {"use": "tests.ray.test_online_job:token_sum", "timeout_s": 5}}
    file, run = write_yaml(tmp_path / "run.yaml", config), tmp_path / f"runs/{name}"

    with joining.start("online", file) as command:
        for rounds, (victim, signal_number) in victims(seed).items():
            wait_until(lambda: len(ended_rounds(run)) > rounds, command)  # noqa: B023
            pids = re.findall(r"pid (\d+)", (run / f"logs/{victim}.log").read_text())
            if pids:
                try:
                    os.kill(int(pids[-1]), signal_number)
                except ProcessLookupError:
                    continue  # it is being replaced
        assert command.wait(timeout=TIMEOUT_S) == 0
    assert not joining.left_over()
    rows = [row for index in range(ROUNDS) for row in lines(run / f"rounds/{index:06d}/pairs.jsonl")]
    assert sorted(row["prompt_index"] for row in rows) == list(range(PROMPTS)), "each prompt once"
    manifests = [json.loads((run / f"rounds/{index:06d}/manifest.json").read_text()) for index in range(ROUNDS)]
    assert all(0 <= index - manifest["policy_version"] <= max_lag for index, manifest in enumerate(manifests))
    steps = lines(run / "metrics.jsonl")
    assert pick(steps, "step") == list(range(1, len(steps) + 1)), "no pair is trained twice"
    assert pick([step for step in steps if "round" in step], "round") == list(range(ROUNDS))
