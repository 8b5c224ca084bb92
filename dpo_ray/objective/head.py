"""Log-probabilities and losses from last hidden states, without (tokens, vocabulary) logits in memory.

N = completion tokens, n = tokens of one chunk, D = hidden size, V = vocabulary rows on this rank, B = pairs
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.objective.head_bfloat16 import label_softmax
from dpo_ray.objective.head_products import VOCABULARY_BLOCK, HeadProducts
from dpo_ray.objective.logps import TokenLogps
from dpo_ray.objective.precision import ROUNDED, Products

CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
"""Size of the float32 logits of one chunk, by device type; the only (n, V) memory in use at a time."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Scale and soft cap that some architectures apply to the logits."""

    scale: float = 1.0
    softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv:2408.00118, section 2)."""

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def derivative(self, transformed: Tensor) -> Tensor | float:
        """Derivative of the transformed logits with respect to the head's output."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (transformed / self.softcap).square())


@dataclass(frozen=True, slots=True)
class Head:
    """The output projection from hidden states to logits, optionally sharded over the vocabulary."""

    weight: Tensor
    """(V, D), in the dtype of the hidden states."""
    bias: Tensor | None = None
    """(V,)"""
    transform: LogitTransform = LogitTransform()
    group: dist.ProcessGroup | None = None
    """Ranks that shard the vocabulary and compute the same tokens; None for an unsharded head."""
    first: int = 0
    """Token id of the first row on this rank."""
    products: Products = ROUNDED
    """Paths of the products of bfloat16 tensors on a CPU."""

    @property
    def is_plain(self) -> bool:
        """True if the logits are the product of hidden states and weights alone, and all on this rank."""
        return self.bias is None and self.group is None and self.transform == LogitTransform()

    @property
    def chunk(self) -> int:
        """Number of tokens whose logits exist at a time: those that fit CHUNK_BYTES."""
        return max(1, CHUNK_BYTES.get(self.weight.device.type, 2**28) // (4 * self.weight.shape[0]))

    def all_reduce(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce in place over the ranks that shard the vocabulary."""
        if self.group is not None:
            dist.all_reduce(values, op, group=self.group)
        return values

    def local_rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1) local row of each label, and (n, 1) True if this rank has it, else row 0."""
        rows = labels[:, None] - self.first
        is_local = (rows >= 0) & (rows < self.weight.shape[0])
        return torch.where(is_local, rows, 0), is_local


class ChunkedLosses(NamedTuple):
    """Losses of B pairs."""

    total: Tensor
    """() sum of the losses; the only output with a gradient."""
    each: Tensor
    """(B,) loss of each pair, float32."""
    token_logps: TokenLogps
    """Log-probabilities of all N completion tokens."""


class Group(NamedTuple):
    """Consecutive pairs whose losses are computed together, with their sequences and completion tokens."""

    pairs: slice
    sequences: slice
    tokens: slice


class Counts(NamedTuple):
    """Sizes of one prompt. Its pairs may share completions, so their losses are computed together."""

    pairs: int
    sequences: int
    tokens: int
    """Completion tokens."""


def whole_group(prompts: Sequence[Counts]) -> Group:
    """All pairs as one group."""
    return Group(*(slice(0, sum(counts)) for counts in zip((0, 0, 0), *prompts, strict=True)))


Objective = Callable[[Group, TokenLogps], Tensor]
"""(group, log-probabilities of its tokens) -> one loss per pair of the group."""


@torch.no_grad()
def token_logps(hidden: Tensor, head: Head, labels: Tensor, *, with_squares: bool = False) -> TokenLogps:
    """Log-probability of each label, in float32 and without gradient.

    Args:
        hidden: (N, D) last hidden states, each at the position before its label.
        head: output projection.
        labels: (N,) token ids.
        with_squares: also return sums of squared probabilities, for WPO weights.
    """
    logps, products = _empty_logps(labels, with_squares), HeadProducts(head.weight, head.products)
    for part in _parts(slice(0, labels.numel()), head.chunk):
        softmax(hidden[part], head, products, labels[part]).store(logps, part, head)
    return logps


def chunked_pair_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    prompts: Sequence[Counts],
    objective: Objective,
    *,
    with_squares: bool = False,
    together: bool = False,
) -> ChunkedLosses:
    """Losses of pairs; their gradients are computed in the same pass over the logits.

    Prompts are processed in groups whose logits fit one chunk. Log-probabilities, losses and the gradients with respect
    to hidden states and head are computed while the logits of a group exist; backward only scales and returns the
    stored gradients. The logits of a prompt that is larger than a chunk are computed twice. Head gradients are
    accumulated in float32. With a vocabulary-parallel head, each rank returns all losses, the full hidden-state
    gradient, and the weight gradient of its own rows.

    Args:
        hidden: (N, D) last hidden states, each at the position before its label.
        head: output projection.
        labels: (N,) token ids.
        prompts: pairs, sequences and completion tokens of each prompt, in the order of the labels; the tokens sum to
            N, unless context parallel ranks hold some of them.
        objective: losses of a group of pairs.
        with_squares: also pass sums of squared probabilities to the objective.
        together: process all pairs as one group; required for an objective that communicates with context parallel
            ranks, which hold other tokens of the same pairs.
    """
    total, each, *logps = _PairLosses.apply(
        hidden, head.weight, head.bias, head, labels, tuple(prompts), objective, with_squares,
        together, torch.is_grad_enabled(),
    )  # fmt: skip
    return ChunkedLosses(total, each, TokenLogps(*logps))


class _PairLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        prompts: Sequence[Counts],
        objective: Objective,
        with_squares: bool,
        together: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        head, logps = replace(head, weight=weight, bias=bias), _empty_logps(labels, with_squares)
        products = HeadProducts(weight, head.products)
        whole = whole_group(prompts)._replace(tokens=slice(0, labels.numel()))
        each = logps.logps.new_empty(whole.pairs.stop)
        needs_grad = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        gradients = _Gradients(hidden, weight, bias, needs_grad)
        for group in [whole] if together else _groups(prompts, head.chunk):
            parts = list(_parts(group.tokens, head.chunk))
            latest = None
            for part in parts:
                latest = softmax(hidden[part], head, products, labels[part])
                latest.store(logps, part, head)
            each[group.pairs], logps_grad = _losses_and_gradient(objective, group, logps, grad_enabled)
            if not any(needs_grad):
                continue
            for part in parts:
                if latest is None or len(parts) > 1:  # only the logits of the last part are still in memory
                    latest = softmax(hidden[part], head, products, labels[part])
                in_group = slice(part.start - group.tokens.start, part.stop - group.tokens.start)
                gradients.accumulate(latest, hidden, head, products, labels, part, logps_grad[in_group])
        if gradients.hidden is not None:
            head.all_reduce(gradients.hidden)
        ctx.gradients, ctx.dtypes = gradients, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(each, *logps)
        return each.sum(), each, *logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward was called twice and the gradients are freed; compute the losses again")
        stored = (gradients.hidden, gradients.weight, gradients.bias)
        scaled = [None if g is None else g.mul_(grads[0]).to(d) for g, d in zip(stored, ctx.dtypes, strict=True)]
        return *scaled, *[None] * 7


class _Softmax(NamedTuple):
    """Softmax over the vocabulary for one chunk, kept as unnormalized exponentials."""

    exponentials: Tensor
    """(n, V) exp(logit - a number of the token); divided by ``sums``, the probabilities. Overwritten by gradients."""
    sums: Tensor
    """(n,) over the vocabulary of all ranks."""
    label_grad: Tensor
    """(n,) exponential of the label minus ``sums``: the negative sum of those of all other tokens."""
    logps: Tensor
    """(n,) log-probabilities of the labels."""
    derivative: Tensor | float
    """Derivative of the logits with respect to the head's output."""

    def store(self, logps: TokenLogps, part: slice, head: Head) -> None:
        """Write the log-probabilities, and the sums of squares if there is room for them, to ``logps[part]``."""
        logps.logps[part] = self.logps
        if logps.log_sum_squares.numel():
            # In blocks, and divided first: squares of exponentials relative to an improbable label overflow float32.
            blocks = self.exponentials.split(VOCABULARY_BLOCK, -1)
            squares = torch.stack([(block / self.sums[:, None]).square().sum(-1) for block in blocks]).sum(0)
            logps.log_sum_squares[part] = head.all_reduce(squares).log()


def softmax(hidden: Tensor, head: Head, products: HeadProducts, labels: Tensor) -> _Softmax:
    """Softmax over the vocabulary of a chunk's n tokens, on the paths of ``products``."""
    relative = None
    if products.in_bfloat16 and head.is_plain:
        relative = label_softmax(hidden.to(head.weight.dtype), head.weight, labels)
    if relative is None:
        return _float_softmax(hidden, head, products, labels)
    exponentials, label, others = relative
    return _Softmax(exponentials, label + others, -others, -torch.log1p(others / label), 1.0)


def _float_softmax(hidden: Tensor, head: Head, products: HeadProducts, labels: Tensor) -> _Softmax:
    logits = products.logits(hidden)  # (n, V)
    if head.bias is not None:
        logits += head.bias.float()
    logits = head.transform(logits)
    derivative = head.transform.derivative(logits)
    largest = head.all_reduce(logits.amax(-1, keepdim=True), dist.ReduceOp.MAX)  # (n, 1)
    rows, is_local = head.local_rows(labels)
    label_logits = (logits.gather(-1, rows) - largest).masked_fill_(~is_local, 0.0)
    # In place and not divided by the sums: each pass over (n, V) costs memory bandwidth.
    exponentials = logits.sub_(largest).exp_()
    sums, label_logits = head.all_reduce(torch.stack((exponentials.sum(-1), label_logits.squeeze(-1))))  # (n,) each
    return _Softmax(exponentials, sums, label_logits.exp() - sums, label_logits - sums.log(), derivative)


def _losses_and_gradient(
    objective: Objective, group: Group, logps: TokenLogps, grad_enabled: bool
) -> tuple[Tensor, Tensor]:
    """Losses of a group, and the gradient of their sum with respect to the log-probability of each of its tokens."""
    values, squares = logps.logps[group.tokens], logps.log_sum_squares[group.tokens]
    if not grad_enabled:
        return objective(group, TokenLogps(values, squares)), values
    with torch.enable_grad():
        leaf = values.clone().requires_grad_()
        losses = objective(group, TokenLogps(leaf, squares))
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


class _Gradients:
    """Gradients of the total loss with respect to hidden states and head, in float32; None where not needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: Sequence[bool]) -> None:
        self.hidden, self.weight, self.bias = (
            torch.zeros(x.shape, dtype=torch.float32, device=x.device) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), needs_grad, strict=True)
        )

    def accumulate(
        self,
        softmax: _Softmax,
        hidden: Tensor,
        head: Head,
        products: HeadProducts,
        labels: Tensor,
        part: slice,
        logps_grad: Tensor,
    ) -> None:
        """Add the gradients of the tokens in ``part``; overwrites ``softmax.exponentials``.

        d logp[label] / d logit = [is label] - exponential / sum. Per-token factors are applied after the matmul, which
        saves a pass over (n, V).
        """
        rows, is_local = head.local_rows(labels[part])
        logits_grad = softmax.exponentials  # (n, V), times ``factor``
        # By indices: ``scatter_`` would copy a transposed matrix.
        at_label = torch.arange(len(rows), device=rows.device), rows[:, 0]
        label_grad = softmax.label_grad.to(logits_grad.dtype)
        logits_grad[at_label] = torch.where(is_local[:, 0], label_grad, logits_grad[at_label])
        if isinstance(softmax.derivative, Tensor) or softmax.derivative != 1.0:
            logits_grad.mul_(softmax.derivative)
        factor = -logps_grad[:, None] / softmax.sums[:, None]  # (n, 1)
        if self.bias is not None:
            self.bias += (logits_grad * factor).sum(0)
        if self.hidden is not None:
            self.hidden[part] = products.hidden_grad(logits_grad) * factor
        if self.weight is not None:
            products.add_weight_grad(self.weight, logits_grad, hidden[part] * factor)


def _empty_logps(labels: Tensor, with_squares: bool) -> TokenLogps:
    logps = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    return TokenLogps(logps, logps.new_empty(labels.shape if with_squares else 0))


def _parts(tokens: slice, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, tokens.stop)) for start in range(tokens.start, tokens.stop, chunk))


def _groups(prompts: Sequence[Counts], chunk: int) -> Iterator[Group]:
    """Groups of as many consecutive prompts as fit a chunk, at least one."""
    start = stop = Counts(0, 0, 0)
    for counts in prompts:
        following = Counts(*(before + more for before, more in zip(stop, counts, strict=True)))
        if stop != start and following.tokens - start.tokens > chunk:
            yield Group(*map(slice, start, stop))
            start = stop
        stop = following
    if stop != start:
        yield Group(*map(slice, start, stop))
