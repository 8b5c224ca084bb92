"""Log-probabilities and gradients against transformers' own forward in float64; the digest of a model's weights."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ray.config.losses import LossConfig
from dpo_ray.config.schema import ModelConfig, ShardConfig
from dpo_ray.data.packing import Layout, build_row
from dpo_ray.model.architecture import (
    PACKED_WINDOWS,
    UNTRAINABLE,
    auto_class,
    freeze_other_modalities,
    model_digest,
    other_modalities,
    read_model_config,
    validate_online_model,
)
from dpo_ray.model.load import build_model, validate_model
from dpo_ray.model.scorer import Scorer, Weighting, pair_logps, pair_losses
from dpo_ray.objective.build import build_loss
from dpo_ray.objective.head import Head
from dpo_ray.objective.logps import PairLogps
from dpo_ray.parallel.activations import apply_activation_checkpointing
from dpo_ray.types import TokenPair
from tests.conftest import gradient, save_tiny_model
from tests.families import COMPOSITE, PACKED, PADDED, architectures, save_small_model, small_config


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


@pytest.mark.parametrize("chunk", [1000, 60], ids=["whole", "parts"])
def test_weights_of_a_row_scale_losses_and_gradients_of_their_pairs(
    tiny_model: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Head, "chunk", chunk)
    pairs, gaps = ragged_pairs(7), [0.5, 2.0, 0.0, 1.0, 1.0, 3.5, 6.0]  # of mean 2
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    margins = torch.stack(
        [exact_logp(exact, p.prompt, p.chosen) - exact_logp(exact, p.prompt, p.rejected) for p in pairs]
    )
    exact_losses = -torch.nn.functional.logsigmoid(0.1 * margins) * torch.tensor(gaps).double() / 2
    exact_losses.sum().backward()

    scorer = Scorer(build_model(ModelConfig(path=str(tiny_model)), with_weights=True))
    zeros = torch.zeros(7)
    loss, reference = build_loss(LossConfig(weighting="gap")), PairLogps(zeros, zeros, zeros, zeros)
    row = build_row(pairs, "shared", weights=[gap / 2 for gap in gaps])
    losses = pair_losses(scorer, row, loss, reference, weighting="gap")
    losses.total.backward()
    torch.testing.assert_close(losses.each.double(), exact_losses.detach(), rtol=1e-5, atol=1e-5)
    expected = dict(exact.named_parameters())
    for name, parameter in scorer.model.named_parameters():
        wanted = gradient(expected[name])
        assert (gradient(parameter) - wanted).norm() < 1e-4 * wanted.norm(), name


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("chunk", [1000, 30], ids=["whole", "parts"])
@pytest.mark.parametrize("weighting", ["none", "wpo"])
def test_pairs_that_share_prompt_and_completions_have_the_losses_of_rows_of_their_own(
    tiny_model: Path, weighting: Weighting, chunk: int, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Head, "chunk", chunk)
    draw = np.random.default_rng(0)
    prompt, *texts = (tuple(draw.integers(0, 256, length).tolist()) for length in (40, 12, 30, 7, 20))
    ranked = [TokenPair(prompt, texts[i], texts[j]) for i, j in ((0, 3), (1, 3), (0, 2), (2, 3))]
    pairs = [*ragged_pairs(3), *ranked, *ragged_pairs(2, seed=1)]
    scorer = Scorer(build_model(ModelConfig(path=str(tiny_model)), with_weights=True))

    def weighted(policy: PairLogps, reference: PairLogps | None) -> torch.Tensor:
        return preference(policy, reference) * (1.0 if policy.weights is None else policy.weights)

    together = pair_losses(scorer, build_row(pairs, layout), weighted, weighting=weighting)
    together.total.backward()
    gradients = {name: gradient(parameter).clone() for name, parameter in scorer.named_parameters()}
    scorer.zero_grad()
    alone = [pair_losses(scorer, build_row([pair], "shared"), weighted, weighting=weighting) for pair in pairs]
    torch.stack([losses.total for losses in alone]).sum().backward()
    torch.testing.assert_close(together.each, torch.cat([losses.each for losses in alone]), atol=1e-5, rtol=1e-5)
    for name, parameter in scorer.named_parameters():
        assert (gradients[name] - gradient(parameter)).norm() < 1e-5 * gradients[name].norm(), name


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("chunk", [1000, 60], ids=["whole", "parts"])
def test_the_loss_of_ranked_lists_takes_whole_lists_from_a_row(
    tiny_model: Path, layout: Layout, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Head, "chunk", chunk)
    draw = np.random.default_rng(0)
    lists = [[tuple(draw.integers(0, 256, n).tolist()) for n in lengths] for lengths in ((30, 12, 30, 7), (9, 14, 8))]
    pairs = [TokenPair(prompt, *pair) for prompt, *ranked in lists for pair in pairwise(ranked)]
    scorer = Scorer(build_model(ModelConfig(path=str(tiny_model)), with_weights=True))
    zeros = torch.zeros(3)
    reference = PairLogps(zeros, zeros, zeros, zeros)
    loss = build_loss(LossConfig(use="plackett_luce", beta=0.1))
    losses = pair_losses(scorer, build_row(pairs, layout), loss, reference)
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    expected = []
    for prompt, *ranked in lists:
        logps = torch.stack([0.1 * exact_logp(exact, prompt, ids) for ids in ranked])
        expected += [logps[i:].logsumexp(0) - logps[i] for i in range(len(ranked) - 1)]
    torch.testing.assert_close(losses.each.double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


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


def exact_results(folder: Path, pairs: list[TokenPair]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(S,) log-probabilities by separate forward passes of transformers' eager attention in float64, and gradients."""
    exact: Any = (
        auto_class(AutoConfig.from_pretrained(folder))
        .from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager")
        .eval()
    )
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


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_rows_equal_separate_forwards_for_each_architecture(tmp_path: Path, architecture: str) -> None:
    folder, pairs = save_small_model(tmp_path, architecture), ragged_pairs(4)
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


@pytest.mark.parametrize("architecture", architectures(PADDED))
def test_padded_batches_equal_separate_forwards_for_each_architecture(tmp_path: Path, architecture: str) -> None:
    folder, pairs = save_small_model(tmp_path, architecture, PADDED[architecture]), ragged_pairs(4)
    logps, gradients = exact_results(folder, pairs)
    assert logps.abs().max() > 20, "differences would be visible"
    scorer = Scorer(build_model(ModelConfig(path=str(folder)), with_weights=True))
    assert scorer.layout("shared") == "padded"
    losses = pair_losses(scorer, build_row(pairs, "padded"), preference)
    losses.total.backward()
    actual = torch.stack((losses.policy.chosen, losses.policy.rejected), 1).flatten()
    assert (actual - logps).abs().max() < 1e-4
    assert_gradients_equal(scorer, gradients)
    empty = pair_losses(scorer, build_row([], "padded"), preference)
    scorer.zero_grad()
    empty.total.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in scorer.parameters())


@pytest.mark.parametrize("architecture", architectures(COMPOSITE))
def test_the_language_part_of_a_composite_model_is_trained_and_the_rest_frozen(
    tmp_path: Path, architecture: str
) -> None:
    folder, pairs = save_small_model(tmp_path, architecture), ragged_pairs(4)
    logps, gradients = exact_results(folder, pairs)
    scorer = Scorer(build_model(ModelConfig(path=str(folder)), with_weights=True))
    freeze_other_modalities(scorer.model)
    losses = pair_losses(scorer, build_row(pairs, scorer.layout("shared")), preference)
    losses.total.backward()
    actual = torch.stack((losses.policy.chosen, losses.policy.rejected), 1).flatten()
    assert (actual - logps).abs().max() < 1e-4
    unused = {p for module in other_modalities(scorer.model) for p in module.parameters()}
    assert unused
    assert all(parameter.grad is None for parameter in unused)
    assert_gradients_equal(scorer, {name: grad for name, grad in gradients.items() if grad.any()})


def test_padded_batches_of_a_packed_architecture_give_the_same_losses(tiny_model: Path) -> None:
    totals = []
    for attention in ("auto", "padded"):
        config = ModelConfig.model_validate({"path": str(tiny_model), "attention": attention})
        scorer = Scorer(build_model(config, with_weights=True))
        totals.append(pair_losses(scorer, build_row(ragged_pairs(5), scorer.layout("shared")), preference).each)
    torch.testing.assert_close(*totals, rtol=1e-5, atol=0)


def test_every_architecture_with_windows_in_packed_rows_is_tested() -> None:
    local = {"sliding_window", "attention_chunk_size"}
    assert {name for name, settings in PACKED.items() if local & settings.keys()} == PACKED_WINDOWS


def test_ranks_cannot_split_padded_batches(tiny_model: Path) -> None:
    config = ModelConfig(path=str(tiny_model), attention="padded")
    with pytest.raises(ValueError, match=r"shard\.context_parallel splits packed rows"):
        validate_model(config, ShardConfig(context_parallel=2))


def test_activation_checkpointing_leaves_the_gradients_of_layers_that_share_keys(tmp_path: Path) -> None:
    folder, pairs = save_small_model(tmp_path, "gemma4_text"), ragged_pairs(5)
    scorer = Scorer(build_model(ModelConfig(path=str(folder)), with_weights=True))
    apply_activation_checkpointing(scorer.layers, "full")
    pair_losses(scorer, build_row(pairs, "shared"), preference).total.backward()
    assert_gradients_equal(scorer, exact_results(folder, pairs)[1])


def test_attention_that_sdpa_does_not_compute_is_rejected(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path, "gemma2")
    with pytest.raises(ValueError, match=r"has an attention that torch's sdpa does not compute; set model\.attention"):
        build_model(ModelConfig(path=str(folder), attention="sdpa"), with_weights=True)


@pytest.mark.parametrize(
    ("architecture", "obstacle"),
    [
        ("bloom", "has an attention that cannot be replaced"),
        ("doge", r"masks keys by their content \(keep_window_size\)"),
        ("lfm2", "has layers of conv"),
        ("llama4_text", r"scales attention by the index in the row \(attn_temperature_tuning\)"),
        ("mamba", "has layers of linear_attention"),
        ("recurrent_gemma", "has layers (with a state|of linear_attention)"),  # the latter from transformers 5.24 on
        ("vaultgemma", "has local attention that is not tested in packed rows"),
    ],
)
def test_packed_rows_are_rejected_for_architectures_that_would_mix_their_sequences(
    tmp_path: Path, architecture: str, obstacle: str
) -> None:
    small_config(architecture, PADDED[architecture]).save_pretrained(tmp_path)
    message = f"is a {architecture}, which {obstacle} and needs padded batches; set model.attention: auto"
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(path=str(tmp_path), attention="sdpa"), with_weights=False)


@pytest.mark.parametrize("architecture", UNTRAINABLE)
def test_architectures_that_cannot_be_trained_are_rejected(tmp_path: Path, architecture: str) -> None:
    AutoConfig.for_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a {architecture}, whose .* in transformers|whose layers share weights"):
        read_model_config(str(tmp_path))


def test_online_runs_of_a_model_that_engines_cannot_update_are_rejected(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt_oss").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.path: .* is a gpt_oss, whose .* vLLM cannot update; train it by"):
        validate_online_model(str(tmp_path))


def test_a_missing_model_is_a_clear_error_naming_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path"):
        read_model_config(str(tmp_path / "nothing"))


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize(
    "architecture", ["qwen3_moe", "granitemoe", "gpt_oss", "olmoe", "mixtral", "granitemoehybrid", "qwen3_next"]
)
def test_the_router_loss_is_the_one_of_transformers_for_each_sequence(
    tmp_path: Path, architecture: str, layout: Layout
) -> None:
    folder, pairs = save_small_model(tmp_path, architecture), ragged_pairs(3)
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
    assert scorer.model.config._experts_implementation == "grouped_mm", "torch multiplies by all experts at once"
    zero = lambda policy, reference: 0 * policy.chosen  # noqa: E731
    losses = pair_losses(scorer, build_row(pairs, scorer.layout(layout)), zero, router_aux=0.5)
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
    folder = save_small_model(tmp_path, "qwen3_moe")
    scorer = Scorer(build_model(ModelConfig(path=str(folder)), with_weights=True))
    losses = pair_losses(scorer, build_row([], "shared"), preference, router_aux=0.1)
    losses.total.backward()
    assert losses.total.item() == 0
