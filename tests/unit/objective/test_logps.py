"""Chunked log-probabilities against a float64 softmax over all logits at once."""

import pytest
import torch

from dpo_ray.objective.logps import LogitTransform, TokenScores, sequence_sums, token_logps, wpo_weights

TOKENS, HIDDEN, VOCABULARY = 70, 32, 300


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator)
    return hidden, weight, labels, upstream


def oracle(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    transform: LogitTransform,
) -> torch.Tensor:
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 30.0)], ids=["plain", "scaled-and-capped"])
@pytest.mark.parametrize("chunk", [1, 16, 1000])
@pytest.mark.parametrize(("dtype", "gradient_error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_chunks_give_the_logps_and_gradients_of_a_float64_softmax(
    transform: LogitTransform, chunk: int, dtype: torch.dtype, gradient_error: float
) -> None:
    hidden, weight, labels, upstream = inputs(dtype)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = oracle(exact_hidden, exact_weight, None, labels, transform)
    (expected * upstream).sum().backward()

    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    found = token_logps(hidden, weight, labels, transform=transform, chunk_tokens=chunk).logps
    (found * upstream).sum().backward()

    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 5e-5, "also in bfloat16: only the inputs are rounded, never the logits"
    assert relative(hidden.grad, exact_hidden.grad) < gradient_error
    assert relative(weight.grad, exact_weight.grad) < gradient_error


def test_a_head_with_a_bias_gets_its_gradient() -> None:
    hidden, weight, labels, upstream = inputs(torch.float32)
    bias = torch.linspace(-1, 1, VOCABULARY)
    exact = bias.double().requires_grad_()
    (oracle(hidden.double(), weight.double(), exact, labels, LogitTransform()) * upstream).sum().backward()
    bias = bias.requires_grad_()
    (token_logps(hidden, weight.requires_grad_(), labels, bias=bias, chunk_tokens=16).logps * upstream).sum().backward()
    assert relative(bias.grad, exact.grad) < 1e-5


def test_no_tokens_give_no_logps_and_zero_gradients() -> None:
    hidden, weight = torch.zeros(0, HIDDEN, requires_grad=True), torch.ones(VOCABULARY, HIDDEN, requires_grad=True)
    logps = token_logps(hidden, weight, torch.zeros(0, dtype=torch.int64)).logps
    logps.sum().backward()
    assert logps.shape == (0,)
    assert weight.grad.abs().sum() == 0


def test_sequence_sums_add_tokens_to_their_sequences() -> None:
    sums = sequence_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 0, 2]), 3)
    assert sums.tolist() == [5.0, 0.0, 10.0]


@pytest.mark.parametrize("chunk", [16, 1000])
def test_sums_of_squared_probabilities_are_those_of_a_float64_softmax_and_leave_the_gradient_alone(chunk: int) -> None:
    hidden, weight, labels, upstream = inputs(torch.float32)
    hidden.requires_grad_()
    plain = token_logps(hidden, weight, labels, chunk_tokens=chunk)
    (plain.logps * upstream).sum().backward()
    gradient, hidden.grad = hidden.grad, None
    scores = token_logps(hidden, weight, labels, chunk_tokens=chunk, with_squares=True)
    (scores.logps * upstream).sum().backward()
    expected = (hidden.double() @ weight.double().t()).softmax(-1).square().sum(-1).log()
    assert (scores.log_sum_squares - expected).abs().max() < 5e-5
    assert not scores.log_sum_squares.requires_grad
    assert torch.equal(hidden.grad, gradient)
    assert plain.log_sum_squares.numel() == 0, "only computed when asked for"


def test_wpo_weights_are_geometric_means_of_a_labels_probability_over_a_drawn_tokens() -> None:
    # sequence 0: probabilities 1/2 and 1/8 where a drawn token has 1/2 and 1/2: (1 * 1/4) ** 1/2 = 1/2
    logps, squares = torch.tensor([0.5, 0.125, 0.25]).log(), torch.tensor([0.5, 0.5, 1.0]).log()
    weights = wpo_weights(TokenScores(logps, squares), torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    assert weights.tolist() == pytest.approx([0.5, 0.25])
