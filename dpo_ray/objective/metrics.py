"""Metrics of preference pairs, for every loss, with the names and meanings of TRL's metrics."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import log_ratios, per_token

REWARDS = slice(1, 3)
"""Slice of ``types.PAIR_METRICS`` with the rewards of completions."""
LOG_RATIOS = slice(2, 4)
"""Slice of ``types.PAIR_RESULTS`` with the log-ratios of completions."""


@torch.no_grad()
def pair_metric_sums(losses: Tensor, policy: PairLogps, reference: PairLogps | None, beta: float) -> Tensor:
    """Sums of PAIR_METRICS over the pairs, and their numbers of terms; divide those of the global step for the means.

    The implicit reward is ``beta * (policy - reference)`` log-probability (arXiv:2305.18290, Eq. 5, without the
    prompt's constant). Without a reference it is ``beta`` times the policy's log-probability per token
    (arXiv:2405.14734, Eq. 4), because sums would compare lengths.

    Chosen are also desirable completions without a pair, rejected also undesirable ones. Their margin is the distance
    of the reward from 0 in the right direction.

    Returns:
        (2, 7) float64, sums and numbers of terms, in the order of PAIR_METRICS.
    """
    chosen, rejected, has_chosen, has_rejected, margin = _rewards(policy, reference, beta)
    every = torch.ones_like(has_chosen)
    terms = (
        (losses, every),
        (chosen, has_chosen),
        (rejected, has_rejected),
        (margin, every),
        ((margin > 0).float(), every),
        (policy.chosen, has_chosen),
        (policy.rejected, has_rejected),
    )
    sums = [torch.where(counts, values.detach().double(), 0.0).sum() for values, counts in terms]
    return torch.stack((torch.stack(sums), torch.stack([counts.sum().double() for _, counts in terms])))


@torch.no_grad()
def pair_results(losses: Tensor, policy: PairLogps, reference: PairLogps | None, beta: float) -> Tensor:
    """Results of each pair, whose means over pairs are metrics.

    Returns:
        (B, 4) float64 in the order of PAIR_RESULTS. A log-ratio is NaN without a reference, and for a completion that
        the pair does not have.
    """
    *_, has_chosen, has_rejected, margin = _rewards(policy, reference, beta)
    none = torch.full_like(margin, torch.nan)
    chosen, rejected = (none, none) if reference is None else log_ratios(policy, reference)
    present = (torch.where(has_chosen, chosen, torch.nan), torch.where(has_rejected, rejected, torch.nan))
    return torch.stack([column.detach().double() for column in (losses, margin, *present)], 1)


class _Rewards(NamedTuple):
    """(B,) each: implicit rewards of both completions, which of them the pair has, and the margin."""

    chosen: Tensor
    rejected: Tensor
    has_chosen: Tensor
    has_rejected: Tensor
    margin: Tensor


def _rewards(policy: PairLogps, reference: PairLogps | None, beta: float) -> _Rewards:
    scores = per_token(policy) if reference is None else log_ratios(policy, reference)
    chosen, rejected = (beta * score for score in scores)
    unpaired = torch.zeros_like(chosen) if policy.unpaired is None else policy.unpaired
    has_chosen, has_rejected = unpaired >= 0, unpaired <= 0
    margin = torch.where(has_chosen, chosen, 0.0) - torch.where(has_rejected, rejected, 0.0)
    return _Rewards(chosen, rejected, has_chosen, has_rejected, margin)
