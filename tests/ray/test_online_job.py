"""``jobs.online`` as a command: real engines, judge, sync and training workers, and a kill in the middle."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.ray.commands import (
    TIMEOUT_S,
    kill_when,
    left_over,
    lines,
    pick,
    ray_processes,
    run_command,
    start_command,
    wait_until,
    write_yaml,
)

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

PROMPTS = 24


def token_sum(groups: list[Any]) -> list[list[float]]:
    """A judge without taste, whose scores are hardly ever equal."""
    return [[float(sum(completion.token_ids) % 997) for completion in group.completions] for group in groups]


def refuses(groups: list[Any]) -> list[list[float]]:
    """A judge that fails."""
    raise RuntimeError("the judge's own words")


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """Six rounds of four prompts on the tiny model: two workers, two engines."""
    prompts = [{"prompt": [{"role": "user", "content": f"say something about {i}"}]} for i in range(PROMPTS + 4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts[:PROMPTS]))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts[PROMPTS:]))
    return {
        "run": {"dir": str(tmp_path / "runs"), "name": "rounds", "save_every": 1, "eval_every": None},
        "model": {"path": str(tiny_model)},
        "data": {"max_prompt_tokens": 128},
        "optim": {"lr": 1e-3, "pairs_per_step": 2, "schedule": "constant"},
        "shard": {"reshard_after_forward": False},
        "cluster": {"train_workers": 2, "rollout_engines": 2},
        "online": {
            "prompts": str(tmp_path / "prompts.jsonl"),
            "eval_prompts": str(tmp_path / "held_out.jsonl"),
            "rounds": 6,
            "prompts_per_round": 4,
            "candidates": 3,
            "sampling": {"max_tokens": 16},
            "engine": {"kv_cache_gib": 0.1},
            "judge": {"use": "tests.ray.test_online_job:token_sum"},
            "sync": {"args": {"bucket_mib": 1}},
        },
    }


def test_a_run_killed_in_round_three_and_robbed_of_an_engine_in_round_four_repeats_no_finished_round_and_ends_well(
    config: dict[str, Any], tmp_path: Path
) -> None:
    file, run = str(write_yaml(tmp_path / "run.yaml", config)), tmp_path / "runs/rounds"
    before = ray_processes()
    kill_when("online", file, ready=lambda: (run / "rounds/000003/manifest.json").exists())
    assert not left_over(before)
    finished = {path: path.stat().st_mtime_ns for path in run.glob("rounds/00000[012]/pairs.jsonl")}
    assert len(finished) == 3

    def kill_an_engine() -> bool:
        if not (run / "rounds/000004/manifest.json").exists():
            return False
        os.kill(int(re.findall(r"pid (\d+)", (run / "logs/engine-0.log").read_text())[-1]), signal.SIGKILL)
        return True

    # Taking turns on cards changes nothing but when engines sleep.
    with start_command("online", file, "cluster.colocate=true") as command:
        wait_until(kill_an_engine, command)
        assert command.wait(timeout=TIMEOUT_S) == 0
    assert "engine 0 died; starting another" in (run / "logs/coordinator.log").read_text()
    assert not left_over(before)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert "resuming after round" in (run / "logs/worker-0.log").read_text()

    for index in range(6):
        rows = lines(run / f"rounds/{index:06d}/pairs.jsonl")
        assert len({row["prompt_index"] for row in rows}) == len(rows) == 4
        manifest = json.loads((run / f"rounds/{index:06d}/manifest.json").read_text())
        assert manifest["counts"]["candidates"] == 12
        assert manifest["policy_version"] == index, "max_lag 0: each round is written by the policy it trains"
    held = [row["prompt_index"] for i in range(6) for row in lines(run / f"rounds/{i:06d}/pairs.jsonl")]
    assert sorted(held) == list(range(PROMPTS)), "six rounds of four are one pass over the prompts"

    steps = lines(run / "metrics.jsonl")
    assert pick(steps, "step") == list(range(1, len(steps) + 1)), "each step is on record once"
    ended = [step for step in steps if "round" in step]
    assert pick(ended, "round") == [0, 1, 2, 3, 4, 5]
    assert pick(ended, "policy_lag") == [0] * 6
    assert all(step["sync/probe_difference"] < 0.1 for step in ended)
    assert ended[0]["kl"] == pytest.approx(0.0, abs=0.05), "the untrained policy is the reference"
    assert {path.name for path in run.glob("evaluations/*")} == {"000000.jsonl", "000006.jsonl"}
    assert (run / "report.html").exists()


def test_ctrl_c_leaves_no_process_and_a_failing_judge_ends_the_run_with_its_words(
    config: dict[str, Any], tmp_path: Path
) -> None:
    before = ray_processes()
    config["cluster"] = {"train_workers": 1, "rollout_engines": 1}
    config["online"]["judge"] = {"use": "tests.ray.test_online_job:refuses"}
    file = str(write_yaml(tmp_path / "run.yaml", config))
    done = run_command("online", file)
    assert done.returncode == 1
    assert "the judge's own words" in done.stderr, done.stderr
    assert "logs" in done.stderr
    assert not left_over(before)
    logs = tmp_path / "runs/again/logs/engine-0.log"
    status = kill_when("online", file, "run.name=again", ready=logs.exists, signal_number=signal.SIGINT)
    assert status == 130, "nothing was trained yet, so that it need not wait for engines and judge"
    assert not left_over(before)
