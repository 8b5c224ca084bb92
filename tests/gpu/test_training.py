"""Training on one GPU against float64 forward passes and runs on the CPU: ``pytest -m gpu tests/gpu``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_ray.config import Config
from dpo_ray.config.schema import ModelConfig
from dpo_ray.data.packing import build_row
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_record_tokenizer
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer, pair_losses
from dpo_ray.train.offline import train_offline
from dpo_ray.types import Metrics, TokenPair
from tests.conftest import WritePairs, ragged_texts
from tests.distributed.conftest import assert_same
from tests.distributed.runs import ListReporter
from tests.families import PACKED, save_small_model
from tests.unit.model.test_scorer import (
    assert_gradients_equal,
    exact_results,
    preference,
    ragged_pairs,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_kernels_of_other_tests() -> None:
    """A run has one model; torch limits how many variants of a function it compiles."""
    torch._dynamo.reset()


def pairs_of_several_blocks() -> list[TokenPair]:
    """``ragged_pairs``, and pairs whose prompt and completions are longer than a block of flex_attention."""
    draw = np.random.default_rng(1)
    text = lambda length: tuple(draw.integers(0, 256, length).tolist())  # noqa: E731
    return [*ragged_pairs(4), TokenPair(text(300), text(150), text(20)), TokenPair(text(20), text(190), text(280))]


@pytest.mark.parametrize("architecture", PACKED)
def test_flex_attention_equals_separate_forwards_for_each_architecture(tmp_path: Path, architecture: str) -> None:
    folder, pairs = save_small_model(tmp_path, architecture), pairs_of_several_blocks()
    logps, gradients = exact_results(folder, pairs)
    model = build_model(ModelConfig(path=str(folder)), with_weights=True, device_type="cuda").cuda()
    scorer = Scorer(model)
    losses = pair_losses(scorer, build_row(pairs, "shared").to(torch.device("cuda")), preference)
    losses.total.backward()
    actual = torch.stack((losses.policy.chosen, losses.policy.rejected), 1).flatten().cpu()
    assert ((actual - logps).abs() / logps.abs()).max() < 1e-5
    assert_gradients_equal(scorer.cpu(), gradients)


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


def train(config: dict[str, Any], device: str, *, stop_after: int | None = None, **sections: Any) -> list[Metrics]:
    """Train offline with some keys of some sections changed; returns the metrics of its steps."""
    changed = {name: config.get(name, {}) | sections.get(name, {}) for name in config.keys() | sections.keys()}
    changed["run"] = changed["run"] | ({} if "run" in sections else {"name": f"{device}-{len(sections)}"})
    parsed = Config.model_validate(changed)
    tokenizer = load_record_tokenizer(parsed)
    pairs = prepare_pairs(parsed.data.train, tokenizer, folder=parsed.reference.cache_path / "data")
    reporter = ListReporter(stop_after)
    train_offline(parsed, pairs=pairs, held_out=None, device=torch.device(device, 0), reporter=reporter)
    return reporter.lines


@pytest.mark.parametrize(
    "shard",
    [
        {},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"activation_offload": True},
        {"activation_checkpointing": "selective", "activation_offload": True},
        {"cpu_offload": True},
        {"compile": True},
    ],
    ids=str,
)
def test_a_run_on_a_gpu_has_the_steps_of_one_on_a_cpu(
    config: dict[str, Any], one_rank: None, shard: dict[str, Any]
) -> None:
    assert_same(train(config, "cuda", shard=shard), train(config, "cpu"), absolute=1e-3)


def test_a_resumed_run_on_a_gpu_goes_on_with_the_steps_of_an_undisturbed_one(
    config: dict[str, Any], one_rank: None
) -> None:
    whole = train(config, "cuda", run={"name": "whole"})
    run = {"name": "stopped", "save_every": 2}
    stopped = train(config, "cuda", run=run, stop_after=3)
    resumed = train(config, "cuda", run=run)
    assert [line["step"] for line in resumed] == [4, 5, 6]
    assert_same([*stopped[:3], *resumed], whole, absolute=1e-5)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"model": {"dtype": "bfloat16"}}, 0.02),
        ({"model": {"dtype": "bfloat16", "fp8": True}}, 0.05),
        ({"model": {"dtype": "bfloat16"}, "optim": {"use": "adamw_8bit"}}, 0.05),
    ],
    ids=["bfloat16", "fp8", "adamw_8bit"],
)
def test_a_run_of_lower_precision_stays_near_the_one_in_float32(
    config: dict[str, Any], one_rank: None, changes: dict[str, Any], most: float
) -> None:
    exact, rounded = train(config, "cuda"), train(config, "cuda", **changes)
    assert exact[-1]["loss"] < exact[0]["loss"] - 0.1, "the run learns"
    losses = np.array([[line["loss"] for line in lines] for lines in (exact, rounded)])
    assert 0 < np.abs(losses[0] - losses[1]).max() < most
