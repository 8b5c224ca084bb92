"""Log-probabilities and gradients against transformers' own forward in float64; the digest of a model's weights."""

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ray.config.schema import ModelConfig
from dpo_ray.data.packing import Layout, build_row
from dpo_ray.model.architecture import model_digest, read_model_config
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer, pair_logps, pair_losses
from dpo_ray.objective.head import Head
from dpo_ray.objective.logps import PairLogps
from dpo_ray.types import TokenPair
from tests.conftest import gradient, save_tiny_model


def ragged_pairs(count: int, seed: int = 0) -> list[TokenPair]:
    """Pairs of uneven lengths, including a completion of a single token and one with tokens that carry no loss."""
    draw = np.random.default_rng(seed)
    tokens = lambda most: tuple(draw.integers(0, 256, draw.integers(1, most)).tolist())  # noqa: E731
    pairs = [TokenPair(tokens(40), tokens(30), tokens(20)) for _ in range(count - 2)]
    return [*pairs, TokenPair((1,), (2,), (3, 4)), TokenPair((1, 2), (5, ~6, ~7, 8, ~9), (~3, 4))]


def exact_logp(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    ids = torch.tensor([prompt + tuple(token if token >= 0 else ~token for token in completion)])
    logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
    return (logps[len(prompt) - 1 :] * (torch.tensor(completion) >= 0)).sum()


def preference(policy: PairLogps, reference: PairLogps | None) -> torch.Tensor:
    return torch.nn.functional.logsigmoid(0.1 * (policy.chosen - policy.rejected))


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("chunk", [1000, 60, 9], ids=["one-group", "groups", "parts"])
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_logps_and_gradients_equal_those_of_separate_float64_forwards(
    tiny_model: Path,
    layout: Layout,
    attention: Literal["auto", "sdpa"],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Head, "chunk", chunk)
    pairs = ragged_pairs(7)
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    chosen = torch.stack([exact_logp(exact, pair.prompt, pair.chosen) for pair in pairs])
    rejected = torch.stack([exact_logp(exact, pair.prompt, pair.rejected) for pair in pairs])
    exact_loss = torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum()
    exact_loss.backward()

    scorer = Scorer(build_model(ModelConfig(path=str(tiny_model), attention=attention), with_weights=True))
    losses = pair_losses(scorer, build_row(pairs, layout), preference)
    losses.total.backward()

    assert losses.total.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    assert losses.each.sum().item() == pytest.approx(exact_loss.item(), rel=1e-5)
    assert (losses.policy.chosen - chosen).abs().max() < 1e-4
    assert (losses.policy.rejected - rejected).abs().max() < 1e-4
    assert losses.policy.chosen_tokens.tolist() == [sum(token >= 0 for token in pair.chosen) for pair in pairs]
    expected = dict(exact.named_parameters())
    for name, parameter in scorer.model.named_parameters():
        assert (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm() < 1e-3, name


def test_an_empty_micro_batch_has_no_logps_and_zero_gradients(tiny_model: Path) -> None:
    scorer = Scorer(build_model(ModelConfig(path=str(tiny_model)), with_weights=True))
    row = build_row([], "shared")
    assert pair_logps(scorer, row).chosen.shape == (0,)
    losses = pair_losses(scorer, row, preference)
    losses.total.backward()
    assert losses.each.shape == (0,)
    assert all(gradient(parameter).abs().sum() == 0 for parameter in scorer.parameters())


def test_the_digest_depends_on_the_weights_and_not_on_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy")
    other, cache_dir = save_tiny_model(tmp_path / "other", seed=1), tmp_path / "cache"
    assert model_digest(str(tmp_path / "copy"), cache_dir) == model_digest(str(tiny_model), cache_dir)
    other_digest = model_digest(str(other), cache_dir)
    assert other_digest != model_digest(str(tiny_model), cache_dir)
    assert len(list(cache_dir.iterdir())) == 3, "each file is read once"
    (tmp_path / "copy/model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert model_digest(str(tmp_path / "copy"), cache_dir) == other_digest, "a changed file is read again"


SMALL = {
    "vocab_size": 261, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 258, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("qwen3", {"head_dim": 16}),
        ("mistral", {"sliding_window": None}),
        ("gemma", {"head_dim": 16}),
        ("olmo2", {}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("hyperclovax", {"logits_scaling": 4.0}),
    ],
)
def test_logps_of_packed_rows_equal_those_of_separate_forwards_for_each_architecture(
    tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SMALL | settings)).save_pretrained(tmp_path)
    pairs = ragged_pairs(5)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        rejected = torch.stack([exact_logp(exact, pair.prompt, pair.rejected) for pair in pairs])
    actual = pair_logps(
        Scorer(build_model(ModelConfig(path=str(tmp_path)), with_weights=True)), build_row(pairs, "shared")
    )
    assert rejected.abs().max() > 20, "differences would be visible"
    assert (actual.rejected - rejected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("rwkv", "is a rwkv, whose layers carry state"),
        ("bloom", "is a bloom, whose attention cannot be replaced .* such models cannot be trained"),
        ("falcon", "is a falcon, whose attention cannot be replaced .* set model.attention: sdpa"),
    ],
)
def test_models_that_would_mix_the_sequences_of_a_row_are_rejected(
    tmp_path: Path, architecture: str, message: str
) -> None:
    AutoConfig.for_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(path=str(tmp_path)), with_weights=True)


def test_a_missing_model_is_a_clear_error_naming_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path"):
        read_model_config(str(tmp_path / "nothing"))
