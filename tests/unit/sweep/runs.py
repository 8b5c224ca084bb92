"""Sweeps on disk with known held-out results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ray.sweep.held_out import write_pair_results
from dpo_ray.sweep.trials import Objective, Trial

ACCURACY = Objective("eval/rewards/accuracies")


def trial(name: str, folder: Path, correct: Sequence[float] | str, *, loss: float = 0.5, **values: Any) -> Trial:
    """A finished trial with its held-out file; ``correct`` of each pair, also as text such as ``1101``.

    Keys of ``values`` spell a dot as ``__``.
    """
    margins = np.array([float(value) - 0.5 for value in correct])
    results = np.column_stack((np.full(len(margins), loss), margins, margins, -margins))
    write_pair_results(folder / name, results, step=8, pairs="set")
    metrics = {"step": 8, "eval/rewards/accuracies": float((margins > 0).mean()), "eval/loss": loss}
    return Trial(name, {key.replace("__", "."): value for key, value in values.items()}, "done", metrics, 10.0)
