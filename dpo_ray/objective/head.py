"""From last hidden states to log-probabilities and losses, without ever holding (tokens x vocabulary) logits.

N = completion tokens, D = hidden size, V = vocabulary (of a head that ranks share, the part of this rank), B = pairs
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.objective.logps import TokenLogps
from dpo_ray.objective.precision import bfloat16_products

CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
"""Size of the float32 logits of one chunk, by kind of device; the only (tokens x V) memory in use at a time."""


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


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of hidden states."""

    weight: Tensor
    """(V, D), in the dtype of the hidden states."""
    bias: Tensor | None = None
    """(V,)"""
    transform: LogitTransform = LogitTransform()
    group: dist.ProcessGroup | None = None
    """The ranks that have the rows between them and are given the same tokens; None: all rows are here."""
    first: int = 0
    """The token id of the first row that is here."""

    def widened(self) -> "Head":
        """The same for products of bfloat16 numbers held as float32, where a CPU wants them so."""
        on_cpu = self.weight.device.type == "cpu"
        bias = None if self.bias is None else self.bias.float()
        weight = self.weight.float() if on_cpu and self.weight.dtype == torch.bfloat16 else self.weight
        return replace(self, weight=weight, bias=bias)

    @property
    def chunk(self) -> int:
        """Tokens whose logits fit CHUNK_BYTES."""
        return max(1, CHUNK_BYTES.get(self.weight.device.type, 2**28) // (4 * self.weight.shape[0]))

    def over_ranks(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce, in place, what each rank has found in its rows."""
        if self.group is not None:
            dist.all_reduce(values, op, group=self.group)
        return values

    def rows_of(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(n, 1) row of each label, and (n, 1) whether it is here; any row where not, and None if all are here."""
        rows = labels[:, None] - self.first
        if self.group is None:
            return rows, None
        here = (rows >= 0) & (rows < self.weight.shape[0])
        return torch.where(here, rows, 0), here


class ChunkedLosses(NamedTuple):
    """Losses of B pairs."""

    total: Tensor
    """() sum of the losses; the only one with history."""
    each: Tensor
    """(B,) float32."""
    scores: TokenLogps
    """Of all completion tokens."""


class Group(NamedTuple):
    """Consecutive pairs whose losses are computed together, and their completion tokens."""

    pairs: slice
    tokens: slice


Objective = Callable[[Group, TokenLogps], Tensor]
"""(group, scores of its tokens) -> one loss for each of its pairs."""


@torch.no_grad()
def token_logps(
    hidden: Tensor, head: Head, labels: Tensor, *, chunk: int | None = None, with_squares: bool = False
) -> TokenLogps:
    """Log-probability of each label, in float32 and without history.

    Args:
        hidden: (N, D) last hidden states, each at the position before its label.
        head: of the model.
        labels: (N,) token ids.
        chunk: tokens whose logits exist at a time; by default ``head.chunk``.
        with_squares: also give the sums of squared probabilities, for WPO weights.
    """
    head, scores = head.widened(), _empty_scores(labels, with_squares)
    for part in _parts(slice(0, labels.numel()), chunk or head.chunk):
        _softmax(hidden[part], head, labels[part]).write(scores, part, head)
    return scores


def chunked_pair_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    pair_tokens: Sequence[int],
    objective: Objective,
    *,
    chunk: int | None = None,
    with_squares: bool = False,
    together: bool = False,
) -> ChunkedLosses:
    """Losses of pairs, and in the same pass over the logits their gradients.

    The pairs are taken in groups whose logits fit one chunk: log-probabilities, losses and the gradients by hidden
    states and head are computed while the logits are there, so that the backward pass only hands the gradients on. A
    pair that is larger than a chunk has its logits computed a second time. Gradients by the head are summed in float32.
    Of a head that ranks share, each rank gets the losses, the gradients by hidden states, and those by its own rows.

    Args:
        hidden: (N, D) last hidden states, each at the position before its label.
        head: of the model.
        labels: (N,) token ids.
        pair_tokens: completion tokens of each of the B pairs, in the order of the labels; N in all, unless other ranks
            have some of them.
        objective: losses of a group's pairs.
        chunk: tokens whose logits exist at a time; by default ``head.chunk``.
        with_squares: also give the objective the sums of squared probabilities.
        together: take all pairs as one group, as an objective must have it that is a collective of ranks with different
            tokens of the same pairs.
    """
    total, each, *scores = _PairLosses.apply(
        hidden, head.weight, head.bias, head, labels, tuple(pair_tokens), objective, chunk or head.chunk,
        with_squares, together, torch.is_grad_enabled(),
    )  # fmt: skip
    return ChunkedLosses(total, each, TokenLogps(*scores))


class _PairLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        pair_tokens: Sequence[int],
        objective: Objective,
        chunk: int,
        with_squares: bool,
        together: bool,
        with_gradients: bool,
    ) -> tuple[Tensor, ...]:
        head, scores = replace(head, weight=weight, bias=bias).widened(), _empty_scores(labels, with_squares)
        each = scores.logps.new_empty(len(pair_tokens))
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        gradients = _Gradients(hidden, weight, bias, wanted)
        whole = Group(slice(0, len(pair_tokens)), slice(0, labels.numel()))
        for group in [whole] if together else _groups(pair_tokens, chunk):
            parts = list(_parts(group.tokens, chunk))
            for part in parts:
                softmax = _softmax(hidden[part], head, labels[part])
                softmax.write(scores, part, head)
            each[group.pairs], slopes = _slopes(objective, group, scores, with_gradients)
            if not any(wanted):
                continue
            for part in parts:
                if len(parts) > 1:  # the logits of the part before have taken their place
                    softmax = _softmax(hidden[part], head, labels[part])
                of_part = slice(part.start - group.tokens.start, part.stop - group.tokens.start)
                gradients.add(softmax, hidden, head, labels, part, slopes[of_part])
        if gradients.by_hidden is not None:
            head.over_ranks(gradients.by_hidden)
        ctx.gradients, ctx.dtypes = gradients, [None if of is None else of.dtype for of in (hidden, weight, bias)]
        ctx.mark_non_differentiable(each, *scores)
        return each.sum(), each, *scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of these losses were handed on already; compute the losses again")
        found = (gradients.by_hidden, gradients.by_weight, gradients.by_bias)
        scaled = [
            None if of is None else of.mul_(grads[0]).to(dtype) for of, dtype in zip(found, ctx.dtypes, strict=True)
        ]
        return *scaled, *[None] * 8


class _Softmax(NamedTuple):
    """The distributions that n hidden states predict, as far as they are computed in one go."""

    exponentials: Tensor
    """(n, V) of the logits less the row's largest; over ``sums``, the probabilities."""
    sums: Tensor
    """(n,) over all rows, wherever they are."""
    logps: Tensor
    """(n,) of the labels."""
    slope: Tensor | float
    """Derivative of the logits by the head's output."""

    def write(self, scores: TokenLogps, part: slice, head: Head) -> None:
        """Enter what is wanted of it at ``part`` of the scores."""
        scores.logps[part] = self.logps
        if scores.log_sum_squares.numel():
            squares = head.over_ranks(torch.linalg.vector_norm(self.exponentials, dim=-1).square())
            scores.log_sum_squares[part] = squares.log() - 2 * self.sums.log()


def _softmax(hidden: Tensor, head: Head, labels: Tensor) -> _Softmax:
    logits = _product(hidden, head.weight.t(), hidden.dtype)
    if head.bias is not None:
        logits += head.bias
    logits = head.transform(logits)
    slope = head.transform.slope(logits)
    largest = head.over_ranks(logits.amax(-1, keepdim=True), dist.ReduceOp.MAX)
    rows, here = head.rows_of(labels)
    of_labels = logits.gather(-1, rows) - largest
    if here is not None:
        of_labels.masked_fill_(~here, 0.0)
    # In place: each pass over (n, V) costs memory bandwidth, which is also why nothing is divided by the sums.
    exponentials = logits.sub_(largest).exp_()
    sums, of_labels = head.over_ranks(torch.stack((exponentials.sum(-1), of_labels.squeeze(-1))))
    return _Softmax(exponentials, sums, of_labels - sums.log(), slope)


def _slopes(objective: Objective, group: Group, scores: TokenLogps, wanted: bool) -> tuple[Tensor, Tensor]:
    """A group's losses, and the derivative of their sum by the log-probability of each of its tokens."""
    logps, squares = scores.logps[group.tokens], scores.log_sum_squares[group.tokens]
    if not wanted:
        return objective(group, TokenLogps(logps, squares)), logps
    with torch.enable_grad():
        leaf = logps.clone().requires_grad_()
        losses = objective(group, TokenLogps(leaf, squares))
        (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), slopes


class _Gradients:
    """Gradients of the losses by hidden states and head, in float32; None where not wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]) -> None:
        self.by_hidden, self.by_weight, self.by_bias = (
            torch.zeros(of.shape, dtype=torch.float32, device=of.device) if of is not None and want else None
            for of, want in zip((hidden, weight, bias), wanted, strict=True)
        )

    def add(self, softmax: _Softmax, hidden: Tensor, head: Head, labels: Tensor, part: slice, slopes: Tensor) -> None:
        """Add those of a part of the tokens; its exponentials are used up.

        d logp[label] / d logit = [is label] - exponential / sum. The division and the slope, which are one factor a
        token, wait until they meet something smaller than (n, V).
        """
        rows, here = head.rows_of(labels[part])
        own = softmax.sums[:, None] if here is None else torch.where(here, softmax.sums[:, None], 0.0)
        by_logits = softmax.exponentials.scatter_add_(-1, rows, -own)
        if isinstance(softmax.slope, Tensor) or softmax.slope != 1.0:
            by_logits.mul_(softmax.slope)
        factor = (-slopes / softmax.sums)[:, None]  # (n, 1)
        if self.by_bias is not None:
            self.by_bias += (by_logits * factor).sum(0)
        if self.by_hidden is not None:
            self.by_hidden[part] = _product(by_logits, head.weight, hidden.dtype) * factor
        if self.by_weight is not None:
            _add_product(self.by_weight, by_logits.t(), hidden[part] * factor, hidden.dtype)


def _empty_scores(labels: Tensor, with_squares: bool) -> TokenLogps:
    logps = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    return TokenLogps(logps, logps.new_empty(labels.shape if with_squares else 0))


def _parts(tokens: slice, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, tokens.stop)) for start in range(tokens.start, tokens.stop, chunk))


def _groups(pair_tokens: Sequence[int], chunk: int) -> Iterator[Group]:
    """As many consecutive pairs as fit a chunk, but at least one."""
    pair = token = 0
    for after, tokens in enumerate(itertools.accumulate(pair_tokens), 1):
        following = pair_tokens[after] if after < len(pair_tokens) else chunk
        if tokens + following - token > chunk or after == len(pair_tokens):
            yield Group(slice(pair, after), slice(token, tokens))
            pair, token = after, tokens


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with inputs rounded to ``dtype`` and sums in float32.

    Logits rounded to bfloat16 would be off by about 0.05 nats a token (|logit| near 20 has steps of 0.125), which a
    sequence of 100 tokens turns into half a nat of noise on the quantity that the loss is made of.
    """
    if dtype != torch.bfloat16:
        return a @ b
    if a.is_cuda:
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    with bfloat16_products():
        return a.float() @ b.float()


def _add_product(to: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and a.is_cuda:
        torch.addmm(to, a.to(dtype), b.to(dtype), out_dtype=torch.float32, out=to)
        return
    with bfloat16_products() if dtype == torch.bfloat16 else contextlib.nullcontext():
        to.addmm_(a, b)
