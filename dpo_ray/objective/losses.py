"""Preference losses: pure functions of policy and reference log-probabilities, one dictionary.

A new loss is a function here and an entry in ``LOSSES``; one of your own is ``loss.use: my_lab.losses:mine``. Each
takes ``(policy, reference, *, beta, ...)`` and returns one loss a pair; the mean over the global step is taken by the
training step, never here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dpo_ray.objective.logps import PairLogps
from dpo_ray.plugins import bind

PairLoss = Callable[[PairLogps, PairLogps], Tensor]
"""(policy, reference) -> (B,) loss per pair."""


def log_ratio_margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    """(B,) log-ratio of policy to reference on the chosen completion minus that on the rejected one, nats."""
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def sigmoid(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: negative log-likelihood of the preferences under Bradley-Terry.

    arXiv:2305.18290, Eq. 7; with ``label_smoothing`` > 0, conservative DPO (ericmitchell.ai/cdpo.pdf, Eq. 3).

    Args:
        policy, reference: completion log-probabilities, (B,) each, summed over tokens, nats.
        beta: scale of the implicit reward, 1/nat.
        label_smoothing: probability in [0, 0.5) that a preference is flipped.

    Returns:
        (B,) loss per pair, nats.

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"loss.args.label_smoothing is {label_smoothing}; it must lie in [0, 0.5)")
    margin = beta * log_ratio_margin(policy, reference)  # (B,)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": sigmoid}


def build_loss(use: str, beta: float, args: Mapping[str, Any]) -> PairLoss:
    """The named loss with its arguments bound: (policy, reference) -> (B,).

    Raises:
        ValueError: the name or an argument is unknown.
    """
    return bind(use, {"beta": beta, **args}, LOSSES, kind="loss")
