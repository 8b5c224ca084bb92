"""The scorer: a language model whose forward pass returns log-probabilities or losses instead of logits.

Backbone and head sit in one module so that FSDP2 shards and gathers them as one root; prompt positions never reach the
head, and logits exist one chunk at a time.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dpo_ray.data.packing import PackedRow, attention_mask
from dpo_ray.objective import head
from dpo_ray.objective.head import ChunkedLosses, Group, Head, LogitTransform
from dpo_ray.objective.logps import PairLogps, TokenLogps, as_pairs, sequence_sums, wpo_weights
from dpo_ray.ops.attention import PACKED
from dpo_ray.ops.flex import FLEX, span_mask
from dpo_ray.parallel.context import ALONE, Context, RowShard
from dpo_ray.parallel.tensor import local_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReadOut = Callable[[Tensor, Head, RowShard], Any]
"""(hidden, head, part) -> what is wanted of a row; hidden: (n, D) before each of the completion tokens in
``part.row.labels``."""
LogpsModel = Callable[[PackedRow, ReadOut], Any]
"""A Scorer, or what answers like one."""
Weighting = Literal["none", "wpo"]


class Scorer(nn.Module):
    """A causal language model that scores completions.

    Args:
        model: a transformers causal language model; its names are kept below ``model.``.
        context: the ranks that share each row; all of them call with the same rows.
    """

    def __init__(self, model: "PreTrainedModel", context: Context = ALONE) -> None:
        super().__init__()
        self.model = model
        self.context = context
        self.transform = logit_transform(model.config)
        self.attention = ATTENTION.get(model.config._attn_implementation or "", _masked)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, the units of sharding and checkpointing."""
        decoder: Any = self.model.get_decoder()
        return decoder.layers

    def forward(self, row: PackedRow, read_out: ReadOut) -> Any:
        """What ``read_out`` makes of the hidden states before the completion tokens.

        The head is read out within the forward pass because only there FSDP has its weights in one piece.
        """
        part = self.context.shard(row)
        hidden = self.model.get_decoder()(
            input_ids=part.row.input_ids, position_ids=part.row.position_ids, use_cache=False, **self.attention(part)
        ).last_hidden_state  # (1, t, D)
        return read_out(hidden[0, part.row.source], local_head(self.model, self.transform), part)


def _masked(part: RowShard) -> dict[str, Any]:
    if part.shared:
        raise NotImplementedError("rows that ranks share need model.attention: auto or flex")
    return {"attention_mask": attention_mask(part.row)}


ATTENTION: Mapping[str, Callable[[RowShard], dict[str, Any]]] = {
    PACKED: lambda part: {"spans": part.row.spans, "pieces": part.pieces, "gather": part.gather},
    FLEX: lambda part: {
        "spans": span_mask(part.row.spans, part.row.input_ids.device, part.tokens),
        "gather": part.gather,
    },
}
"""What each way to attend must be told of a row; any other takes a mask."""


@torch.no_grad()
def token_logps(scorer: LogpsModel, row: PackedRow) -> Tensor:
    """(N,) log-probability of each completion token in ``row``, nats, float32."""

    def read_out(hidden: Tensor, of_model: Head, part: RowShard) -> Tensor:
        return part.complete(head.token_logps(hidden, of_model, part.row.labels).logps)

    return scorer(row, read_out)


def sequence_logps(scorer: LogpsModel, row: PackedRow) -> Tensor:
    """(S,) log-probability of each completion in ``row``, summed over its tokens, nats, float32."""
    return sequence_sums(token_logps(scorer, row), row.sequence, row.lengths.numel())


def pair_logps(scorer: LogpsModel, row: PackedRow) -> PairLogps:
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
    scorer: LogpsModel,
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

    with_squares = weighting == "wpo"
    ends = (0, *itertools.accumulate(row.pair_tokens))

    def policy_of(pairs: slice, scores: TokenLogps) -> PairLogps:
        sequences, tokens = slice(2 * pairs.start, 2 * pairs.stop), slice(ends[pairs.start], ends[pairs.stop])
        lengths, sequence = row.lengths[sequences], row.sequence[tokens] - sequences.start
        weights = wpo_weights(scores, sequence, lengths) if with_squares else None
        return as_pairs(sequence_sums(scores.logps, sequence, lengths.numel()), lengths, weights)

    def read_out(hidden: Tensor, of_model: Head, part: RowShard) -> ChunkedLosses:
        def complete(scores: TokenLogps) -> TokenLogps:
            squares = part.complete(scores.log_sum_squares) if with_squares else scores.log_sum_squares
            return TokenLogps(part.complete(scores.logps), squares)

        def objective(group: Group, scores: TokenLogps) -> Tensor:
            return loss(policy_of(group.pairs, complete(scores)), group.pairs)

        found = head.chunked_pair_losses(
            hidden,
            of_model,
            part.row.labels,
            row.pair_tokens,
            objective,
            chunk=chunk,
            with_squares=with_squares,
            together=part.shared,
        )
        return ChunkedLosses(found.total, found.each, complete(found.scores))

    found: ChunkedLosses = scorer(row, read_out)
    return PairLosses(found.total, found.each, policy_of(slice(0, len(row.pair_tokens)), found.scores))


def logit_transform(config: object) -> LogitTransform:
    """The scale and soft cap that an architecture's configuration asks for."""
    scale = getattr(config, "logit_scale", None) or 1.0
    if scaling := getattr(config, "logits_scaling", None):
        # By one name, Granite divides and HyperCLOVA X multiplies.
        scale *= scaling if getattr(config, "model_type", "").startswith("hyperclovax") else 1 / scaling
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
