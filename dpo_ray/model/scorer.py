"""A language model whose forward pass returns log-probabilities or losses instead of logits.

Backbone and head are one module, so FSDP2 shards and gathers them as one root. Only the hidden states before completion
tokens reach the head, and logits exist one chunk at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dpo_ray.data.packing import Layout, PackedRow, Spans, attention_mask, padded_positions, to_device
from dpo_ray.model.architecture import decoder_layers, decoder_of
from dpo_ray.model.routing import load_balancing_losses
from dpo_ray.objective import head
from dpo_ray.objective.head import ChunkedLosses, Group, Head, LogitTransform
from dpo_ray.objective.logps import PairLogps, TokenLogps, as_pairs, sequence_sums, wpo_weights
from dpo_ray.objective.precision import ROUNDED, Products
from dpo_ray.ops.attention import MASKED, PACKED
from dpo_ray.ops.flex import FLEX, span_masks
from dpo_ray.ops.windows import Window, layer_windows
from dpo_ray.parallel.context import NO_CONTEXT_PARALLEL, ContextParallel, RowShard
from dpo_ray.parallel.tensor import local_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HeadFn = Callable[[Tensor, Head, RowShard], Any]
"""(hidden, lm_head, shard) -> result of the forward pass; hidden: (n, D), one before each of ``shard.row.labels``."""
LogpsModel = Callable[..., Any]
"""A Scorer, or a callable with its signature."""
Weighting = Literal["none", "wpo", "gap"]


class Scorer(nn.Module):
    """A causal language model that computes log-probabilities of completions.

    Args:
        model: a transformers language model; its parameter names get the prefix ``model.``. Its attention decides
            between packed rows (``ATTENTION_INPUTS``) and padded batches.
        context: the ranks that split each row; all of them must pass the same rows.
        products: paths of the products of attention and head on a CPU; linear layers have theirs already.

    Raises:
        ValueError: ranks split rows, but the model computes padded batches.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        context: ContextParallel = NO_CONTEXT_PARALLEL,
        products: Products = ROUNDED,
    ) -> None:
        super().__init__()
        self.model = model
        self.context = context
        self.products = products
        config = model.config.get_text_config()
        self.transform = logit_transform(config)
        self.windows = layer_windows(config)
        self.attention_inputs = ATTENTION_INPUTS.get(config._attn_implementation or "")
        if self.attention_inputs is None and context.ranks > 1:
            raise ValueError("shard.context_parallel splits packed rows, but the model computes padded batches")

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, each a unit of FSDP and of activation checkpointing."""
        return decoder_layers(self.model)

    def layout(self, packed: Layout) -> Layout:
        """Layout of the rows that the model computes; ``packed`` unless it computes padded batches."""
        return "padded" if self.attention_inputs is None else packed

    def forward(self, row: PackedRow, head_fn: HeadFn, *, balance: bool = False) -> Any:
        """Returns ``head_fn`` of the hidden states before the completion tokens.

        ``head_fn`` runs inside the forward pass, because FSDP has gathered the weights of the head only there.

        Args:
            row: in one of the packed layouts, or in the padded one; see ``layout``.
            balance: also returns ``load_balancing_losses`` of the row.

        Raises:
            ValueError: ``balance`` without experts.
        """
        shard = self.context.shard(row)
        inputs, tokens = self._decoder_inputs(shard)
        outputs = decoder_of(self.model)(
            use_cache=False, **inputs, **({"output_router_logits": True} if balance else {})
        )
        hidden = outputs.last_hidden_state.flatten(0, 1)[tokens]  # (t, D)
        result = head_fn(hidden[shard.row.source], local_head(self.model, self.transform, self.products), shard)
        return (result, self._balance(outputs, tokens, row)) if balance else result

    def _decoder_inputs(self, shard: RowShard) -> tuple[dict[str, Any], Tensor | slice]:
        """Arguments of the decoder, and the positions of the row's t tokens in its flattened output."""
        row = shard.row
        if self.attention_inputs is None:
            return _padded_inputs(row)
        attention_inputs = self.attention_inputs(shard, self.windows, self.products)
        return {"input_ids": row.input_ids, "position_ids": row.position_ids, **attention_inputs}, slice(None)

    def _balance(self, outputs: Any, tokens: Tensor | slice, row: PackedRow) -> Tensor:
        router_logits = [logits[tokens] for logits in getattr(outputs, "router_logits", None) or ()]
        if not router_logits:
            raise ValueError(
                f"loss.router_aux: {type(self.model).__name__} has no router logits; set loss.router_aux: 0"
            )
        top_k: Any = self.model.config.get_text_config().num_experts_per_tok
        return load_balancing_losses(router_logits, row.spans, top_k)


def _padded_inputs(row: PackedRow) -> tuple[dict[str, Any], Tensor]:
    shape, positions = padded_positions(row.spans)
    tokens = to_device(torch.from_numpy(positions), row.input_ids.device)
    pad = lambda values: values.new_zeros(shape).flatten().index_copy(0, tokens, values).view(shape)  # noqa: E731
    return {"input_ids": pad(row.input_ids[0]), "attention_mask": pad(torch.ones_like(row.input_ids[0]))}, tokens


Windows = Mapping[str, Window | None]
"""Window by layer type; see ``layer_windows``."""


def _mask_inputs(shard: RowShard, windows: Windows, products: Products) -> dict[str, Any]:
    if shard.is_partial:
        raise NotImplementedError("shard.context_parallel needs model.attention: auto or flex")
    positions = shard.row.position_ids[0]
    full = attention_mask(shard.row.spans, positions.device)
    masks = {
        name: full if window is None else full & (positions >= window.start(positions)[:, None])
        for name, window in windows.items()
    }
    # Architectures with several layer types take a mask for each.
    return {"attention_mask": next(iter(masks.values())) if len(masks) == 1 else masks}


ATTENTION_INPUTS: Mapping[str, Callable[[RowShard, Windows, Products], dict[str, Any]]] = {
    MASKED: _mask_inputs,
    PACKED: lambda shard, _, products: {
        "spans": Spans(shard.row.spans),
        "query_slices": shard.slices,
        "gather_kv": shard.gather_kv,
        "product_path": products.attention,
    },
    FLEX: lambda shard, windows, _: {
        "spans": span_masks(shard.row.spans, set(windows.values()), shard.row.input_ids.device, shard.positions),
        "gather_kv": shard.gather_kv,
    },
}
"""Arguments of each attention over packed rows, besides query, key and value; with others, batches are padded."""


@torch.no_grad()
def token_logps(model: LogpsModel, row: PackedRow) -> Tensor:
    """(N,) log-probability of each completion token in ``row``, nats, float32."""

    def head_fn(hidden: Tensor, lm_head: Head, shard: RowShard) -> Tensor:
        return shard.gather_values(head.token_logps(hidden, lm_head, shard.row.labels).logps)

    return model(row, head_fn)


def sequence_logps(model: LogpsModel, row: PackedRow) -> Tensor:
    """(S,) log-probability of each completion in ``row``, summed over its tokens, nats, float32."""
    return sequence_sums(token_logps(model, row), row.sequence, row.lengths.numel())


def pair_logps(model: LogpsModel, row: PackedRow) -> PairLogps:
    """Summed log-probabilities of the pairs in ``row``."""
    return as_pairs(sequence_logps(model, row), row.lengths, row.pairs, row.unpaired)


@dataclass(frozen=True, slots=True)
class PairLosses:
    """Losses and log-probabilities of B pairs."""

    total: Tensor
    """() sum of the losses; the only tensor with a gradient."""
    each: Tensor
    """(B,) loss per pair."""
    policy: PairLogps


def pair_losses(
    model: LogpsModel,
    row: PackedRow,
    loss: Callable[[PairLogps, PairLogps | None], Tensor],
    reference: PairLogps | None = None,
    *,
    weighting: Weighting = "none",
    router_aux: float = 0.0,
) -> PairLosses:
    """Losses of the pairs in ``row``; gradients are computed in the same pass if they are enabled.

    Args:
        row: B pairs.
        loss: (policy, reference) -> (b,) losses of some consecutive pairs. Each must depend only on its prompt's pairs.
        reference: reference log-probabilities of the B pairs; None for losses without a reference.
        weighting: ``wpo`` multiplies ``row.weights`` by the likelihood of both completions.
        router_aux: weight of the load balancing loss of a pair, the mean of its two sequences' losses, or the loss of
            a completion without a pair.
    """
    with_squares, whole = weighting == "wpo", head.whole_group(row.prompts)

    def policy_logps(group: Group, tokens: TokenLogps) -> PairLogps:
        lengths = row.lengths[group.sequences]
        sequence = row.sequence[group.tokens] - group.sequences.start
        logps = sequence_sums(tokens.logps, sequence, lengths.numel())
        pairs = row.pairs[group.pairs] - group.sequences.start
        weights = row.weights[group.pairs]
        if with_squares:
            weights = weights * wpo_weights(tokens, sequence, lengths)[pairs].prod(1)
        return as_pairs(logps, lengths, pairs, row.unpaired[group.pairs], weights)

    def head_fn(hidden: Tensor, lm_head: Head, shard: RowShard) -> ChunkedLosses:
        def gather(local: TokenLogps) -> TokenLogps:
            squares = shard.gather_values(local.log_sum_squares) if with_squares else local.log_sum_squares
            return TokenLogps(shard.gather_values(local.logps), squares)

        def objective(group: Group, local: TokenLogps) -> Tensor:
            group = whole if shard.is_partial else group  # whose tokens are those of this rank
            group_reference = None if reference is None else reference.of(group.pairs)
            return loss(policy_logps(group, gather(local)), group_reference)

        losses = head.chunked_pair_losses(
            hidden,
            lm_head,
            shard.row.labels,
            row.prompts,
            objective,
            with_squares=with_squares,
            together=shard.is_partial,
        )
        return ChunkedLosses(losses.total, losses.each, gather(losses.token_logps))

    losses: ChunkedLosses
    if router_aux:
        losses, balance = model(row, head_fn, balance=True)
        chosen, rejected = balance[row.pairs].unbind(1)  # (B,) each
        own = torch.where(row.unpaired > 0, chosen, rejected)
        added = router_aux * torch.where(row.unpaired == 0, (chosen + rejected) / 2, own)
        losses = losses._replace(total=losses.total + added.sum(), each=losses.each + added.detach())
    else:
        losses = model(row, head_fn)
    return PairLosses(losses.total, losses.each, policy_logps(whole, losses.token_logps))


def logit_transform(config: object) -> LogitTransform:
    """Logit scale and soft cap of an architecture."""
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    if scaling := getattr(config, "logits_scaling", None):
        # Granite divides by it, HyperCLOVA X multiplies.
        scale *= scaling if getattr(config, "model_type", "").startswith("hyperclovax") else 1 / scaling
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    return LogitTransform(scale, next(filter(None, caps), None))
