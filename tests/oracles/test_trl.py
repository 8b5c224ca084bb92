"""Our steps against TRL's DPOTrainer: losses, rewards, log-probabilities and gradient norms, through all steps."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import ragged_texts
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline
from tests.oracles.trl_run import trl_steps

SAME_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
PAIRS, PAIRS_PER_STEP, LR, BETA = 24, 4, 5e-4, 0.1


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_step_is_that_of_trls_trainer(
    ranks: int, tmp_path: Path, tiny_model: Path, write_pairs: Callable[[Sequence[tuple[str, str, str]]], Path]
) -> None:
    file = write_pairs(ragged_texts(PAIRS))
    config = {
        "run": {"dir": str(tmp_path), "save_every": None, "export": False},
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {"train": str(file), "shuffle": False},
        "loss": {"beta": BETA},
        "optim": {"lr": LR, "pairs_per_step": PAIRS_PER_STEP, "tokens_per_micro_batch": 300},
        "cluster": {"train_workers": ranks},
    }
    ours, *_ = run_ranks(ranks, offline, config)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    theirs = trl_steps(tiny_model, records, folder=tmp_path / "trl", pairs_per_step=PAIRS_PER_STEP, lr=LR, beta=BETA)
    assert len(ours) == len(theirs) == PAIRS // PAIRS_PER_STEP
    for mine, other in zip(ours, theirs, strict=True):
        for name in SAME_NAMES:
            assert mine[name] == pytest.approx(float(other[name]), rel=1e-3, abs=1e-4), (mine["step"], name)
        assert mine["optim/grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-3), mine["step"]
        assert mine["optim/lr"] == pytest.approx(float(other["learning_rate"]), rel=1e-6)
    assert ours[-1]["loss"] < 0.65, "the run must have moved away from ln 2 for the comparison to mean something"
