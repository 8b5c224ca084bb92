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
from dpo_ray.model.architecture import PACKED_WINDOWS, model_digest, read_model_config
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer, Weighting, pair_logps, pair_losses
from dpo_ray.objective.head import Head
from dpo_ray.objective.logps import PairLogps
from dpo_ray.parallel.activations import apply_activation_checkpointing
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


@pytest.mark.parametrize("chunk", [1000, 30], ids=["whole", "parts"])
@pytest.mark.parametrize("weighting", ["none", "wpo"])
def test_pairs_that_share_prompt_and_completions_have_the_losses_of_rows_of_their_own(
    tiny_model: Path, weighting: Weighting, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Head, "chunk", chunk)
    draw = np.random.default_rng(0)
    prompt, *texts = (tuple(draw.integers(0, 256, length).tolist()) for length in (40, 12, 30, 7, 20))
    ranked = [TokenPair(prompt, texts[i], texts[j]) for i, j in ((0, 3), (1, 3), (0, 2), (2, 3))]
    pairs = [*ragged_pairs(3), *ranked, *ragged_pairs(2, seed=1)]
    scorer = Scorer(build_model(ModelConfig(path=str(tiny_model)), with_weights=True))

    def weighted(policy: PairLogps, reference: PairLogps | None) -> torch.Tensor:
        return preference(policy, reference) * (1.0 if policy.weights is None else policy.weights)

    together = pair_losses(scorer, build_row(pairs, "shared"), weighted, weighting=weighting)
    together.total.backward()
    gradients = {name: gradient(parameter).clone() for name, parameter in scorer.named_parameters()}
    scorer.zero_grad()
    alone = [pair_losses(scorer, build_row([pair], "shared"), weighted, weighting=weighting) for pair in pairs]
    torch.stack([losses.total for losses in alone]).sum().backward()
    torch.testing.assert_close(together.each, torch.cat([losses.each for losses in alone]), atol=1e-5, rtol=1e-5)
    for name, parameter in scorer.named_parameters():
        assert (gradients[name] - gradient(parameter)).norm() < 1e-5 * gradients[name].norm(), name


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


WINDOW = {"sliding_window": 6, "head_dim": 16}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "olmo2": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    # Local attention
    "afmoe": MIXED | EXPERTS | {"num_dense_layers": 1},
    "cohere2": MIXED | {"logit_scale": 0.25},
    "exaone4": MIXED,
    "gemma2": MIXED | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": MIXED,
    "gemma4_text": WINDOW
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 261,
    },
    "gpt_oss": MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "attention_chunk_size": 6,
        "head_dim": 16,
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
        "attn_temperature_tuning": False,
        "interleave_moe_layer_step": 2,
    },
    "ministral": WINDOW,
    "mistral": WINDOW,
    "mixtral": WINDOW | {"num_local_experts": 4},
    "olmo3": MIXED,
    "phi3": {"sliding_window": 6},
    "qwen2": MIXED | {"use_sliding_window": True},
    "qwen3": MIXED | {"use_sliding_window": True},
    "smollm3": {"sliding_window": 6, "use_sliding_window": True, "no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 6},
    # Mixtures of experts
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 16},
}


def save_small_model(folder: Path, architecture: str, settings: dict[str, Any]) -> Path:
    """A random model of an architecture, whose attention, sinks included, and routing are far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SMALL | settings))
    for name, parameter in model.named_parameters():
        if name.endswith("sinks") or ("router" in name and not parameter.any()):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def exact_results(folder: Path, pairs: list[TokenPair]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(S,) log-probabilities by separate forward passes of transformers' eager attention in float64, and gradients."""
    exact = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    logps = [exact_logp(exact, pair.prompt, ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    each = torch.stack(logps)
    torch.nn.functional.logsigmoid(0.1 * (each[::2] - each[1::2])).sum().backward()
    return each.detach(), {name: gradient(p) for name, p in exact.named_parameters() if p.grad is not None}


OTHER_ATTENTION = {
    "gemma2": ["flex"],
    "gpt_oss": ["flex"],
    "llama4_text": ["flex", "sdpa"],
    "mistral": ["flex", "sdpa"],
    "qwen2": ["flex", "sdpa"],
}
"""One architecture for each feature of attention: caps, sinks, chunks, windows in all layers and in some."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_equal_separate_forwards_for_each_architecture(tmp_path: Path, architecture: str) -> None:
    folder, pairs = save_small_model(tmp_path, architecture, ARCHITECTURES[architecture]), ragged_pairs(4)
    logps, gradients = exact_results(folder, pairs)
    assert logps.abs().max() > 20, "differences would be visible"
    for attention in ("auto", *OTHER_ATTENTION.get(architecture, ())):
        config = ModelConfig.model_validate({"path": str(folder), "attention": attention})
        scorer = Scorer(build_model(config, with_weights=True))
        with torch.set_grad_enabled(attention != "flex"):
            losses = pair_losses(scorer, build_row(pairs, "shared"), preference)
        actual = torch.stack((losses.policy.chosen, losses.policy.rejected), 1).flatten()
        assert (actual - logps).abs().max() < 1e-4, attention
        if attention != "flex":  # no gradients on a CPU
            losses.total.backward()
            assert_gradients_equal(scorer, gradients)


def assert_gradients_equal(scorer: Scorer, gradients: dict[str, torch.Tensor]) -> None:
    actual = {name: p.grad for name, p in scorer.model.named_parameters() if p.grad is not None}
    assert actual.keys() == gradients.keys()
    whole = torch.stack([expected.norm() for expected in gradients.values()]).norm()
    for name, expected in gradients.items():
        # Biases of keys have no gradient but rounding.
        assert (actual[name] - expected).norm() < 1e-3 * expected.norm() + 1e-7 * whole, name


def test_every_architecture_with_windows_in_packed_rows_is_tested() -> None:
    local = {"sliding_window", "attention_chunk_size"}
    assert {name for name, settings in ARCHITECTURES.items() if local & settings.keys()} == PACKED_WINDOWS


def test_activation_checkpointing_leaves_the_gradients_of_layers_that_share_keys(tmp_path: Path) -> None:
    folder, pairs = save_small_model(tmp_path, "gemma4_text", ARCHITECTURES["gemma4_text"]), ragged_pairs(5)
    scorer = Scorer(build_model(ModelConfig(path=str(folder)), with_weights=True))
    apply_activation_checkpointing(scorer.layers, "full")
    pair_losses(scorer, build_row(pairs, "shared"), preference).total.backward()
    assert_gradients_equal(scorer, exact_results(folder, pairs)[1])


def test_attention_that_sdpa_does_not_compute_is_rejected(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path, "gemma2", ARCHITECTURES["gemma2"])
    with pytest.raises(ValueError, match=r"whose attention torch's sdpa does not compute; set model\.attention: auto"):
        build_model(ModelConfig(path=str(folder), attention="sdpa"), with_weights=True)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("vaultgemma", "is a vaultgemma with layers of sliding_attention, which are not supported"),
        ("qwen3_next", "is a qwen3_next with layers of linear_attention, which are not supported"),
        ("llama4_text", "is a llama4_text with attn_temperature_tuning, which is not supported"),
    ],
)
def test_layers_that_are_not_tested_in_packed_rows_are_rejected(
    tmp_path: Path, architecture: str, message: str
) -> None:
    AutoConfig.for_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_model_config(str(tmp_path))


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


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "granitemoe", "gpt_oss", "olmoe", "mixtral"])
def test_the_router_loss_is_the_one_of_transformers_for_each_sequence(
    tmp_path: Path, architecture: str, layout: Layout
) -> None:
    folder, pairs = save_small_model(tmp_path, architecture, ARCHITECTURES[architecture]), ragged_pairs(3)
    exact = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    sequences = [
        torch.tensor([[token if token >= 0 else ~token for token in pair.prompt + ids]])
        for pair in pairs
        for ids in (pair.chosen, pair.rejected)
    ]
    expected = torch.stack([exact(ids, output_router_logits=True).aux_loss for ids in sequences]).view(-1, 2).mean(1)
    expected.sum().backward()
    scorer = Scorer(build_model(ModelConfig(path=str(folder)), with_weights=True))
    zero = lambda policy, reference: 0 * policy.chosen  # noqa: E731
    losses = pair_losses(scorer, build_row(pairs, layout), zero, router_aux=0.5)
    losses.total.backward()
    torch.testing.assert_close(losses.each.double(), 0.5 * expected.detach().double(), rtol=1e-5, atol=0)
    routers = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None and p.grad.norm() > 1e-5}
    assert any("router" in name or "gate" in name for name in routers)
    actual = dict(scorer.model.named_parameters())
    for name, gradient_of_aux in routers.items():
        assert (2 * gradient(actual[name]) - gradient_of_aux).norm() < 1e-3 * gradient_of_aux.norm(), name


def test_the_router_loss_of_a_model_without_experts_is_a_clear_error(tiny_model: Path) -> None:
    scorer = Scorer(build_model(ModelConfig(path=str(tiny_model)), with_weights=True))
    with pytest.raises(ValueError, match=r"loss\.router_aux: LlamaForCausalLM has no router logits"):
        pair_losses(scorer, build_row(ragged_pairs(2), "shared"), preference, router_aux=0.1)


def test_an_empty_micro_batch_has_no_router_loss(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path, "qwen3_moe", ARCHITECTURES["qwen3_moe"])
    scorer = Scorer(build_model(ModelConfig(path=str(folder)), with_weights=True))
    losses = pair_losses(scorer, build_row([], "shared"), preference, router_aux=0.1)
    losses.total.backward()
    assert losses.total.item() == 0
