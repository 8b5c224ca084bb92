"""The run that distributed tests vary, and the comparison of two runs."""

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Config
from dpo_ray.types import Metrics
from tests.conftest import ragged_texts, save_pairs
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline

COMPARED = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "optim/grad_norm")


def six_steps(folder: Path, model: Path) -> dict[str, Any]:
    """Six steps of five pairs, two epochs and a short last step in each, in float32."""
    return {
        "run": {"dir": str(folder), "name": "run", "epochs": 2, "save_every": None, "export": False},
        "model": {"path": str(model), "dtype": "float32"},
        "reference": {"cache_dir": str(folder / "cache")},
        "data": {"train": str(save_pairs(folder / "pairs.jsonl", ragged_texts(13)))},
        "optim": {"lr": 1e-3, "pairs_per_step": 5, "tokens_per_micro_batch": 256, "schedule": "constant"},
        "cluster": {"train_workers": 1},
    }


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """The six steps in the test's own folder."""
    return six_steps(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def steps_of_one(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[Metrics]:
    """The six steps on one worker; the first three are those of a run of one epoch."""
    return run_ranks(1, offline, six_steps(tmp_path_factory.mktemp("one"), tiny_model))[0]


@pytest.fixture(scope="session")
def steps_of_two(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[list[Metrics]]:
    """The six steps on two workers, by rank."""
    return run_ranks(2, offline, over(2, six_steps(tmp_path_factory.mktemp("two"), tiny_model)))


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]], *, absolute: float) -> None:
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for one, other in zip(first, second, strict=True):
        for key in COMPARED:
            assert one[key] == pytest.approx(other[key], abs=absolute, rel=1e-4), (one["step"], key)


def over(ranks: int, config: dict[str, Any], **shard: Any) -> dict[str, Any]:
    """The run on ``ranks`` workers with a ``shard`` section."""
    changed = config | {"shard": shard, "cluster": {"train_workers": ranks}}
    Config.model_validate(changed)
    return changed
