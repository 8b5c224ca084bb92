"""Preference losses: pure functions of policy and reference log-probabilities, registered in ``LOSSES``.

To add a loss, write a function here, add it to ``LOSSES`` and its name to ``config/losses.py``, or set
``loss.use: my_lab.losses:mine``. Each takes ``(policy, reference, *, beta, ...)``, with ``beta`` optional, and returns
one loss per pair; the training step takes the mean over the global step.

A loss that takes ``log_ratio_totals`` gets the (2,) sum and number of log-ratios of all completions in former steps.

Throughout: ``policy`` and ``reference`` hold completion log-probabilities, (B,) each, summed over tokens, in nats;
``beta`` is the scale of the implicit reward, 1/nat; the result is (B,); a ValueError names an argument out of range.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.objective.logps import PairLogps


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """(B,) log-ratios of policy to reference for chosen and for rejected completions, nats."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def per_token(policy: PairLogps) -> tuple[Tensor, Tensor]:
    """(B,) log-probabilities per token of chosen and of rejected completions, nats."""
    return policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens


def log_ratio_margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    """(B,) log-ratio of the chosen completion minus log-ratio of the rejected one, nats."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen - rejected


def log_ratio_margin_per_token(policy: PairLogps, reference: PairLogps) -> Tensor:
    """(B,) margin of log-ratios divided by completion lengths, nats per token."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen / policy.chosen_tokens - rejected / policy.rejected_tokens


def sigmoid(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: negative log-likelihood of the preferences under Bradley-Terry.

    arXiv:2305.18290, Eq. 7; with ``label_smoothing`` > 0, the probability in [0, 0.5) that a preference is flipped,
    conservative DPO (ericmitchell.ai/cdpo.pdf, Eq. 3).
    """
    return _cross_entropy(beta * log_ratio_margin(policy, reference), label_smoothing)


def sigmoid_norm(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO on log-ratios per token, which does not reward length; typical beta is 2 to 10.

    Length-normalized DPO of Tulu 3, arXiv:2411.15124, section 5.
    """
    return _cross_entropy(beta * log_ratio_margin_per_token(policy, reference), label_smoothing)


def robust(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO: an unbiased estimate of the DPO loss when a fraction of the preferences is flipped.

    rDPO, arXiv:2403.00409, section 3; ``label_smoothing`` is the flip rate, in [0, 0.5). Not bounded below by 0.
    """
    _check_flip_rate(label_smoothing)
    margin = beta * log_ratio_margin(policy, reference)
    as_labeled, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * as_labeled - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Hinge loss on the reward margin; the target margin is 1 / beta nats.

    SLiC-HF, arXiv:2305.10425, Eq. 1, on log-ratios as in RSO, arXiv:2309.06657.
    """
    return torch.relu(1 - beta * log_ratio_margin(policy, reference))


def ipo(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """IPO: squared distance of the margin to 1 / (2 beta), which bounds it.

    arXiv:2310.12036, Eq. 17, where beta is called tau. On log-ratios per token, as in TRL, where the
    authors confirmed it; the paper does not specify the normalization.
    """
    return (log_ratio_margin_per_token(policy, reference) - 1 / (2 * beta)) ** 2


def exo_pair(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """EXO on pairs: reverse KL from the policy's preference to the smoothed label.

    arXiv:2402.00856, Eq. 16; ``label_smoothing`` is in (0, 0.5).
    """
    if not 0 < label_smoothing < 0.5:
        raise ValueError(f"loss.args.label_smoothing is {label_smoothing}; for exo_pair it must lie in (0, 0.5)")
    margin = beta * log_ratio_margin(policy, reference)
    smoothing = torch.tensor(label_smoothing, dtype=margin.dtype, device=margin.device)
    chosen = margin.sigmoid() * (F.logsigmoid(margin) - torch.log1p(-smoothing))
    rejected = (-margin).sigmoid() * (F.logsigmoid(-margin) - smoothing.log())
    return chosen + rejected


def nca_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """NCA on pairs: raises the likelihood of the chosen completion, not only the margin.

    arXiv:2402.05369, the binary objective of section 4.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_hard(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """SPPO with preference probabilities 1 and 0; 1 / beta is the paper's eta.

    arXiv:2405.00675, Eq. 4.7.
    """
    chosen, rejected = log_ratios(policy, reference)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """APO-zero (arXiv:2408.06266, Eq. 7): raises chosen and lowers rejected log-ratios.

    Use it when the chosen completions are better than the policy's own.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """APO-down (arXiv:2408.06266, Eq. 8): lowers both log-ratios, the rejected one more.

    Use it when the chosen completions are worse than the policy's own.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def discopop(policy: PairLogps, reference: PairLogps, *, beta: float, temperature: float = 0.05) -> Tensor:
    """DiscoPOP: a blend of logistic and exponential loss, discovered by a language model.

    Log-ratio modulated loss, arXiv:2406.08414, Eq. 5; ``temperature`` is its tau.
    """
    margin = beta * log_ratio_margin(policy, reference)
    exponential = (margin / temperature).sigmoid()
    return (1 - exponential) * -F.logsigmoid(margin) + exponential * (-margin).exp()


def dpop(policy: PairLogps, reference: PairLogps, *, beta: float, penalty: float = 50.0) -> Tensor:
    """DPO-Positive: penalizes chosen completions that are less likely than under the reference.

    Smaug, arXiv:2402.13228, Eq. 3; ``penalty`` is its lambda.
    """
    chosen, rejected = log_ratios(policy, reference)
    return -F.logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))


def bco_pair(
    policy: PairLogps, reference: PairLogps, *, beta: float, log_ratio_totals: Tensor, shift: bool = True
) -> Tensor:
    """BCO on pairs: binary classification of completions, by their reward minus the mean reward so far.

    arXiv:2404.04656. The reward shift is the mean over the completions of all former steps; TRL's former BCO trainer
    included the current micro-batch. ``shift: false`` is TRL's ``bco_pair``, which has no shift.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    mean = beta * log_ratio_totals[0] / log_ratio_totals[1].clamp(min=1) if shift else 0.0
    return -F.logsigmoid(chosen - mean) - F.logsigmoid(mean - rejected)


def aot(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT on pairs: the policy's margins stochastically dominate the reference's, quantile by quantile in a step.

    arXiv:2406.05882, paired, with the logistic loss. A pair is compared with the reference's margin of equal rank.
    """
    return _cross_entropy(beta * (policy.chosen - policy.rejected - _of_step(reference)[:, 0]), label_smoothing)


def aot_unpaired(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT without pairing: the log-ratios of chosen completions stochastically dominate those of rejected ones.

    arXiv:2406.05882, unpaired, with the logistic loss. A term has one chosen and one rejected completion of equal rank.
    A pair has half of the values of its two terms, and all of the gradient with respect to its own completions.
    """
    (chosen, rejected), (_, equal_rejected, equal_chosen) = log_ratios(policy, reference), _of_step(reference).unbind(1)
    losses = _cross_entropy(beta * (chosen - equal_rejected), label_smoothing)
    losses = losses + _cross_entropy(beta * (equal_chosen - rejected), label_smoothing)
    return losses - losses.detach() / 2


def kto(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: the utility of each completion by itself, with human aversion to loss; for completions without a pair.

    arXiv:2402.01306, Eq. 7. The reference point z0 is the KL divergence of the step, ``kl_estimate``. The paper sets
    the weights so that desirable times their number is 1 to 4/3 of undesirable times theirs.
    """
    desirable = _unpaired(policy) > 0
    chosen, rejected = log_ratios(policy, reference)
    advantage = torch.where(desirable, chosen, -rejected) - _unpaired(policy) * _of_step(reference)[:, 0]
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - (beta * advantage).sigmoid())


def bco(policy: PairLogps, reference: PairLogps, *, beta: float, log_ratio_totals: Tensor) -> Tensor:
    """BCO: classifies completions without a pair by their reward minus the mean reward so far.

    arXiv:2404.04656, without its weights for an underlying distribution shift. The mean is over the completions of all
    former steps.
    """
    mean = log_ratio_totals[0] / log_ratio_totals[1].clamp(min=1)
    chosen, rejected = log_ratios(policy, reference)
    return -F.logsigmoid(beta * torch.where(_unpaired(policy) > 0, chosen - mean, mean - rejected))


def plackett_luce(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """DPO on ranked lists: negative log-likelihood of the ranking under Plackett-Luce.

    arXiv:2305.18290, Eq. 20. A list of K completions is K - 1 pairs of neighbors, and the loss of a pair is the term
    of its chosen completion: it is preferred to all that follow. The loss of a pair by itself is DPO's.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    following = rejected.where(_Lists.of(policy).later, -math.inf).logsumexp(1)
    return F.softplus(following - chosen)


def lipo(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """LiPO-lambda on ranked lists: logistic losses of all pairs of a list, weighted by what a swap costs in DCG.

    arXiv:2402.01878, with labels from 1 for the first completion of a list to 0 for the last, in equal steps. The loss
    of a pair of neighbors is the sum over its chosen completion and each that follows.
    """
    lists = _Lists.of(policy)
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    first = chosen[lists.start]

    def discount(score: Tensor, place: Tensor) -> Tensor:
        """(B,) 1 / log(1 + rank) of completions, ranked by score; equal scores are ranked by place in the list."""
        ahead = (rejected > score[:, None]) | ((rejected == score[:, None]) & (lists.place + 1 < place[:, None]))
        first_is_ahead = (first > score) | ((first == score) & (place > 0))
        return ((lists.same & ahead).sum(1) + first_is_ahead + 2).log().reciprocal()

    with torch.no_grad():
        gain, next_gain = (torch.exp2(1 - (lists.place + i) / lists.length) for i in (0, 1))
        own, others = discount(chosen, lists.place), discount(rejected, lists.place + 1)
        swap = (gain[:, None] - next_gain).abs() * (own[:, None] - others).abs()
    return (swap * F.softplus(rejected - chosen[:, None])).where(lists.later, 0.0).sum(1)


class _Lists(NamedTuple):
    """The ranked lists that B pairs of neighbors are part of."""

    same: Tensor
    """(B, B) True for two pairs of one list."""
    later: Tensor
    """(B, B) True for pairs of the same list and their place or a later one."""
    start: Tensor
    """(B,) index of the first pair of the list."""
    place: Tensor
    """(B,) place of the chosen completion in its list, from 0."""
    length: Tensor
    """(B,) number of pairs of the list."""

    @classmethod
    def of(cls, policy: PairLogps) -> "_Lists":
        pairs = torch.arange(len(policy.chosen), device=policy.chosen.device)
        start = pairs if policy.follows is None else pairs.where(~policy.follows, 0).cummax(0).values
        same = start[:, None] == start
        return cls(same, same.triu(), start, pairs - start, same.sum(1))


def simpo(policy: PairLogps, reference: PairLogps | None, *, beta: float, gamma: float = 0.5) -> Tensor:
    """SimPO: log-probability per token as reward, with a target margin; reference-free.

    arXiv:2405.14734, Eq. 6. Typical ``beta`` is 2 to 10; ``gamma`` is the target margin of rewards, about beta / 2.
    """
    chosen, rejected = per_token(policy)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(policy: PairLogps, reference: PairLogps | None, *, beta: float) -> Tensor:
    """ORPO: likelihood of the chosen completion plus ``beta`` times the odds-ratio loss; reference-free.

    arXiv:2403.07691, Eqs. 6 and 7, where beta is called lambda; probabilities are geometric means over the tokens.
    """
    chosen, rejected = per_token(policy)
    log_odds_ratio = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds_ratio)


def nll(policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """Negative log-likelihood per token of the chosen completion, the term that RPO adds; reference-free.

    arXiv:2404.19733, Eq. 1: ``loss.use: [sigmoid, nll]`` with ``loss.weights: [1, alpha]``.
    """
    return -per_token(policy)[0]


LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair, nca_pair, sppo_hard, apo_zero, apo_down, discopop, dpop,
        bco_pair, aot, aot_unpaired, kto, bco, plackett_luce, lipo, simpo, orpo, nll,
    )
}  # fmt: skip


def rank_matches(policy: PairLogps, reference: PairLogps) -> Tensor:
    """The counterparts of each pair in the optimal transport of AOT, by rank among the given pairs: all of a step.

    Returns:
        (B, 3) reference margin with the rank of the pair's policy margin, rejected log-ratio with the rank of its
        chosen log-ratio, and chosen log-ratio with the rank of its rejected log-ratio; nats, without gradient.
    """
    chosen, rejected = (ratio.detach() for ratio in log_ratios(policy, reference))
    policy_margin, reference_margin = policy.chosen - policy.rejected, reference.chosen - reference.rejected
    columns = ((policy_margin.detach(), reference_margin), (chosen, rejected), (rejected, chosen))
    return torch.stack([other.sort().values[own.argsort().argsort()] for own, other in columns], 1)


def kl_estimate(policy: PairLogps, reference: PairLogps) -> Tensor:
    """KTO's KL baseline: mean log-ratio of mismatched (prompt, completion) pairs, clamped at 0.

    arXiv:2402.01306, section 4.2. Each unpaired completion of the step comes with a completion of another prompt.

    Returns:
        (B, 1) the same value for each completion, nats, without gradient.
    """
    chosen, rejected = (ratio.detach() for ratio in log_ratios(policy, reference))
    of_other_prompts = torch.where(_unpaired(policy) > 0, rejected, chosen)
    return of_other_prompts.mean().clamp(min=0).expand(len(chosen), 1)


STEP_VALUES: Mapping[str, Callable[[PairLogps, PairLogps], Tensor]] = {
    "aot": rank_matches,
    "aot_unpaired": rank_matches,
    "kto": kl_estimate,
}
"""Losses that depend on all pairs of a step: (policy, reference) of these pairs -> (B, k) ``PairLogps.of_step``."""


def _of_step(reference: PairLogps) -> Tensor:
    if reference.of_step is None:
        raise ValueError("aot, aot_unpaired and kto need reference.of_step: their STEP_VALUES of all pairs of the step")
    return reference.of_step


def _unpaired(policy: PairLogps) -> Tensor:
    """(B,) 1 for desirable and -1 for undesirable completions."""
    if policy.unpaired is None:
        raise ValueError("kto and bco need policy.unpaired: they are losses of completions without a pair")
    return policy.unpaired


def _cross_entropy(margin: Tensor, label_smoothing: float) -> Tensor:
    _check_flip_rate(label_smoothing)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _check_flip_rate(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"loss.args.label_smoothing is {label_smoothing}; it must lie in [0, 0.5)")


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate near 0 and -inf; x is clamped below 0."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))
