"""Load balance of the experts that the tokens of a row are routed to.

T = tokens of the row, E = experts, P = parts of the row: prompts and completions, S = sequences
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_ray.data.packing import Span


def load_balancing_losses(router_logits: Sequence[Tensor], spans: Sequence[Span], top_k: int) -> Tensor:
    """Auxiliary loss of each sequence, prompt and completion, as in its own forward pass (arXiv:2101.03961, Eq. 4-6).

    The loss is E times the sum over experts of (choices per token) * (mean probability), over all layers. It is
    ``top_k`` if tokens are spread evenly, and larger otherwise.

    Args:
        router_logits: (T, E) per layer with experts.
        spans: spans of the row; T tokens in total.
        top_k: experts chosen per token.

    Returns:
        (S,) float32, dimensionless.
    """
    device, experts = router_logits[0].device, router_logits[0].shape[-1]
    lengths = torch.tensor(list(itertools.chain(*spans)), device=device)  # (P,)
    part = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # (T,)
    chosen, probabilities = (torch.zeros(len(lengths), experts, device=device) for _ in range(2))
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        choice = torch.zeros_like(probability).scatter_(1, probability.topk(top_k).indices, 1.0)
        chosen = chosen.index_add(0, part, choice)
        probabilities = probabilities.index_add(0, part, probability)
    prompt, completion = _sequence_parts(spans, device)
    tokens = (lengths[prompt] + lengths[completion])[:, None] * len(router_logits)
    chosen, probabilities = ((sums[prompt] + sums[completion]) / tokens for sums in (chosen, probabilities))
    return experts * (chosen * probabilities).sum(-1)


def _sequence_parts(spans: Sequence[Span], device: torch.device) -> tuple[Tensor, Tensor]:
    """(S,) part that is the prompt of each sequence, and (S,) part that is its completion."""
    first_parts = itertools.accumulate((len(span) for span in spans), initial=0)
    parts = [(first, first + n) for first, span in zip(first_parts, spans, strict=False) for n in range(1, len(span))]
    prompt, completion = torch.tensor(parts, dtype=torch.int64, device=device).view(-1, 2).T
    return prompt, completion
