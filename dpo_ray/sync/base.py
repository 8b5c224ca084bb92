"""Weight transports: the sender in every training rank, the engines as one receiver, and the checks of each push.

Independent of Ray, of vLLM and of how a policy's weights are gathered: a sender takes an iterator of ``(name, tensor)``
and an object that stands for all engines.
"""

import hashlib
import math
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dpo_ray.types import Probe, SyncMismatch

NamedTensor = tuple[str, Tensor]
"""A whole parameter under its name in the model's checkpoint."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by size of an element, in bytes."""
DIGEST_BLOCK = {"cpu": 2**17, "cuda": 2**22}
"""Elements per step of a digest, at 24 bytes of memory each: a block fits a CPU's cache, or fills a GPU."""


class Digest:
    """Running digest of tensors: names, dtypes, shapes, values and order, but not the split into buckets.

    It is computed on each tensor's device and is the same on all. Every element, read as an integer, is multiplied by
    its position and summed modulo 2**64, so a changed element and two swapped ones always change the digest. It detects
    faults, not forgery.
    """

    def __init__(self) -> None:
        self._headers = hashlib.sha256()
        self._sums: list[Tensor] = []

    def update(self, tensors: Iterable[NamedTensor]) -> None:
        """Add tensors, in order."""
        for name, tensor in tensors:
            self._headers.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            self._sums.append(_weighted_sum(tensor))

    def hexdigest(self) -> str:
        """Digest of all tensors so far, 64 hexadecimal digits; waits for their devices."""
        sums = [int(value) for value in self._sums]
        return hashlib.sha256(f"{self._headers.hexdigest()} {sums}".encode()).hexdigest()


def _weighted_sum(tensor: Tensor) -> Tensor:
    integers = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    size = DIGEST_BLOCK[tensor.device.type]
    for start in range(0, len(integers), size):
        block = integers[start : start + size].to(torch.int64)
        total += (block * torch.arange(start + 1, start + 1 + len(block), device=tensor.device)).sum()
    return total


def to_buckets(
    weights: Iterable[NamedTensor], *, dtype: torch.dtype, device: torch.device, bucket_bytes: int
) -> Iterator[list[NamedTensor]]:
    """Prepare weights for a transfer and group them in order into buckets; a tensor above the limit gets its own.

    One tensor is read ahead of a full bucket and no more, so that about one bucket is in memory at a time. A tensor
    that already has dtype and device is not copied, so its bucket must be sent before it changes.

    Args:
        dtype: dtype of the transfer; integer tensors keep theirs.
    """
    bucket: list[NamedTensor] = []
    size = 0
    for name, weight in weights:
        tensor = weight.detach().to(device, dtype if weight.is_floating_point() else weight.dtype).contiguous()
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as a numpy array, which object stores carry without pickling its memory."""

    name: str
    """Parameter name in the model's checkpoint."""
    dtype: str
    """Name of the torch dtype, e.g. ``bfloat16``."""
    array: np.ndarray
    """The values in the tensor's shape; bfloat16, which numpy lacks, as uint16."""

    @classmethod
    def from_tensor(cls, name: str, tensor: Tensor) -> "WireTensor":
        """View a CPU tensor; it must be sent before it changes."""
        plain = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        return cls(name, dtype_name(tensor), plain.numpy())

    def to_tensor(self) -> Tensor:
        """The values as a tensor that shares the array's memory, which may be read-only: do not write to it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.array).view(getattr(torch, self.dtype))


def dtype_name(tensor: Tensor) -> str:
    """Name of the tensor's dtype without its package, e.g. ``bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


class EngineGroup(Protocol):
    """The engines, as the sender of weights sees them.

    An update is ``begin_update``, ``load`` for each message, ``end_update``; a new ``begin_update`` supersedes an
    unfinished update. In a ``collective`` one (NCCL, CUDA IPC) sender and engines transfer together: ``begin_update``
    fixes the engines that take part, and each call waits for all of them. Otherwise no call waits: each engine, also
    one that starts later, loads the messages at its own pace.
    """

    host: str
    """Address of this process for the engines."""
    workers_per_engine: int
    """GPUs per engine, each with a receiver of its own."""
    timeout_s: float
    """Longest wait for one call."""

    def begin_update(self, version: int, *, collective: bool) -> Sequence[str]:
        """Start an update, without waiting for an engine that is not up.

        Returns:
            Ids of the engines that take part, if the update is collective.
        """
        ...

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        """Pass each participating engine its initialization info, in the order of ``begin_update``."""
        ...

    def load(self, message: Any) -> None:
        """Send a message to every engine.

        Raises:
            EngineLost: in a collective update, an engine failed or did not answer in time. It is replaced; the sender
                starts the update again with the others.
        """
        ...

    def end_update(self, digest: str, probe: Probe) -> None:
        """Finish the update.

        An engine serves the version once its digest and its probe pass; one that fails is replaced. If every engine
        fails, ``Membership.error`` has both values.
        """
        ...


class EnginePool(Protocol):
    """All engines of the pool, called together.

    Each call returns when every engine has answered, and raises if one fails or does not answer in time.
    """

    host: str
    """Address of this process for the engines."""
    workers_per_engine: int
    """GPUs per engine, each with a receiver of its own."""
    timeout_s: float
    """Longest wait for one call."""

    def start_update(self) -> Sequence[Hashable]:
        """Wait until the engines are idle, and start a weight update on each.

        Returns:
            One identity per engine, in order; a replacement is not equal to the engine that it replaces.
        """

    def init_transfer(self, infos: Sequence[dict[str, Any]]) -> None:
        """Pass each engine's receivers their initialization info, one entry per engine."""

    def load(self, bucket: Any) -> None:
        """Send a message to every engine. Its memory must not change until the update is finished."""

    def finish_update(self, version: int) -> list[str]:
        """Switch every engine to the received weights.

        Returns:
            Each engine's digest of the weights it received.
        """

    def token_logps(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Each engine's log-probability of each token after the first, nats."""


class WeightSync(Protocol):
    """Moves policy weights to the rollout engines. Collective: every rank calls every method.

    Example:
        sync.connect(engines if rank == 0 else None)
        for round in ...:
            train(...)
            digest = sync.push(checkpoint_weights(policy), version=round)    # engines then use ``version``
        sync.close()
    """

    worker_extension: str
    """Import path (dotted) of the class that vLLM mixes into its workers. Its import registers the receiver."""
    replays: bool
    """True if messages can be sent again, to an engine that joins after the push. If False, an engine that dies between
    pushes stays out until the next one, and an engine that dies during a push fails it."""

    def connect(self, engines: EnginePool | None) -> None:
        """Set the receiver of later pushes; None on all ranks except rank 0."""

    def push(self, weights: Iterable[NamedTensor], *, version: int) -> str:
        """Send all weights and switch the engines to them.

        Args:
            weights: all parameters, whole. Gathering one is a collective, so every rank exhausts the iterator.
            version: policy version of the completions generated from now on.

        Returns:
            Digest of the weights sent; empty on ranks without engines.

        Raises:
            SyncMismatch: an engine received other weights than those sent.
        """

    def verify(self, token_ids: Sequence[int], trainer: Sequence[float], *, tolerance: float) -> float:
        """Compare the engines' log-probabilities of a probe text with the trainer's, after a push.

        Args:
            token_ids: the probe text.
            trainer: the trainer's log-probability of each token after the first, nats.
            tolerance: largest accepted mean absolute difference, nats per token.

        Returns:
            The largest mean absolute difference over the engines, nats per token; 0 on ranks without engines.

        Raises:
            SyncMismatch: an engine differs by more than ``tolerance``.
        """

    def close(self) -> None:
        """Disconnect from the engines and free the transport's resources."""


class Sender:
    """The part of ``WeightSync`` that all transports share; each adds ``_send`` or a push of its own.

    Args:
        bucket_mib: largest size of a message, in MiB.
        dtype: torch dtype of the transfer.
    """

    def __init__(self, bucket_mib: int = 256, dtype: str = "bfloat16") -> None:
        if bucket_mib < 1:
            raise ValueError(f"bucket_mib is {bucket_mib}; it must be at least 1 (online.sync.args.bucket_mib)")
        self._bucket_bytes = bucket_mib * 2**20
        self._dtype: torch.dtype = getattr(torch, dtype)
        self.engines: EnginePool | None = None
        self._connected = False
        self._members: list[Hashable] = []
        self._device = torch.device("cpu")

    def connect(self, engines: EnginePool | None) -> None:
        """Set the receiver of later pushes; None on all ranks except rank 0."""
        self.engines, self._connected = engines, True

    def push(self, weights: Iterable[NamedTensor], *, version: int) -> str:
        """Send all weights and switch the engines to them; see ``WeightSync.push``."""
        self._require_connected()
        if self.engines is None:
            for _ in weights:  # rank 0 gathers with the help of all ranks
                pass
            return ""
        sent = Digest()
        self._start_update(self.engines)
        for bucket in self._buckets(weights, self._device):
            self._send(self.engines, bucket, version)
            sent.update(bucket)
        return self._finish_update(self.engines, sent, version)

    def verify(self, token_ids: Sequence[int], trainer: Sequence[float], *, tolerance: float) -> float:
        """Compare the engines with the trainer on a probe text; see ``WeightSync.verify``."""
        if self.engines is None:
            return 0.0
        return check_probe(trainer, self.engines.token_logps(token_ids), tolerance)

    def close(self) -> None:
        """Disconnect from the engines."""
        self.engines, self._connected, self._members = None, False, []

    def _require_connected(self) -> None:
        if not self._connected:
            raise RuntimeError("push before connect: the transport has no engines to send to")

    def _start_update(self, engines: EnginePool) -> None:
        """Start an update, with a new transfer if the engines are not those of the last push."""
        members = list(engines.start_update())
        if members != self._members:
            self._init_transfer(engines, len(members))
            self._members = members

    def _init_transfer(self, engines: EnginePool, count: int) -> None:
        """Prepare transfers to ``count`` engines."""

    def _send(self, engines: EnginePool, bucket: list[NamedTensor], version: int) -> None:
        raise NotImplementedError

    def _buckets(self, weights: Iterable[NamedTensor], device: torch.device) -> Iterator[list[NamedTensor]]:
        return to_buckets(weights, dtype=self._dtype, device=device, bucket_bytes=self._bucket_bytes)

    def _finish_update(self, engines: EnginePool, sent: Digest, version: int) -> str:
        """Switch the engines to the weights sent and compare digests."""
        expected = sent.hexdigest()
        for index, digest in enumerate(engines.finish_update(version)):
            if digest != expected:
                raise SyncMismatch(
                    f"engine {index} received weights with digest {digest}; version {version} has {expected}"
                )
        return expected


def check_probe(trainer: Sequence[float], engines: Sequence[Sequence[float]], tolerance: float) -> float:
    """Compare log-probabilities of probe tokens; arguments and result as in ``WeightSync.verify``.

    This detects weights that arrived intact and are not used (a stale packed copy, a skipped layer).

    Raises:
        SyncMismatch: an engine differs by more than ``tolerance``, or a log-probability is not finite.
        ValueError: there are no tokens, or an engine returned a different number of them.
    """
    if not trainer:
        raise ValueError("the probe has no tokens to compare; it needs at least two")
    largest = 0.0
    for index, engine in enumerate(engines):
        difference = sum(abs(a - b) for a, b in zip(trainer, engine, strict=True)) / len(trainer)
        if not (math.isfinite(difference) and difference <= tolerance):
            raise SyncMismatch(
                f"engine {index} and the trainer differ by {difference:.4f} nats per token on the probe text "
                f"({len(trainer)} tokens; mean {sum(trainer) / len(trainer):.4f} in the trainer, "
                f"{sum(engine) / len(engine):.4f} in the engine); accepted is {tolerance} (online.probe_tolerance)"
            )
        largest = max(largest, difference)
    return largest
