"""The reference in a training step: a function from a micro-batch to log-probabilities."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dpo_ray.data.packing import PackedRow, to_device
from dpo_ray.objective.logps import PairLogps

Reference = Callable[[Sequence[int], PackedRow], PairLogps | None]
"""(pair indices, row of these pairs) -> their reference log-probabilities; None for losses without a reference."""


def cached_reference(logps: np.ndarray) -> Reference:
    """Looks up pairs by index in ``logps``, the (n, 2) chosen and rejected log-probabilities of all pairs, nats."""

    def reference(pairs: Sequence[int], row: PackedRow) -> PairLogps:
        of_pairs = to_device(torch.from_numpy(logps[list(pairs)].astype(np.float32)), row.lengths.device)  # (B, 2)
        return PairLogps(*of_pairs.unbind(1), *row.lengths[row.pairs].unbind(1))

    return reference


def live_reference(frozen: Callable[[PackedRow], PairLogps]) -> Reference:
    """Computes the reference log-probabilities of each micro-batch with a frozen model."""

    @torch.no_grad()
    def reference(pairs: Sequence[int], row: PackedRow) -> PairLogps:
        return frozen(row)

    return reference


def no_reference(pairs: Sequence[int], row: PackedRow) -> None:
    """For losses without a reference: nothing is loaded or computed."""
