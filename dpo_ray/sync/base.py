"""Weight transports: the sender in every training rank, the engines as one receiver, and the checks of each push.

Independent of Ray, of vLLM and of how a policy's weights are gathered: a sender takes an iterator of ``(name, tensor)``
and an object that stands for all engines.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dpo_ray.parallel.collectives import broadcast_or_raise
from dpo_ray.sync.tensors import Digest, NamedTensor, to_buckets
from dpo_ray.threads import in_thread
from dpo_ray.types import EngineLost, Probe

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

CLOSE_TIMEOUT_S = 30.0
ATTEMPTS = 3
"""Attempts to send weights while engines are lost."""


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

        Only the first collective update waits until each engine is up or has failed to start.

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


class WeightSync(Protocol):
    """Moves policy weights to the rollout engines. Every rank calls every method.

    Example:
        sync.connect(engines if rank == 0 else None)
        for round in ...:
            train(...)
            sync.publish(CheckpointWeights(policy, dtype), version=round, probe=probe)    # engines then use ``version``
        sync.wait()
        sync.close()
    """

    worker_extension: str
    """Import path (dotted) of the class that vLLM mixes into its workers. Its import registers the receiver."""
    collective: bool
    """True if sender and engines transfer together, see ``EngineGroup``: an engine that joins later waits for the next
    publish."""
    every_rank: bool
    """True if each rank needs all weights, False if only rank 0 does."""
    adapters_only: bool
    """True if the adapters of the policy are published, not its weights."""

    def connect(self, engines: EngineGroup | None) -> None:
        """Set the receiver of later publishes; None on all ranks except rank 0."""
        ...

    def publish(self, weights: Iterable[NamedTensor], *, version: int, probe: Probe) -> None:
        """Send all weights to the engines, or start to.

        Waits for the last publish, and raises its error. If no engine is up, nothing is sent.

        Args:
            weights: all parameters, whole. Each iteration may gather them by collectives, so every rank iterates to the
                end, as often as rank 0 does.
            version: policy version of the completions that engines then generate.
            probe: computed with these weights.

        Raises:
            EngineLost: engines failed in each of several attempts.
        """
        ...

    def wait(self) -> None:
        """Wait until the last publish has been handed over to the engines, or to the fleet; raises its error."""
        ...

    def check(self) -> None:
        """Raise the error of the last publish if it has failed in the background; returns at once."""
        ...

    def close(self) -> None:
        """Disconnect from the engines and free the transport's resources.

        A publish in the background gets CLOSE_TIMEOUT_S, then it is abandoned.
        """
        ...


class Sender:
    """The part of ``WeightSync`` that all transports share; each adds ``_send``.

    Rank 0 gathers a bucket while a thread sends the one before it, so it holds up to two.

    Args:
        bucket_mib: largest size of a message, in MiB.
        dtype: torch dtype of the transfer.
        background: return from ``publish`` as soon as rank 0 has a copy of the weights in host memory, which a thread
            then sends.
    """

    worker_extension: str
    collective = False
    every_rank = False
    adapters_only = False

    def __init__(self, bucket_mib: int = 64, dtype: str = "bfloat16", background: bool = False) -> None:
        if bucket_mib < 1:
            raise ValueError(f"bucket_mib is {bucket_mib}; it must be at least 1 (online.sync.args.bucket_mib)")
        self._bucket_bytes = bucket_mib * 2**20
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._staging = Staging(self._dtype) if background else None
        self._publishing: Future[Any] | None = None
        self.engines: EngineGroup | None = None
        self._connected = False
        self._members: list[str] = []
        self._device = torch.device("cpu")

    def connect(self, engines: EngineGroup | None) -> None:
        self.engines, self._connected = engines, True

    def publish(self, weights: Iterable[NamedTensor], *, version: int, probe: Probe) -> None:
        if not self._connected:
            raise RuntimeError("publish before connect: the transport has no engines to send to")
        self.wait()
        if self._staging is None:
            self._update(weights, version, probe, broadcast_or_raise if self.collective else call)
            return
        staged = self._staging.copy(weights)
        if self.engines is not None:
            self._publishing = in_thread(on_own_stream(partial(self._update, staged, version, probe, call)))

    def check(self) -> None:
        if self._publishing is not None and self._publishing.done():
            self.wait()

    def wait(self) -> None:
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.result()

    def close(self) -> None:
        if self._publishing is not None:
            # The next run of this process publishes to the same engines.
            with contextlib.suppress(Exception):
                self._publishing.result(CLOSE_TIMEOUT_S)
        self._reset()
        self.engines, self._connected, self._publishing = None, False, None

    def _update(
        self, weights: Iterable[NamedTensor], version: int, probe: Probe, agree: Callable[[Callable[[], Any]], Any]
    ) -> None:
        """Send the weights, again if an engine is lost.

        Args:
            agree: calls a function on every rank that takes part and returns rank 0's result, or raises its error.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if agree(partial(self._begin_update, version)):
                    agree(partial(self._send_all, weights, version, probe))
                return
            except BaseException as error:
                self._reset()
                if not isinstance(error, EngineLost) or attempt == ATTEMPTS:
                    raise
                logger.warning("weights of version %d are sent again: %s", version, error)

    def _begin_update(self, version: int) -> bool:
        """Start an update; False if no engine takes part."""
        if self.engines is None:
            return True
        members = list(self.engines.begin_update(version, collective=self.collective))
        if not self.collective:
            return True
        if members and members != self._members:
            self._init_transfer(self.engines, len(members))
        self._members = members
        return bool(members)

    def _init_transfer(self, engines: EngineGroup, count: int) -> None:
        """Prepare transfers to ``count`` engines, which are not those of the last update."""

    def _send_all(self, weights: Iterable[NamedTensor], version: int, probe: Probe) -> None:
        """Send all buckets and finish the update. Iterates over all weights, also if sending fails."""
        buckets = self._buckets(weights, self._device)
        if self.engines is None:
            exhaust(buckets)  # rank 0 gathers with the help of all ranks
            return
        sent, sending = Digest(), None
        try:
            for bucket in buckets:
                sent.update(bucket)
                synchronize(self._device)  # the bucket is complete; another thread's stream reads it
                if sending is not None:
                    sending.result()
                sending = in_thread(partial(self._send, self.engines, bucket, version))
            if sending is not None:
                sending.result()
        except Exception:
            exhaust(buckets)
            raise
        self.engines.end_update(sent.hexdigest(), probe)

    def _send(self, engines: EngineGroup, bucket: list[NamedTensor], version: int) -> None:
        raise NotImplementedError

    def _buckets(self, weights: Iterable[NamedTensor], device: torch.device) -> Iterator[list[NamedTensor]]:
        return to_buckets(weights, dtype=self._dtype, device=device, bucket_bytes=self._bucket_bytes)

    def _reset(self) -> None:
        """Give up transfers in progress; the next update starts with new ones."""
        self._members = []


class Staging:
    """Copies of all weights in host memory. Each copy overwrites the last: allocating takes longer than copying.

    Args:
        dtype: dtype of the copies; integer tensors keep theirs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._copies: dict[str, Tensor] = {}

    def copy(self, weights: Iterable[NamedTensor]) -> list[NamedTensor]:
        """Copies of the weights, in order."""
        names, device = [], torch.device("cpu")
        for name, weight in weights:
            dtype = self.dtype if weight.is_floating_point() else weight.dtype
            copy = self._copies.get(name)
            if copy is None or copy.shape != weight.shape or copy.dtype != dtype:
                copy = torch.empty(weight.shape, dtype=dtype, pin_memory=weight.device.type != "cpu")
                self._copies[name] = copy
            copy.copy_(weight.detach(), non_blocking=True)
            names.append(name)
            if weight.device.type != "cpu":  # small values of adapters are on the CPU
                device = weight.device
        synchronize(device)
        return [(name, self._copies[name]) for name in names]


def synchronize(device: torch.device) -> None:
    """Wait for the work on the current stream of a device, and no other stream: one might wait for a dead engine."""
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()


def call(function: Callable[[], Value]) -> Value:
    """``function()``."""
    return function()


def exhaust(iterator: Iterator[Any]) -> None:
    """Iterate to the end."""
    for _ in iterator:
        pass


def on_own_stream(function: Callable[[], Value]) -> Callable[[], Value]:
    """``function`` for another thread: on this thread's GPU, if there is one, and on a stream of its own."""
    if not torch.accelerator.is_available():
        return function
    device = torch.accelerator.current_device_index()

    def run() -> Value:
        with torch.accelerator.device_index(device), torch.Stream(device):
            return function()

    return run
