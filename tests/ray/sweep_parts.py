"""Losses that fail in training, in the ways of real ones, and a space that tries them."""

import os
import signal
from pathlib import Path
from typing import Any

from ray import tune
from torch import Tensor

from dpo_ray.launch.sweep import Sweep
from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import sigmoid

DIED = "DPO_RAY_TESTS_DIED"
"""Environment variable: a file with a dot per call of ``dies_once``."""


def raises(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Fail with a message."""
    if policy.chosen.requires_grad:
        raise RuntimeError("the loss's own words")
    return sigmoid(policy, reference, beta=beta)


def gives_nan(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """A loss that is never finite."""
    return sigmoid(policy, reference, beta=beta) * (float("nan") if policy.chosen.requires_grad else 1.0)


def dies(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Kill the process, as the kernel does when memory runs out."""
    if policy.chosen.requires_grad:
        os.kill(os.getpid(), signal.SIGKILL)
    return sigmoid(policy, reference, beta=beta)


def dies_once(policy: PairLogps, reference: PairLogps, *, beta: float, file: str) -> Tensor:
    """Kill the process in the fourth step: by then, the checkpoint of the first is complete. Happens once."""
    if policy.chosen.requires_grad:
        with Path(file).open("a") as calls:
            calls.write(".")
        if Path(file).stat().st_size == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    return sigmoid(policy, reference, beta=beta)


def _loss(name: str, **args: Any) -> dict[str, Any]:
    return {"use": f"tests.ray.sweep_parts:{name}", "args": args}


SWEEP = Sweep(
    space={
        "loss": tune.grid_search(
            [
                {"use": "sigmoid", "args": {}},
                _loss("raises"),
                _loss("gives_nan"),
                _loss("dies"),
                _loss("dies_once", file=os.environ.get(DIED, "")),
            ]
        )
    },
    metric="eval/rewards/margins",
    samples=5,
)
