"""The scorer: a language model whose forward pass returns log-probabilities or losses instead of logits.

Backbone and head sit in one module so that FSDP2 shards and gathers them as one root; prompt positions never reach the
head, and logits exist one chunk at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dpo_ray.data.packing import PackedRow, attention_mask
from dpo_ray.model.attention import PACKED
from dpo_ray.model.flex import FLEX, span_mask
from dpo_ray.model.tensor_parallel import local_head
from dpo_ray.objective import head
from dpo_ray.objective.head import Group, Head, LogitTransform, Losses
from dpo_ray.objective.logps import PairLogps, TokenScores, as_pairs, sequence_sums, wpo_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReadOut = Callable[[Tensor, Head], Any]
"""(hidden, head) -> what is wanted of a row; hidden: (N, D) before each completion token."""
Scores = Callable[[PackedRow, ReadOut], Any]
"""A Scorer, or what answers like one."""
Weighting = Literal["none", "wpo"]


class Scorer(nn.Module):
    """A causal language model that scores completions.

    Args:
        model: a transformers causal language model; its names are kept below ``model.``.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model
        self.transform = logit_transform(model.config)
        self.attention = ATTENTION.get(model.config._attn_implementation or "", _masked)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, the units of sharding and checkpointing."""
        decoder: Any = self.model.get_decoder()
        return decoder.layers

    def forward(self, row: PackedRow, read_out: ReadOut) -> Any:
        """What ``read_out`` makes of the hidden states before the completion tokens, in the order of ``row.labels``.

        The head is read out within the forward pass because only there FSDP has its weights in one piece.
        """
        hidden = self.model.get_decoder()(
            input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, **self.attention(row)
        ).last_hidden_state  # (1, T, D)
        return read_out(hidden[0, row.source], local_head(self.model, self.transform))


def _masked(row: PackedRow) -> dict[str, Any]:
    return {"attention_mask": attention_mask(row)}


ATTENTION: Mapping[str, Callable[[PackedRow], dict[str, Any]]] = {
    PACKED: lambda row: {"spans": row.spans},
    FLEX: lambda row: {"spans": span_mask(row.spans, row.input_ids.device)},
}
"""What each way to attend must be told of a row; any other takes a mask."""


@torch.no_grad()
def token_logps(scorer: Scores, row: PackedRow) -> Tensor:
    """(N,) log-probability of each completion token in ``row``, nats, float32."""
    scores: TokenScores = scorer(row, partial(head.token_logps, labels=row.labels))
    return scores.logps


def sequence_logps(scorer: Scores, row: PackedRow) -> Tensor:
    """(S,) log-probability of each completion in ``row``, summed over its tokens, nats, float32."""
    return sequence_sums(token_logps(scorer, row), row.sequence, row.lengths.numel())


def pair_logps(scorer: Scores, row: PackedRow) -> PairLogps:
    """Summed log-probabilities of the pairs in ``row``."""
    return as_pairs(sequence_logps(scorer, row), row.lengths)


@dataclass(frozen=True, slots=True)
class PairLosses:
    """What a step needs to know of B pairs."""

    total: Tensor
    """() sum of the losses; the only one with history."""
    each: Tensor
    """(B,)"""
    policy: PairLogps
    """Of all pairs."""


def pair_losses(
    scorer: Scores,
    row: PackedRow,
    loss: Callable[[PairLogps, slice], Tensor],
    *,
    weighting: Weighting = "none",
    chunk: int | None = None,
) -> PairLosses:
    """Losses of the pairs in ``row``, with gradients where those are enabled.

    Args:
        scorer: the policy.
        row: B pairs.
        loss: (policy, pairs) -> losses of consecutive pairs, given their log-probabilities and where they are in the
            row. It may not look beyond them.
        weighting: ``wpo`` gives the loss ``policy.weights``.
        chunk: tokens whose logits exist at a time; by default what fits ``head.CHUNK_BYTES``.
    """

    def policy_of(group: Group, scores: TokenScores) -> PairLogps:
        sequences = slice(2 * group.pairs.start, 2 * group.pairs.stop)
        lengths, sequence = row.lengths[sequences], row.sequence[group.tokens] - sequences.start
        weights = wpo_weights(scores, sequence, lengths) if weighting == "wpo" else None
        return as_pairs(sequence_sums(scores.logps, sequence, lengths.numel()), lengths, weights)

    def objective(group: Group, scores: TokenScores) -> Tensor:
        return loss(policy_of(group, scores), group.pairs)

    found: Losses = scorer(
        row,
        partial(
            head.pair_losses,
            labels=row.labels,
            pair_tokens=row.pair_tokens,
            objective=objective,
            chunk=chunk,
            with_squares=weighting == "wpo",
        ),
    )
    whole = Group(slice(0, len(row.pair_tokens)), slice(0, row.labels.numel()))
    return PairLosses(found.total, found.each, policy_of(whole, found.scores))


def logit_transform(config: object) -> LogitTransform:
    """The scale and soft cap that an architecture's configuration asks for."""
    scale = getattr(config, "logit_scale", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale /= divisor
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
