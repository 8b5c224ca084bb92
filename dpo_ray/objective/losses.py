"""Preference losses: pure functions of policy and reference log-probabilities, one dictionary.

A new loss is a function here and an entry in ``LOSSES``, with its name in ``config/schema.py``; one of your own is
``loss.use: my_lab.losses:mine``. Each takes ``(policy, reference, *, beta, ...)`` and returns one loss a pair; the mean
over the global step is taken by the training step, never here. ``beta`` is passed to those that take it.

Throughout: ``policy`` and ``reference`` hold completion log-probabilities, (B,) each, summed over tokens, in nats;
``beta`` is the scale of the implicit reward, 1/nat; the result is (B,).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.objective.logps import PairLogps
from dpo_ray.plugins import bind

if TYPE_CHECKING:
    from dpo_ray.config.schema import LossConfig

PairLoss = Callable[[PairLogps, PairLogps | None], Tensor]
"""(policy, reference) -> (B,) loss per pair; the reference is None for a loss that needs none."""


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """(B,) log-ratio of policy to reference on the chosen completion, and on the rejected one, nats."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def log_ratio_margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    """(B,) log-ratio on the chosen completion minus that on the rejected one, nats."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen - rejected


def log_ratio_margin_per_token(policy: PairLogps, reference: PairLogps) -> Tensor:
    """(B,) the same margin with each log-ratio divided by the tokens of its completion, nats a token."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen / policy.chosen_tokens - rejected / policy.rejected_tokens


def sigmoid(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: negative log-likelihood of the preferences under Bradley-Terry.

    arXiv:2305.18290, Eq. 7; with ``label_smoothing`` > 0, conservative DPO (ericmitchell.ai/cdpo.pdf, Eq. 3).

    Args:
        policy, reference, beta: as above.
        label_smoothing: probability in [0, 0.5) that a preference is flipped.

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 0.5).
    """
    _check_flip_rate(label_smoothing)
    return _cross_entropy(beta * log_ratio_margin(policy, reference), label_smoothing)


def sigmoid_norm(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO on log-ratios per token, which takes the reward out of mere length; beta is larger here, 2 to 10.

    Length-normalised DPO of Tulu 3, arXiv:2411.15124, section 5.
    """
    _check_flip_rate(label_smoothing)
    return _cross_entropy(beta * log_ratio_margin_per_token(policy, reference), label_smoothing)


def robust(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO: an unbiased estimate of the DPO loss when a share of the preferences is flipped.

    rDPO, arXiv:2403.00409, section 3; ``label_smoothing`` is the flip rate, in [0, 0.5). Not bounded below by 0.
    """
    _check_flip_rate(label_smoothing)
    margin = beta * log_ratio_margin(policy, reference)
    as_labelled, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Hinge loss on the reward margin; 1 / beta is the margin wanted, in nats.

    SLiC-HF, arXiv:2305.10425, Eq. 1, on log-ratios as in RSO, arXiv:2309.06657.
    """
    return torch.relu(1 - beta * log_ratio_margin(policy, reference))


def ipo(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """IPO: the margin is drawn to 1 / (2 beta) instead of without bound.

    arXiv:2310.12036, Eq. 17, where beta is called tau. On log-ratios per token, as its authors confirmed to the
    maintainers of TRL and as TRL computes it; the paper's formula leaves the normalisation open.
    """
    return (log_ratio_margin_per_token(policy, reference) - 1 / (2 * beta)) ** 2


def exo_pair(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """EXO on pairs: reverse KL from the policy's preference to the labels', smoothed so that it is finite.

    arXiv:2402.00856, Eq. 16.

    Raises:
        ValueError: ``label_smoothing`` is outside (0, 0.5).
    """
    if not 0 < label_smoothing < 0.5:
        raise ValueError(f"loss.args.label_smoothing is {label_smoothing}; for exo_pair it must lie in (0, 0.5)")
    margin = beta * log_ratio_margin(policy, reference)
    smoothing = torch.tensor(label_smoothing, dtype=margin.dtype, device=margin.device)
    chosen = margin.sigmoid() * (F.logsigmoid(margin) - torch.log1p(-smoothing))
    rejected = (-margin).sigmoid() * (F.logsigmoid(-margin) - smoothing.log())
    return chosen + rejected


def nca_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """NCA on pairs: raises the likelihood of the chosen completion itself, not only its distance to the rejected.

    arXiv:2402.05369, the binary objective of section 4.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_hard(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """SPPO with the preference probabilities taken as 1 and 0; 1 / beta is the paper's eta.

    arXiv:2405.00675, Eq. 4.7.
    """
    chosen, rejected = log_ratios(policy, reference)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """APO-zero: chosen up, rejected down; for chosen completions better than what the policy writes.

    arXiv:2408.06266, Eq. 7.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """APO-down: both down, the rejected further; for chosen completions worse than what the policy writes.

    arXiv:2408.06266, Eq. 8.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def discopop(policy: PairLogps, reference: PairLogps, *, beta: float, temperature: float = 0.05) -> Tensor:
    """DiscoPOP: a blend of logistic and exponential loss that a language model found.

    Log-ratio modulated loss, arXiv:2406.08414, Eq. 5; ``temperature`` is its tau.
    """
    margin = beta * log_ratio_margin(policy, reference)
    exponential = (margin / temperature).sigmoid()
    return (1 - exponential) * -F.logsigmoid(margin) + exponential * (-margin).exp()


def dpop(policy: PairLogps, reference: PairLogps, *, beta: float, penalty: float = 50.0) -> Tensor:
    """DPO-Positive: a penalty where the chosen completion has become less likely than under the reference.

    Smaug, arXiv:2402.13228, Eq. 3; ``penalty`` is its lambda.
    """
    chosen, rejected = log_ratios(policy, reference)
    return -F.logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))


def simpo(policy: PairLogps, reference: PairLogps | None, *, beta: float, gamma: float = 0.5) -> Tensor:
    """SimPO: the policy's own log-probability per token as reward, and a margin; needs no reference.

    arXiv:2405.14734, Eq. 6. ``beta`` is larger here, 2 to 10; ``gamma`` is the margin of rewards, about beta / 2.
    """
    return -F.logsigmoid(beta * (_per_token(policy)[0] - _per_token(policy)[1]) - gamma)


def orpo(policy: PairLogps, reference: PairLogps | None, *, beta: float) -> Tensor:
    """ORPO: likelihood of the chosen completion plus ``beta`` times the odds-ratio loss; needs no reference.

    arXiv:2403.07691, Eqs. 6 and 7, where beta is called lambda; probabilities are geometric means over the tokens.
    """
    chosen, rejected = _per_token(policy)
    log_odds_ratio = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds_ratio)


def nll(policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """Negative log-likelihood per token of the chosen completion: the term that RPO adds; needs no reference.

    arXiv:2404.19733, Eq. 1: ``loss.use: [sigmoid, nll]`` with ``loss.weights: [1, alpha]``.
    """
    return -_per_token(policy)[0]


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "dpop": dpop,
    "simpo": simpo,
    "orpo": orpo,
    "nll": nll,
}


def build_loss(loss: "LossConfig") -> PairLoss:
    """The configured loss, or weighted sum of losses, with its arguments bound.

    With ``loss.weighting: wpo`` each pair's loss is multiplied by how likely the policy is to write both completions
    (arXiv:2406.11827, Eq. 2), which ``policy.weights`` must hold.

    Raises:
        ValueError: a name or an argument is unknown or out of range, or a loss does not return one value a pair.
    """
    terms = []
    for name, weight in zip(loss.names, loss.weights or (1.0,) * len(loss.names), strict=True):
        args = loss.args if len(loss.names) == 1 else loss.args.get(name, {})
        terms.append((weight, bind(name, args, LOSSES, kind="loss", beta=loss.beta)))
    for name, (_, term) in zip(loss.names, terms, strict=True):
        _try_out(name, term)

    def pair_loss(policy: PairLogps, reference: PairLogps | None) -> Tensor:
        losses = torch.stack([weight * term(policy, reference) for weight, term in terms]).sum(0)
        return losses if policy.weights is None else losses * policy.weights

    return pair_loss


def _cross_entropy(margin: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _check_flip_rate(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"loss.args.label_smoothing is {label_smoothing}; it must lie in [0, 0.5)")


def _per_token(policy: PairLogps) -> tuple[Tensor, Tensor]:
    return policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends; a probability of 1 counts as a little less."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))


def _try_out(name: str, term: Callable[..., Any]) -> None:
    """Call a loss on two pairs, so that what is wrong with it shows before anything is loaded."""
    tokens = torch.tensor([2, 3])
    pairs = PairLogps(torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -2.0]), tokens, tokens)
    found = term(pairs, pairs)
    if not isinstance(found, Tensor) or found.shape != (2,):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"loss {name!r} returned {shape} for two pairs; it must return one loss a pair, (2,)")
