"""The scorer: a language model whose forward pass returns log-probabilities of completions instead of logits.

Backbone and head sit in one module so that FSDP2 shards and gathers them as one root; prompt positions never reach the
head, and logits exist one chunk at a time.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dpo_ray.data.packing import PackedRow, attention_mask
from dpo_ray.model.attention import PACKED
from dpo_ray.model.flex import FLEX, span_mask
from dpo_ray.objective.logps import (
    LogitTransform,
    PairLogps,
    TokenScores,
    as_pairs,
    sequence_sums,
    token_logps,
    wpo_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = Callable[..., TokenScores]
"""A Scorer, or what answers like one: (row, with_squares) -> TokenScores."""


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

    def forward(self, row: PackedRow, with_squares: bool = False) -> TokenScores:
        """Log-probability of every completion token, in the order of ``row.labels``.

        Args:
            row: one micro-batch.
            with_squares: also give the sums of squared probabilities, for WPO weights.
        """
        hidden = self.model.get_decoder()(
            input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, **self.attention(row)
        ).last_hidden_state  # (1, T, D)
        head = self.model.get_output_embeddings()
        assert head is not None
        return token_logps(
            hidden[0, row.source],
            head.weight,
            row.labels,
            bias=getattr(head, "bias", None),
            transform=self.transform,
            with_squares=with_squares,
        )


def _masked(row: PackedRow) -> dict[str, Any]:
    return {"attention_mask": attention_mask(row)}


ATTENTION: Mapping[str, Callable[[PackedRow], dict[str, Any]]] = {
    PACKED: lambda row: {"spans": row.spans},
    FLEX: lambda row: {"spans": span_mask(row.spans, row.input_ids.device)},
}
"""What each way to attend must be told of a row; any other takes a mask."""


def pair_logps(scorer: Scores, row: PackedRow, *, weighting: Literal["none", "wpo"] = "none") -> PairLogps:
    """Summed log-probabilities of the pairs in ``row``, and with ``wpo`` the weights of the pairs."""
    scores = scorer(row, weighting == "wpo")
    sums = sequence_sums(scores.logps, row.sequence, row.lengths.numel())
    weights = wpo_weights(scores, row.sequence, row.lengths) if weighting == "wpo" else None
    return as_pairs(sums, row.lengths, weights)


@torch.no_grad()
def sample_logps(scorer: Scores, row: PackedRow) -> Tensor:
    """(S,) summed log-probabilities of single completions, nats, float32."""
    return sequence_sums(scorer(row).logps, row.sequence, row.lengths.numel())


def logit_transform(config: object) -> LogitTransform:
    """The scale and soft cap that an architecture's configuration asks for."""
    scale = getattr(config, "logit_scale", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale /= divisor
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
