"""What is logged of a set of pairs, the same for every loss. Names and meanings are those of TRL's dashboards."""

import torch
from torch import Tensor

from dpo_ray.objective.logps import PairLogps

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
def pair_metric_sums(losses: Tensor, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """Sums over the pairs of everything in PAIR_METRICS; dividing by the pairs of the global step gives the means.

    The implicit reward is ``beta * (policy - reference)`` log-probability (arXiv:2305.18290, Eq. 5, without the
    prompt's constant).

    Args:
        losses: (B,).
        policy, reference: (B,) each, nats.
        beta: 1/nat.

    Returns:
        (7,) float64, in the order of PAIR_METRICS.
    """
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    rows = (losses, chosen, rejected, chosen - rejected, (chosen > rejected).float(), policy.chosen, policy.rejected)
    return torch.stack([row.detach().double().sum() for row in rows])
