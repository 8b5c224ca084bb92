"""Tensor parallelism over gloo: steps equal to one rank's, also with FSDP and HSDP; checkpoints, exports, errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from dpo_ray.config.schema import ModelConfig, ShardConfig
from dpo_ray.model.load import validate_model
from dpo_ray.objective.head import LogitTransform
from dpo_ray.train.export import export_checkpoint, find_checkpoint
from dpo_ray.types import Metrics
from tests.conftest import save_tiny_model, save_tokenizer
from tests.distributed.conftest import assert_same, over
from tests.distributed.parts import gradients, vocabulary_parallel_head
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline
from tests.families import small_config


@pytest.fixture
def config(config: dict[str, Any]) -> dict[str, Any]:
    """Three steps of five pairs, a short one last, in float32."""
    return config | {"run": config["run"] | {"epochs": 1}}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def save_tiny_qwen3(folder: Path) -> Path:
    """A two-layer Qwen3: norms per query and key head, projections with biases, an odd vocabulary, an untied head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=261, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, attention_bias=True, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=None, eos_token_id=256, pad_token_id=258,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_bfloat16_products_of_tensor_parallel_ranks_train_like_float32(
    config: dict[str, Any], steps_of_one: list[Metrics]
) -> None:
    config["model"] |= {"dtype": "bfloat16", "cpu_products": "bfloat16"}
    first, _ = run_ranks(2, offline, over(2, config, tensor_parallel=2))
    assert first[0]["loss"] == pytest.approx(steps_of_one[0]["loss"], abs=1e-2)
    assert first[0]["optim/grad_norm"] == pytest.approx(steps_of_one[0]["optim/grad_norm"], rel=2e-2)


def test_tensor_parallel_ranks_report_the_steps_of_one_rank_also_with_replicas_and_context_parallelism(
    config: dict[str, Any], steps_of_one: list[Metrics]
) -> None:
    with_context = {"context_parallel": 2, "activation_checkpointing": "selective"}
    for ranks, attention, shard in (
        (2, "auto", {}), (2, "sdpa", {}), (2, "padded", {}), (4, "auto", {"replicate": 2}), (4, "auto", with_context),
    ):  # fmt: skip
        changed = config | {"model": config["model"] | {"attention": attention}}
        by_rank = run_ranks(ranks, offline, over(ranks, changed, tensor_parallel=2, **shard))
        for lines in by_rank:
            assert_same(steps_of_one[:3], lines, absolute=1e-4)
            assert [line["loss"] for line in lines] == [line["loss"] for line in by_rank[0]]


def test_an_untied_head_with_131_rows_per_rank_which_two_shards_divide_unevenly_reports_the_steps_of_one_rank(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "untied", tied=False, vocab_size=262)
    config |= {"model": config["model"] | {"path": str(model)}, "loss": {"weighting": "wpo"}}
    (single,) = run_ranks(1, offline, config)
    split, *_ = run_ranks(4, offline, over(4, config, tensor_parallel=2))
    assert_same(single, split, absolute=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_every_gradient_equals_that_of_one_rank(config: dict[str, Any], tmp_path: Path, architecture: str) -> None:
    if architecture == "qwen3":
        config["model"]["path"] = str(save_tiny_qwen3(tmp_path / "qwen3"))
    (single,) = run_ranks(1, gradients, config)
    for sharded in run_ranks(2, gradients, over(2, config, tensor_parallel=2)):
        assert sharded.keys() == single.keys()
        for name, gradient in single.items():
            assert relative_error(sharded[name], gradient) < 2e-5, name


def test_bfloat16_checkpointed_layers_and_a_live_reference_report_the_steps_of_one_rank(
    config: dict[str, Any],
) -> None:
    config["model"]["dtype"] = "bfloat16"
    config["optim"]["lr"] = 1e-5
    (single,) = run_ranks(1, offline, config)
    config["reference"]["kind"] = "live"
    split, _ = run_ranks(2, offline, over(2, config, tensor_parallel=2, activation_checkpointing="full"))
    for one, other in zip(single, split, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.05)
        assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=0.01)
        assert one["optim/grad_norm"] == pytest.approx(other["optim/grad_norm"], rel=0.05)


def test_a_run_resumes_with_another_split(config: dict[str, Any], steps_of_one: list[Metrics]) -> None:
    one, two = (1, {}), (2, {"tensor_parallel": 2})
    replicas = (4, {"tensor_parallel": 2, "replicate": 2})
    for (ranks, shard), (then, other) in ((two, one), (one, two), (replicas, two)):
        saving = config | {"run": config["run"] | {"name": f"stopped-{ranks}", "save_every": 2}}
        run_ranks(ranks, offline, over(ranks, saving, **shard), 2)
        resumed, *_ = run_ranks(then, offline, over(then, saving, **other))
        assert [line["step"] for line in resumed] == [3]
        assert_same(steps_of_one[2:3], resumed, absolute=1e-4)


def test_a_split_run_exports_the_weights_of_its_checkpoint(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # Each tensor rank has 131 rows of embedding and head, which two shards divide unevenly.
    config["model"]["path"] = str(save_tiny_model(tmp_path / "untied", tied=False, vocab_size=262))
    config["run"] |= {"export": True, "save_every": 3}
    run_ranks(4, offline, over(4, config, tensor_parallel=2))
    run = tmp_path / "run"
    export_checkpoint(find_checkpoint(run), tmp_path / "exported")
    expected = AutoModelForCausalLM.from_pretrained(run / "policy").state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    untrained = AutoModelForCausalLM.from_pretrained(config["model"]["path"]).state_dict()
    assert expected.keys() == exported.keys()
    for name, weight in expected.items():
        assert torch.equal(exported[name], weight), name
        # AdamW moves each weight by about the learning rate per step: three steps of 1e-3.
        assert 0 < (weight - untrained[name]).abs().max() < 4e-3, name


def test_models_that_cannot_be_split_are_rejected_without_loading_weights(tiny_model: Path, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(tiny_model).save_pretrained(tmp_path / "no_weights")
    model = ModelConfig(path=str(tmp_path / "no_weights"))
    validate_model(model, ShardConfig(tensor_parallel=2))
    with pytest.raises(
        ValueError, match=r"shard\.tensor_parallel is 4, which does not divide .* num_key_value_heads 2"
    ):
        validate_model(model, ShardConfig(tensor_parallel=4))
    for architecture, message in (
        ("olmo2", "tensor-parallel plan with "),
        ("qwen2_moe", "splits only .* of its layers|plan with moe_tp_experts"),  # the latter from transformers 5.24 on
        ("mamba2", "no tensor-parallel plan in transformers; set shard.tensor_parallel: 1"),
        ("qwen3_next", "tensor-parallel plan with "),
    ):
        folder = tmp_path / architecture
        small_config(architecture).save_pretrained(folder)
        with pytest.raises(ValueError, match=message):
            validate_model(ModelConfig(path=str(folder)), ShardConfig(tensor_parallel=2))


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 30.0)], ids=["plain", "scaled-and-capped"])
def test_a_vocabulary_parallel_head_has_the_gradients_of_a_float64_softmax(transform: LogitTransform) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocabulary, pair_tokens = 70, 32, 300, (20, 7, 30, 13)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = 2 * torch.randn(vocabulary, width, generator=generator)
    bias = torch.linspace(-1, 1, vocabulary)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)

    exact: list[Any] = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = (exact[0] @ exact[1].t() + exact[2]) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logps = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    each = torch.stack([(part.sum() / 100).square() for part in logps.split(pair_tokens)])
    each.sum().backward()
    squares = logits.softmax(-1).square().sum(-1).log()
    grad_hidden, grad_weight, grad_bias = (x.grad.numpy() for x in exact)

    by_rank = run_ranks(2, vocabulary_parallel_head, hidden, weight, bias, labels, pair_tokens, transform)
    for rank in by_rank:
        assert np.abs(rank["logps"] - logps.detach().numpy()).max() < 5e-5
        assert np.abs(rank["squares"] - squares.detach().numpy()).max() < 5e-5
        assert relative_error(rank["each"], each.detach().numpy()) < 1e-5
        assert relative_error(rank["hidden"], grad_hidden) < 1e-5
    assert relative_error(np.concatenate([rank["weight"] for rank in by_rank]), grad_weight) < 1e-5
    assert relative_error(np.concatenate([rank["bias"] for rank in by_rank]), grad_bias) < 1e-5
