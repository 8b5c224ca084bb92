"""What a weight transport is: the sender in every training rank, the engines as one receiver, and the proof of arrival.

Knows nothing of Ray, of vLLM, or of how the weights of a policy are gathered: it is handed an iterator of
``(name, tensor)`` and an object that stands for all engines.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class SyncMismatch(RuntimeError):
    """The engines do not hold the weights that the trainer sent."""


@dataclass(frozen=True, slots=True)
class WireTensor:
    """One whole tensor on its way: plain memory that any object store carries without pickling it."""

    name: str
    """Parameter name as in the model's checkpoint."""
    dtype: str
    """Name of the torch dtype, e.g. ``bfloat16``."""
    array: np.ndarray
    """The values in the tensor's shape; bfloat16, which numpy lacks, as uint16."""

    @classmethod
    def of(cls, name: str, tensor: Tensor, dtype: torch.dtype) -> "WireTensor":
        """Cast ``tensor`` to ``dtype`` (integers keep theirs) on the CPU.

        Where no cast is needed the array is a view of the tensor: it must be read before the tensor changes.
        """
        values = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        plain = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
        return cls(name, str(values.dtype).removeprefix("torch."), plain.numpy())

    def tensor(self) -> Tensor:
        """The values as a tensor that shares the array's memory; it may be read-only and must not be written to."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.array).view(getattr(torch, self.dtype))


@dataclass(frozen=True, slots=True)
class Bucket:
    """Whole tensors that travel in one message."""

    tensors: tuple[WireTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values, in bytes."""
        return sum(tensor.array.nbytes for tensor in self.tensors)


class Digest:
    """Running digest of a sequence of tensors: their names, dtypes, shapes, bytes and order, not their buckets."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()  # processors have instructions for it: twice as fast as blake2b

    def update(self, bucket: Bucket) -> None:
        """Take in the tensors of ``bucket``, in order."""
        for tensor in bucket.tensors:
            self._hash.update(f"{tensor.name} {tensor.dtype} {tensor.array.shape} ".encode())
            self._hash.update(np.ascontiguousarray(tensor.array).data)

    def hexdigest(self) -> str:
        """Digest of everything taken in so far."""
        return self._hash.hexdigest()


class EngineGroup(Protocol):
    """All engines of the pool as one receiver.

    Each call returns when every engine has answered, and raises when one fails or a time-out, which says what it waited
    for, runs out.
    """

    def start_update(self) -> None:
        """Open a weight update on every engine."""
        ...

    def load(self, bucket: Bucket) -> None:
        """Give the bucket to every engine. The sender leaves its memory as it is until the update is finished."""
        ...

    def finish_update(self, version: int) -> list[str]:
        """Put the received weights to use on every engine.

        Returns:
            Each engine's digest of the bytes it received.
        """
        ...

    def token_logps(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Each engine's log-probability in nats of each token after the first."""
        ...


class WeightSync(Protocol):
    """Moves policy weights to the rollout engines. Every rank calls every method, in step.

    Example:
        sync.connect(engines if rank == 0 else None)
        for round in ...:
            train(...)
            digest = sync.push(named_weights(policy), version=round)    # engines write with `version` from here on
        sync.close()
    """

    worker_extension: str
    """Import path (dotted) of the class that vLLM loads in its workers: the receiving end."""

    def connect(self, engines: EngineGroup | None) -> None:
        """Set where pushes go; None on every rank but rank 0."""
        ...

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> str:
        """Send all weights and put them to use as ``version``.

        Args:
            weights: every parameter under its checkpoint name, whole. Producing one is a collective, so every rank
                exhausts the iterator.
            version: policy version that completions are stamped with from now on.

        Returns:
            Digest of the bytes sent; empty on ranks that have no engines.

        Raises:
            SyncMismatch: an engine received something else than was sent.
        """
        ...

    def verify(self, token_ids: Sequence[int], trainer: Sequence[float], *, tolerance: float) -> float:
        """Hold the engines' log-probabilities of a probe text against the trainer's, after a push.

        Args:
            token_ids: the probe text.
            trainer: the trainer's log-probability of each token after the first, nats.
            tolerance: largest mean absolute difference accepted, nats a token.

        Returns:
            The largest mean absolute difference over the engines; 0 on ranks that have no engines.

        Raises:
            SyncMismatch: an engine is further away.
        """
        ...

    def close(self) -> None:
        """Let go of the engines and of whatever the transport holds."""
        ...


def check_probe(trainer: Sequence[float], engines: Sequence[Sequence[float]], tolerance: float) -> float:
    """Hold the engines' log-probabilities of a probe text against the trainer's.

    Bytes that arrived may still be put to the wrong use (a stale packed copy, a layer left out); this notices.

    Args:
        trainer: log-probability of each probe token by the trainer, nats.
        engines: the same by each engine.
        tolerance: largest mean absolute difference accepted, nats a token.

    Returns:
        The largest mean absolute difference over the engines, nats a token.

    Raises:
        SyncMismatch: an engine is further away than ``tolerance``, or a number is not finite.
        ValueError: there are no tokens, or an engine scored another number of them.
    """
    if not trainer:
        raise ValueError("the probe has no tokens to compare; it needs at least two")
    largest = 0.0
    for index, engine in enumerate(engines):
        difference = sum(abs(t - e) for t, e in zip(trainer, engine, strict=True)) / len(trainer)
        if not (math.isfinite(difference) and difference <= tolerance):
            raise SyncMismatch(
                f"engine {index} and the trainer differ by {difference:.4f} nats a token on the probe text "
                f"({len(trainer)} tokens, mean {sum(trainer) / len(trainer):.4f} by the trainer, "
                f"{sum(engine) / len(engine):.4f} by the engine); accepted is {tolerance} (online.probe_tolerance)"
            )
        largest = max(largest, difference)
    return largest
