"""Metrics of preference pairs, for every loss, with the names and meanings of TRL's metrics."""

import torch
from torch import Tensor

from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import log_ratios, per_token

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@torch.no_grad()
def pair_metric_sums(losses: Tensor, policy: PairLogps, reference: PairLogps | None, beta: float) -> Tensor:
    """Sums of PAIR_METRICS over the pairs; divide by the pairs of the global step for the means.

    The implicit reward is ``beta * (policy - reference)`` log-probability (arXiv:2305.18290, Eq. 5, without the
    prompt's constant). Without a reference it is ``beta`` times the policy's log-probability per token
    (arXiv:2405.14734, Eq. 4), because sums would compare lengths.

    Returns:
        (7,) float64, in the order of PAIR_METRICS.
    """
    scores = per_token(policy) if reference is None else log_ratios(policy, reference)
    chosen, rejected = (beta * score for score in scores)
    rows = (losses, chosen, rejected, chosen - rejected, (chosen > rejected).float(), policy.chosen, policy.rejected)
    return torch.stack([row.detach().double().sum() for row in rows])
