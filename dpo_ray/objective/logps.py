"""Log-probabilities of completions, without ever holding (tokens x vocabulary) logits.

N = completion tokens, D = hidden size, V = vocabulary, S = sequences, B = pairs
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 96 * 2**20
"""Size of the float32 logits of one chunk; the only (tokens x V) memory in use at a time."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of the two completions of B pairs under one model."""

    chosen: Tensor
    """(B,) summed over tokens, nats."""
    rejected: Tensor
    """(B,)"""
    chosen_tokens: Tensor
    """(B,) completion lengths in tokens."""
    rejected_tokens: Tensor
    """(B,)"""
    weights: Tensor | None = None
    """(B,) factors of the pairs' losses, without history; None weighs all pairs alike."""


class TokenScores(NamedTuple):
    """What a head says of N labels. A tuple, so that FSDP finds the tensors in what a module returns."""

    logps: Tensor
    """(N,) log-probability of each label, float32, nats."""
    log_sum_squares: Tensor
    """(N,) log of the sum of squared probabilities over the vocabulary, without history; (0,) unless asked for."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What some architectures do to logits after the head: scale, then soft cap."""

    scale: float = 1.0
    softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv:2408.00118, section 2)."""

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Derivative of the transformed logits by the head's output."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (transformed / self.softcap).square())


class _TokenLogps(torch.autograd.Function):
    """Log-probability of each label; logits exist one chunk at a time, forward and backward.

    The backward pass recomputes a chunk's logits from the saved log-sum-exp: one more matrix product in exchange for
    never storing N x V numbers. The gradient by the head is summed over chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        chunk: int,
        with_squares: bool,
    ) -> tuple[Tensor, Tensor]:
        logps = hidden.new_empty(labels.shape, dtype=torch.float32)
        normalizers = torch.empty_like(logps)
        log_sum_squares = logps.new_empty(labels.shape if with_squares else 0)
        head = _Head(weight, bias)
        for start in range(0, labels.numel(), chunk):
            part = slice(start, start + chunk)
            logits = transform(head(hidden[part]))  # (chunk, V) float32
            normalizers[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, labels[part, None]).squeeze(-1) - normalizers[part]
            if with_squares:
                log_sum_squares[part] = (2 * logits).logsumexp(-1) - 2 * normalizers[part]
        ctx.save_for_backward(hidden, weight, bias, labels, normalizers)
        ctx.transform, ctx.chunk = transform, chunk
        ctx.mark_non_differentiable(log_sum_squares)
        return logps, log_sum_squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps, _ = grads
        hidden, weight, bias, labels, normalizers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=weight.device)
        head = _Head(weight, bias)
        for start in range(0, labels.numel(), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = ctx.transform(head(hidden[part]))
            slope, upstream = ctx.transform.slope(logits), grad_logps[part, None]
            # d logp[label] / d logit = [is label] - softmax, in place: each pass over (chunk, V) costs memory bandwidth
            grad = logits.sub_(normalizers[part, None]).exp_().mul_(-upstream)
            grad.scatter_add_(-1, labels[part, None], upstream)
            if isinstance(slope, Tensor) or slope != 1.0:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight += grad.t() @ hidden[part]
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


class _Head:
    """Hidden states to float32 logits, the products in the dtype of the weight and the sums in float32.

    Logits rounded to bfloat16 would be off by about 0.05 nats a token (|logit| near 20 has steps of 0.125), which a
    sequence of 100 tokens turns into half a nat of noise on the quantity that the loss is made of.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.float()
        self.narrow = weight.dtype == torch.bfloat16
        # A float32 product that may use bfloat16 inputs loses nothing here, where the inputs are bfloat16 numbers.
        self.weight = weight.float() if self.narrow and not weight.is_cuda else weight

    def __call__(self, hidden: Tensor) -> Tensor:
        if not self.narrow:
            logits = hidden @ self.weight.t()
        elif hidden.is_cuda:
            logits = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        else:
            with bfloat16_products():
                logits = hidden.float() @ self.weight.t()
        return logits if self.bias is None else logits + self.bias


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 matrix products on a CPU round their inputs, not their sums, to bfloat16: as fast as bfloat16."""
    mkldnn: Any = torch.backends.mkldnn  # as imported, an object with more attributes than the module declares
    settings = mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    chunk_tokens: int | None = None,
    with_squares: bool = False,
) -> TokenScores:
    """Log-probability of each label under a softmax head, in float32.

    Args:
        hidden: (N, D) last hidden states, each at the position before its label.
        weight: (V, D) of the head, in the dtype of ``hidden``.
        labels: (N,) token ids.
        bias: (V,) of the head, if it has one.
        transform: scale and soft cap of the logits.
        chunk_tokens: tokens whose logits exist at a time; by default as many as fit CHUNK_BYTES.
        with_squares: also give the sums of squared probabilities, for WPO weights; one more pass over the logits.

    Returns:
        The log-probabilities, differentiable by ``hidden``, ``weight`` and ``bias``.
    """
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return TokenScores(
        *_TokenLogps.apply(hidden, weight, bias, labels, transform or LogitTransform(), chunk, with_squares)
    )


def sequence_sums(values: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Sum token values into their sequences.

    Args:
        values: (N,) float32.
        sequence: (N,) index in [0, S) of the sequence each token belongs to.
        sequences: S.

    Returns:
        (S,) float32.
    """
    return values.new_zeros(sequences).index_add(0, sequence, values)


def as_pairs(logps: Tensor, tokens: Tensor, weights: Tensor | None = None) -> PairLogps:
    """Pairs from (2B,) sequences that alternate chosen, rejected; the weight of a pair is the product of its two."""
    product = None if weights is None else weights[0::2] * weights[1::2]
    return PairLogps(logps[0::2], logps[1::2], tokens[0::2], tokens[1::2], product)


def wpo_weights(scores: TokenScores, sequence: Tensor, tokens: Tensor) -> Tensor:
    """How likely the policy is to write each sequence: the weights of WPO.

    The geometric mean, over the sequence's tokens, of the label's probability over what a token drawn from the policy
    has on average (arXiv:2406.11827, Eq. 2 with the alignment of its section 3.2).

    Args:
        scores: of N tokens, with sums of squares.
        sequence: (N,) index in [0, S).
        tokens: (S,) lengths.

    Returns:
        (S,) float32, without history.
    """
    aligned = scores.logps.detach() - scores.log_sum_squares
    return (sequence_sums(aligned, sequence, tokens.numel()) / tokens).exp()
