"""The commands answer a wrong configuration at once: exit code 2, the key, what is accepted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHIN_S = 3.0
CONFIGS = {"online": "jobs/demo.yaml", "offline": "jobs/offline_demo.yaml"}


def command(job: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The finished command and its processor time, which other work on the machine does not lengthen."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    after = os.times()
    return done, sum(after[2:4]) - sum(before[2:4])


@pytest.mark.parametrize(
    ("job", "override", "said"),
    [
        ("online", "optim.lrr=1e-6", ["optim.lrr", "optim.lr"]),
        ("online", "online.rounds=0", ["online.rounds", "greater than or equal to 1"]),
        ("online", "model.dtype=fp8", ["model.dtype", "bfloat16"]),
        ("offline", "shard.replicate=3", ["shard.replicate", "cluster.train_workers"]),
        ("offline", "loss.use=sigmod", ["loss.use", "did you mean 'sigmoid'", "hinge"]),
        ("online", "online.judge.use=lenght", ["online.judge.use", "did you mean 'length'"]),
        ("online", "online.judge.args={words: 3}", ["judge 'sentiment' takes no argument 'words'"]),
        ("online", "online.select.args={gap: 1}", ["selector 'best_vs_worst' takes no argument 'gap'", "min_gap"]),
        ("offline", "data.train=pairs.jsonl", ["data.train", "pairs.jsonl", "no such file"]),
        ("online", "online.prompts=./prompts", ["online.prompts", "./prompts", "no such file"]),
        ("offline", "model.path=../nowhere", ["model.path", "../nowhere", "hub id"]),
        ("offline", "data.train=[]", ["data.train is empty", "preference pairs"]),
        ("online", "online=null", ["online is empty", "needs an online section"]),
        ("online", "run.epochs=3", ["run.epochs: found 3.0, which would be ignored", "online.epochs_per_round"]),
        ("offline", "online.prompts=jobs/data/demo_prompts.jsonl", ["online: found a section", "dpo-ray online"]),
        (
            "online",
            "online.sampling.temperature=0",
            ["online.sampling.temperature is 0", "online.candidates", "above 0"],
        ),
    ],
)
def test_a_wrong_key_or_value_ends_the_command_in_under_three_seconds(job: str, override: str, said: list[str]) -> None:
    done, seconds = command(job, CONFIGS[job], override)
    assert done.returncode == 2
    assert all(words in done.stderr for words in said), done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < WITHIN_S


def test_the_error_names_a_missing_file() -> None:
    done, _ = command("online", "jobs/nothing.yaml")
    assert done.returncode == 2
    assert "jobs/nothing.yaml" in done.stderr


@pytest.mark.parametrize("job", ["online", "offline", "sweep"])
def test_help_lists_every_key_with_type_default_and_meaning(job: str) -> None:
    done, _ = command(job, "--help")
    assert done.returncode == 0
    assert "loss.beta: float (> 0) = 0.1" in done.stdout
    assert "online.prompts_per_round" in done.stdout
    assert f"dpo-ray {job} CONFIG.yaml" in done.stdout


def test_a_misspelt_search_space_fails_fast_and_lists_the_available_ones() -> None:
    done, seconds = command("sweep", "jobs/offline_demo.yaml", "beta_rl")
    assert done.returncode == 2
    assert "no search space is called 'beta_rl'; accepted are beta_lr" in done.stderr, done.stderr
    assert seconds < WITHIN_S
