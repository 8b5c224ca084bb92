"""The run that distributed tests vary, and the comparison of two runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Config
from tests.conftest import ragged_texts

WritePairs = Callable[[Sequence[tuple[str, str, str]]], Path]

COMPARED = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "optim/grad_norm")


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, write_pairs: WritePairs) -> dict[str, Any]:
    """Six steps of five pairs, two epochs and a short last step in each, in float32."""
    return {
        "run": {"dir": str(tmp_path), "name": "run", "epochs": 2, "save_every": None, "export": False},
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {"train": str(write_pairs(ragged_texts(13)))},
        "optim": {"lr": 1e-3, "pairs_per_step": 5, "tokens_per_micro_batch": 256, "schedule": "constant"},
        "cluster": {"train_workers": 1},
    }


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
