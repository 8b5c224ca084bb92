"""What a weight transport is: the sender in every training rank, the engines as one receiver, and the proof of arrival.

Knows nothing of Ray, of vLLM, or of how the weights of a policy are gathered: it is handed an iterator of
``(name, tensor)`` and an object that stands for all engines.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dpo_ray.types import NonRetryableError

Item = TypeVar("Item")

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers that a tensor's elements are read as, by size in bytes."""
CHECKSUM_BLOCK = 2**24
"""Elements summed at a time: torch widens each to eight bytes for it."""


class SyncMismatch(NonRetryableError):
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


class Checksum:
    """Running digest of tensors that is computed where they are: bytes of GPUs need not come to the host.

    The elements are summed as integers, weighted by row and by column, so that a changed, swapped or shifted one shows.
    It guards against faults, not against forgery; it is the same on every device and for every split into buckets.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._sums: list[Tensor] = []

    def update(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor."""
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        self._sums.append(_weighted_sum(tensor))

    def hexdigest(self) -> str:
        """Digest of everything taken in so far; waits for the devices."""
        sums = [int(value) for value in self._sums]
        return hashlib.sha256(f"{self._hash.hexdigest()} {sums}".encode()).hexdigest()


def _weighted_sum(tensor: Tensor) -> Tensor:
    words = tensor.detach().contiguous().view(WORDS[tensor.element_size()])
    table = words.reshape(-1, words.shape[-1] if words.dim() else 1)
    rows, width = table.shape
    total = torch.zeros((), dtype=torch.int64, device=table.device)
    columns = torch.zeros(width, dtype=torch.int64, device=table.device)
    step = max(1, CHECKSUM_BLOCK // max(1, width))
    for start in range(0, rows, step):
        block = table[start : start + step].to(torch.int64)
        total += (block.sum(1) * torch.arange(start + 1, start + 1 + len(block), device=table.device)).sum()
        columns += block.sum(0)
    return total * 31 + (columns * torch.arange(1, width + 1, device=table.device)).sum()


def in_buckets(items: Iterable[Item], nbytes: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """The items in order, in lists of at most ``limit`` bytes; a larger item comes alone.

    Takes from ``items`` only as far as the next bucket needs, so that one bucket is in memory at a time.
    """
    bucket: list[Item] = []
    size = 0
    for item in items:
        more = nbytes(item)
        if bucket and size + more > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += more
    if bucket:
        yield bucket


class EngineGroup(Protocol):
    """All engines of the pool as one receiver.

    Each call returns when every engine has answered, and raises when one fails or a time-out, which says what it waited
    for, runs out.
    """

    host: str
    """Address by which engines reach this process."""
    workers_per_engine: int
    """GPUs, and so receiving ends, of one engine."""
    timeout_s: float
    """Longest wait for one call."""

    def start_update(self) -> Sequence[Hashable]:
        """Wait until the engines are idle, and open a weight update on each.

        Returns:
            Who the engines are, in order: another one in a place is not equal to the one before.
        """
        ...

    def init_transfer(self, infos: Sequence[dict[str, Any]]) -> None:
        """Give each engine's receiving ends what they need to know before the first message, one entry an engine."""
        ...

    def load(self, bucket: Any) -> None:
        """Give a message to every engine. The sender leaves its memory as it is until the update is finished."""
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
    replays: bool
    """Whether what was pushed can be given once more, to an engine that joins later. If not, a dead engine stays out
    until the next push, and one that dies in a push ends it."""

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


class Sender:
    """What all transports here do alike: everything but the push."""

    def __init__(self) -> None:
        self.engines: EngineGroup | None = None
        self._connected = False

    def connect(self, engines: EngineGroup | None) -> None:
        """Set where pushes go; None on every rank but rank 0."""
        self.engines, self._connected = engines, True

    def verify(self, token_ids: Sequence[int], trainer: Sequence[float], *, tolerance: float) -> float:
        """Compare the engines with the trainer on a probe text; see ``WeightSync.verify``."""
        if self.engines is None:
            return 0.0
        return check_probe(trainer, self.engines.token_logps(token_ids), tolerance)

    def close(self) -> None:
        """Let go of the engines."""
        self.engines, self._connected = None, False

    def require_connected(self) -> None:
        """Raise a RuntimeError before ``connect``."""
        if not self._connected:
            raise RuntimeError("push before connect: the weights would go nowhere")


def bytes_of(bucket_mib: int) -> int:
    """A transport's argument ``bucket_mib`` in bytes; refuses what is no size."""
    if bucket_mib < 1:
        raise ValueError(f"bucket_mib is {bucket_mib}; it must be at least 1 (online.sync.args.bucket_mib)")
    return bucket_mib * 2**20


def check_received(received: Sequence[str], sent: str, version: int) -> str:
    """Hold the engines' digests against that of what was sent, which is returned.

    Raises:
        SyncMismatch: an engine received something else.
    """
    for index, digest in enumerate(received):
        if digest != sent:
            raise SyncMismatch(f"engine {index} received weights with digest {digest}; version {version} has {sent}")
    return sent


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
