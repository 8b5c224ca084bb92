"""The configured loss: built-in or imported, summed, weighted, and under another divergence."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import LOSSES, STEP_VALUES, log_ratios
from dpo_ray.plugins import bind

if TYPE_CHECKING:
    from dpo_ray.config.losses import LossConfig

PairLoss = Callable[[PairLogps, PairLogps | None], Tensor]
"""(policy, reference) -> (B,) losses; the reference is None for reference-free losses."""


def alpha_score(log_t: Tensor, alpha: float) -> Tensor:
    """(1 - t^-alpha) / alpha, where t^-alpha is clamped at e^80, far above any ratio of a healthy policy."""
    return -torch.expm1((-alpha * log_t).clamp(max=80.0)) / alpha


DIVERGENCES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda log_t: log_t,
    "forward_kl": partial(alpha_score, alpha=1.0),
    "js": lambda log_t: math.log(2) + F.logsigmoid(log_t),
}
"""f'(t) of each f-divergence as a function of log t, with 0 at t = 1: rewards of f-DPO (arXiv:2309.16240)."""


def build_loss(loss: "LossConfig", log_ratio_totals: Tensor | None = None) -> PairLoss:
    """The configured loss, or weighted sum of losses, with its arguments bound.

    Losses are multiplied by ``policy.weights`` if given (``loss.weighting``; of ``wpo``, arXiv:2406.11827, Eq. 2).

    Args:
        log_ratio_totals: (2,) sum, nats, and number of log-ratios in former steps, on the CPU; the caller adds to it.

    Raises:
        ValueError: a name or an argument is unknown or out of range, or a loss does not return one value per pair.
    """
    terms = []
    for name, weight in zip(loss.names, loss.weights or (1.0,) * len(loss.names), strict=True):
        args = loss.args if len(loss.names) == 1 else loss.args.get(name, {})
        totals = torch.zeros(2) if log_ratio_totals is None else log_ratio_totals
        term = bind(name, args, LOSSES, kind="loss", beta=loss.beta, log_ratio_totals=totals)
        if loss.divergence != "reverse_kl" and name != "nll":  # the only other loss that LossConfig accepts beside it
            term = _of_scores(term, loss.divergence)
        _validate_output(name, term)
        terms.append((weight, term))

    def pair_loss(policy: PairLogps, reference: PairLogps | None) -> Tensor:
        losses = torch.stack([weight * term(policy, reference) for weight, term in terms]).sum(0)
        return losses if policy.weights is None else losses * policy.weights

    return pair_loss


def _of_scores(term: PairLoss, divergence: str | float) -> PairLoss:
    """The loss ``term`` of the scores of another divergence instead of log-ratios."""
    score = DIVERGENCES[divergence] if isinstance(divergence, str) else partial(alpha_score, alpha=divergence)

    def of_scores(policy: PairLogps, reference: PairLogps | None) -> Tensor:
        assert reference is not None
        chosen, rejected = map(score, log_ratios(policy, reference))
        zeros = torch.zeros_like(chosen)
        return term(replace(policy, chosen=chosen, rejected=rejected), replace(reference, chosen=zeros, rejected=zeros))

    return of_scores


def _validate_output(name: str, term: Callable[..., Any]) -> None:
    """Call a loss on two pairs, so that errors appear before a model is loaded."""
    tokens = torch.tensor([2, 3])
    pairs = PairLogps(torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -2.0]), tokens, tokens)
    if name in ("kto", "bco"):
        pairs = replace(pairs, unpaired=torch.tensor([1, -1]))
    of_step = STEP_VALUES[name](pairs, pairs) if name in STEP_VALUES else None
    losses = term(pairs, replace(pairs, of_step=of_step))
    if not isinstance(losses, Tensor) or losses.shape != (2,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss {name!r} returned {shape} for two pairs; it must return one loss per pair, (2,)")
