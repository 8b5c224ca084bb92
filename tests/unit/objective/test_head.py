"""The chunked head against a float64 softmax over all logits at once."""

import math
from unittest.mock import patch

import pytest
import torch

from dpo_ray.objective.head import ChunkedLosses, Counts, Group, Head, LogitTransform, chunked_pair_losses, token_logps
from dpo_ray.objective.head_products import VOCABULARY_BLOCK, HeadProducts
from dpo_ray.objective.logps import TokenLogps
from dpo_ray.objective.precision import PATHS, ProductPath, Products
from tests.conftest import gradient

TOKENS, HIDDEN, VOCABULARY = 70, 32, 300
PAIRS = (20, 7, 30, 13)
"""Completion tokens of each pair."""
PROMPTS = [Counts(1, 2, tokens) for tokens in PAIRS]
CHUNKS = [1, 16, 28, 1000]
"""One token and a few at a time, some pairs whole and some in parts, and all at once."""


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator)
    return hidden, weight, labels, upstream


def oracle(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden @ head.weight.t() if head.bias is None else hidden @ head.weight.t() + head.bias
    logits = logits * head.transform.scale
    if (cap := head.transform.softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def losses_of(weighted: torch.Tensor, pairs: slice) -> torch.Tensor:
    """For each pair, the square of a weighted sum of its tokens' log-probabilities, in hundreds."""
    return torch.stack([(part.sum() / 100).square() for part in weighted.split(PAIRS[pairs])])


def run(hidden: torch.Tensor, head: Head, labels: torch.Tensor, upstream: torch.Tensor, chunk: int) -> ChunkedLosses:
    def objective(group: Group, scores: TokenLogps) -> torch.Tensor:
        return losses_of(scores.logps * upstream[group.tokens], group.pairs)

    with patch.object(Head, "chunk", chunk):
        return chunked_pair_losses(hidden, head, labels, PROMPTS, objective)


def relative(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 30.0)], ids=["plain", "scaled-and-capped"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("dtype", "gradient_error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_chunked_losses_and_gradients_equal_a_float64_softmax(
    transform: LogitTransform, chunk: int, dtype: torch.dtype, gradient_error: float
) -> None:
    hidden, weight, labels, upstream = inputs(dtype)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact_logps = oracle(exact_hidden, Head(exact_weight, None, transform), labels)
    exact_losses = losses_of(exact_logps * upstream, slice(0, len(PAIRS)))
    (3 * exact_losses.sum()).backward()

    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    found = run(hidden, Head(weight, None, transform), labels, upstream, chunk)
    (3 * found.total).backward()

    assert found.each.dtype == torch.float32
    # Also in bfloat16: only inputs are rounded, not logits.
    assert (found.token_logps.logps - exact_logps).abs().max() < 5e-5
    assert relative(found.each, exact_losses) < 1e-5
    assert found.total.item() == pytest.approx(exact_losses.sum().item(), rel=1e-5)
    assert relative(hidden.grad, exact_hidden.grad) < gradient_error
    assert relative(weight.grad, exact_weight.grad) < gradient_error


@pytest.mark.parametrize("chunk", CHUNKS)
def test_log_probabilities_alone_are_the_same_and_have_no_history(chunk: int) -> None:
    hidden, weight, labels, upstream = inputs(torch.float32)
    head = Head(weight.requires_grad_())
    with patch.object(Head, "chunk", chunk):
        scores = token_logps(hidden, head, labels)
    assert (scores.logps - oracle(hidden, head, labels)).abs().max() < 5e-5
    assert not scores.logps.requires_grad
    assert torch.allclose(scores.logps, run(hidden, head, labels, upstream, 1000).token_logps.logps, atol=1e-5)


def test_a_head_with_a_bias_gets_its_gradient() -> None:
    hidden, weight, labels, upstream = inputs(torch.float32)
    bias = torch.linspace(-1, 1, VOCABULARY)
    exact = bias.double().requires_grad_()
    losses_of(oracle(hidden.double(), Head(weight.double(), exact), labels) * upstream, slice(0, 4)).sum().backward()
    bias = bias.requires_grad_()
    run(hidden, Head(weight.requires_grad_(), bias), labels, upstream, 16).total.backward()
    assert relative(bias.grad, exact.grad) < 1e-5


def test_a_frozen_head_passes_gradients_on_and_gets_none() -> None:
    hidden, weight, labels, upstream = inputs(torch.float32)
    both = {}
    for trained in (True, False):
        leaf = hidden.clone().requires_grad_()
        head = Head(weight.clone().requires_grad_(trained))
        run(leaf, head, labels, upstream, 28).total.backward()
        both[trained] = gradient(leaf)
        assert (head.weight.grad is not None) == trained
    assert torch.equal(both[True], both[False])


def test_without_gradients_the_losses_are_the_same() -> None:
    hidden, weight, labels, upstream = inputs(torch.float32)
    head = Head(weight.requires_grad_())
    with torch.no_grad():
        found = run(hidden, head, labels, upstream, 28)
    assert not found.total.requires_grad
    assert torch.equal(found.each, run(hidden, head, labels, upstream, 28).each)


def test_gradients_are_handed_on_once() -> None:
    hidden, weight, labels, upstream = inputs(torch.float32)
    total = run(hidden.requires_grad_(), Head(weight), labels, upstream, 28).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the losses again"):
        total.backward()


def test_no_tokens_give_no_losses_and_zero_gradients() -> None:
    hidden, weight = torch.zeros(0, HIDDEN, requires_grad=True), torch.ones(VOCABULARY, HIDDEN, requires_grad=True)
    found = chunked_pair_losses(hidden, Head(weight), torch.zeros(0, dtype=torch.int64), (), lambda *_: torch.zeros(0))
    found.total.backward()
    assert found.each.shape == found.token_logps.logps.shape == (0,)
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize("chunk", CHUNKS)
def test_sums_of_squared_probabilities_equal_a_float64_softmax(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "chunk", chunk)
    hidden, weight, labels, _ = inputs(torch.float32)
    scores = token_logps(hidden, Head(weight), labels, with_squares=True)
    expected = (hidden.double() @ weight.double().t()).softmax(-1).square().sum(-1).log()
    assert (scores.log_sum_squares - expected).abs().max() < 5e-5
    assert token_logps(hidden, Head(weight), labels).log_sum_squares.numel() == 0, "only computed when asked for"
    seen = []

    def objective(group: Group, scores: TokenLogps) -> torch.Tensor:
        seen.append(scores.log_sum_squares)
        return scores.logps.new_zeros(len(PAIRS[group.pairs])) + scores.logps.sum()

    chunked_pair_losses(hidden, Head(weight), labels, PROMPTS, objective, with_squares=True)
    assert (torch.cat(seen) - expected).abs().max() < 5e-5


@pytest.mark.parametrize("path", PATHS)
def test_on_every_path_bfloat16_heads_have_exact_logps_or_close_ones_and_gradients_that_are_rounded_once(
    path: ProductPath,
) -> None:
    hidden, weight, labels, upstream = inputs(torch.bfloat16)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact_logps = oracle(exact_hidden, Head(exact_weight), labels)
    losses_of(exact_logps * upstream, slice(0, len(PAIRS))).sum().backward()

    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    found = run(hidden, Head(weight, products=Products.forced(path)), labels, upstream, 28)
    found.total.backward()
    close = 2**-8 * exact_logps.abs() if path == "bfloat16" else torch.zeros(())
    assert ((found.token_logps.logps - exact_logps).abs() < close + 5e-5).all()
    # Rounded to bfloat16, a relative error of at most 2^-9 each: both factors, the product of a chunk and the result;
    # and exponents, which are 30 for the labels of this test, drawn from tokens that are as improbable as that.
    roundings = 8 if path == "bfloat16" else 4
    assert relative(hidden.grad, exact_hidden.grad) < roundings * 2**-9
    assert relative(weight.grad, exact_weight.grad) < roundings * 2**-9


def test_logps_in_bfloat16_products_are_off_by_little_more_than_their_rounding_whatever_the_label() -> None:
    """Labels from the most to the least probable token, of 500 tokens that are as sure and unsure as a real model."""
    torch.manual_seed(0)
    hidden = (torch.randn(500, 64) * torch.linspace(0.05, 1.5, 500)[:, None]).bfloat16()
    weight = (torch.randn(9000, 64) * 0.5 + 0.5).bfloat16()  # logits up to 30 and more, with a common part
    head = Head(weight, products=Products.forced("bfloat16"))
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)
    ranked = exact.argsort(-1, descending=True)
    errors = []
    for rank in (0, 1, 10, 1000, -1):
        labels = ranked[:, rank]
        expected = exact.gather(-1, labels[:, None])[:, 0]
        found = token_logps(hidden, head, labels, with_squares=True)
        error = found.logps - expected
        assert (error.abs() <= 2**-8 * expected.abs() + 2**-10).all(), rank
        assert abs(error.mean()) < 4 * error.std() / 500**0.5 + 1e-5, "a random sign: no bias that a sum would add up"
        squares = exact.exp().square().sum(-1).log()
        assert ((found.log_sum_squares - squares).abs() <= 2**-7 * (1 + expected.abs())).all(), rank
        errors.append(error.abs().mean())
    assert max(errors[:2]) < 1e-3
    rounded = (hidden @ weight.t()).float().log_softmax(-1).gather(-1, ranked[:, :1])
    assert (rounded - exact.gather(-1, ranked[:, :1])).abs().mean() > 10 * errors[0], "logits rounded as they are"


def test_a_certain_label_has_a_logp_of_almost_zero_to_many_digits() -> None:
    hidden, weight = (
        torch.tensor([[4.0, 1.0]]).bfloat16(),
        torch.tensor([[3.0, 0.1], [0.25, 0.0], [0.5, 0.5]]).bfloat16(),
    )
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)[0, 0]
    found = token_logps(hidden, Head(weight, products=Products.forced("bfloat16")), torch.tensor([0])).logps[0]
    assert exact > -1e-4
    assert abs(found - exact) < 2**-5 * abs(exact)


def test_a_label_that_is_too_improbable_for_bfloat16_products_takes_float32_logits() -> None:
    weight = torch.tensor([[-10.0], [10.0], [10.0]]).bfloat16()
    hidden = torch.tensor([[10.0], [2.5]]).bfloat16()
    found = token_logps(hidden, Head(weight, products=Products.forced("bfloat16")), torch.tensor([0, 0])).logps
    assert found.tolist() == pytest.approx([-200.0 - math.log(2), -50.0 - math.log(2)], abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_head_products_of_a_vocabulary_of_several_blocks_are_those_of_float64(path: ProductPath) -> None:
    torch.manual_seed(0)
    rows = 2 * VOCABULARY_BLOCK + 300
    weight, hidden = torch.randn(rows, 16).bfloat16(), torch.randn(24, 16).bfloat16()
    logits_grad, total = torch.randn(24, rows), torch.ones(rows, 16)
    products = HeadProducts(weight, Products.forced(path))
    assert relative(products.logits(hidden), hidden.double() @ weight.double().t()) < 1e-6
    exact = logits_grad.double() @ weight.double()
    assert relative(products.hidden_grad(logits_grad), exact) < 2 * 2**-9
    products.add_weight_grad(total, logits_grad, hidden.float())
    assert relative(total, 1 + logits_grad.double().t() @ hidden.double()) < 2 * 2**-9
