"""Context parallelism over gloo: every number equals that of one rank with whole rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.types import Metrics
from tests.conftest import ragged_texts, save_tokenizer
from tests.distributed.conftest import assert_same, over
from tests.distributed.parts import context_parallel_errors
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline
from tests.families import save_small_model

STEPS = 3


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, write_pairs: Callable[[Sequence[tuple[str, str, str]]], Path]) -> Any:
    """Steps of three pairs, one of which is much longer than the others, in float32."""
    texts = ragged_texts(STEPS * 3)
    texts[4] = (texts[4][0] * 9, texts[4][1] * 3, texts[4][2])
    return {
        "run": {"dir": str(tmp_path), "name": "run", "save_every": None, "export": False},
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "reference": {"cache_dir": str(tmp_path / "cache"), "kind": "live"},
        "data": {"train": str(write_pairs(texts))},
        "optim": {"lr": 1e-3, "pairs_per_step": 3, "tokens_per_micro_batch": 256, "schedule": "constant"},
        "cluster": {"train_workers": 1},
    }


def on(ranks: int, config: dict[str, Any], **shard: Any) -> list[list[Metrics]]:
    return run_ranks(ranks, offline, over(ranks, config, **shard))


@pytest.mark.parametrize(("ranks", "weighting"), [(2, "none"), (3, "wpo")])
def test_sharded_rows_have_the_logps_of_every_token_and_the_gradient_of_every_weight(
    tiny_model: Path, ranks: int, weighting: str
) -> None:
    for errors in run_ranks(ranks, context_parallel_errors, str(tiny_model), weighting):
        assert errors["losses"] < 1e-5
        assert errors["logps"] < 1e-4, "nats per token"
        assert errors["policy"] < 1e-4, "nats per token"
        assert errors["gradients"] < 1e-4, "relative to the norm of each weight's gradient"


@pytest.mark.parametrize(
    "architecture",
    [None, pytest.param("mistral", marks=pytest.mark.slow), "gemma3_text"],
    ids=["full", "windows", "some windows"],
)
def test_two_context_parallel_ranks_report_the_steps_of_one_and_one_resumes_from_their_checkpoint(
    config: dict[str, Any], tmp_path: Path, architecture: str | None
) -> None:
    if architecture:
        config["model"]["path"] = str(save_small_model(tmp_path / "model", architecture))
        save_tokenizer(tmp_path / "model")
    cached = config | {"reference": config["reference"] | {"kind": "cached"}}
    saving = cached | {"run": config["run"] | {"save_every": 2}}
    (single,) = on(1, config)
    first, second = on(2, saving | {"run": saving["run"] | {"steps": 2}}, context_parallel=2)
    (resumed,) = on(1, saving)
    assert len(single) == STEPS
    assert [line["loss"] for line in first] == [line["loss"] for line in second], "to the last digit"
    assert_same(single, first + resumed, absolute=1e-4)


def test_two_data_parallel_groups_of_two_ranks_report_the_steps_of_one(config: dict[str, Any]) -> None:
    # Three pairs over two groups, in rows with room for one or two short pairs: some rows are empty.
    config["run"]["steps"] = 2
    single = on(1, config)[0]
    config["optim"]["tokens_per_micro_batch"] = 64
    for lines in on(4, config, context_parallel=2, replicate=2, activation_checkpointing=True):
        assert_same(single, lines, absolute=1e-4)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_learn_as_on_one_rank(config: dict[str, Any], quantize: str | None) -> None:
    config["model"]["lora"] = {"rank": 4, "alpha": 8, "quantize": quantize}
    config["reference"]["kind"] = "adapters_off"
    (single,) = on(1, config)
    first, _ = on(2, config, context_parallel=2)
    assert single[-1]["loss"] < single[0]["loss"]
    assert_same(single, first, absolute=1e-4)


def test_bfloat16_rows_report_the_steps_of_one_rank(config: dict[str, Any]) -> None:
    config["model"]["dtype"] = "bfloat16"
    config["optim"]["lr"] = 1e-5
    (single,) = on(1, config)
    first, _ = on(2, config, context_parallel=2, activation_checkpointing="full")
    for one, other in zip(single, first, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.05)
        assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=0.01)
        assert one["optim/grad_norm"] == pytest.approx(other["optim/grad_norm"], rel=0.05)


@pytest.mark.slow
def test_compiled_layers_report_the_steps_of_uncompiled_ones(config: dict[str, Any]) -> None:
    (single,) = on(1, config)
    first, _ = on(2, config, context_parallel=2, compile=True)
    assert_same(single, first, absolute=1e-4)
