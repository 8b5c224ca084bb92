"""Ranks that share the tokens of each row, over gloo: every number is that of a run on one rank."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ragged_texts
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline

COMPARED = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "optim/grad_norm")


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, write_pairs: Callable[[Sequence[tuple[str, str, str]]], Path]) -> Any:
    """Three steps of three pairs, of which one is much longer than the others, on float32."""
    texts = ragged_texts(8)
    texts[4] = (texts[4][0] * 9, texts[4][1] * 3, texts[4][2])
    return {
        "run": {"dir": str(tmp_path), "name": "run", "save_every": None, "export": False},
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "reference": {"cache_dir": str(tmp_path / "cache"), "kind": "live"},
        "data": {"train": str(write_pairs(texts))},
        "optim": {"lr": 1e-3, "pairs_per_step": 3, "tokens_per_micro_batch": 256, "schedule": "constant"},
        "cluster": {"train_workers": 1},
    }


def assert_steps_of_one_rank(config: dict[str, Any], ranks: int, shard: dict[str, Any]) -> None:
    (alone,) = run_ranks(1, offline, config)
    shared = run_ranks(ranks, offline, config | {"shard": shard, "cluster": {"train_workers": ranks}})
    assert [line["step"] for line in alone] == [1, 2, 3]
    for rank in shared:
        for expected, found in zip(alone, rank, strict=True):
            for key in COMPARED:
                assert found[key] == pytest.approx(expected[key], abs=1e-4, rel=1e-4), (expected["step"], key)


def test_two_ranks_that_share_rows_report_the_steps_of_one(config: dict[str, Any]) -> None:
    assert_steps_of_one_rank(config, 2, {"context_parallel": 2})


def test_two_times_two_ranks_report_the_steps_of_one_with_a_cached_reference(config: dict[str, Any]) -> None:
    # A step of three pairs in two shares, one pair at a time: some micro-batches are empty.
    config["optim"]["tokens_per_micro_batch"] = 1
    config["reference"]["kind"] = "cached"
    shard = {"context_parallel": 2, "reshard_after_forward": False}
    (alone,) = run_ranks(1, offline, config | {"reference": config["reference"] | {"kind": "live"}})
    shared = run_ranks(4, offline, config | {"shard": shard, "cluster": {"train_workers": 4}})
    for rank in shared:
        for expected, found in zip(alone, rank, strict=True):
            for key in COMPARED:
                assert found[key] == pytest.approx(expected[key], abs=1e-4, rel=1e-4), (expected["step"], key)
