"""Weights over NCCL: training rank 0 broadcasts buckets to the GPUs of all engines, which have GPUs of their own.

Sender and receiver adapt vLLM's NCCL weight-transfer engine, which is imported on first use. NCCL never times out on a
peer that has died, so nothing here waits for NCCL itself: the broadcast and the call to the engines run in two threads
that are never joined, and a broadcast that takes too long is aborted.
"""

import functools
import logging
import socket
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

import torch

from dpo_ray.sync.base import Digest, EngineGroup, NamedTensor, Sender, check_digests, dtype_name

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""Extra wait for the broadcast: the engines' calls time out first, with a better message."""


class NCCLSync(Sender):
    """The sender; see ``WeightSync``.

    Args:
        bucket_mib: largest size of a broadcast; rank 0 and each GPU of an engine hold one.
        dtype: torch dtype of the transfer.
    """

    worker_extension = f"{__name__}.NCCLWorker"
    replays = False

    def __init__(self, bucket_mib: int = 512, dtype: str = "bfloat16") -> None:
        super().__init__(bucket_mib, dtype)
        self._communicator: Communicator | None = None
        self._members: list[Hashable] = []

    def push(self, weights: Iterable[NamedTensor], *, version: int) -> str:
        """Send all weights and switch the engines to them; see ``WeightSync.push``.

        Raises:
            TimeoutError: an engine did not take part in a broadcast in time.
        """
        self.require_connected()
        if self.engines is None:
            for _ in weights:  # rank 0 gathers with the help of all ranks
                pass
            return ""
        try:
            return self._push(self.engines, weights, version)
        except BaseException:
            self._destroy_group()  # unusable after an interrupted broadcast
            raise

    def close(self) -> None:
        """Destroy the group and disconnect from the engines."""
        self._destroy_group()
        super().close()

    def _push(self, engines: EngineGroup, weights: Iterable[NamedTensor], version: int) -> str:
        members = list(engines.start_update())
        if self._communicator is None or members != self._members:
            self._destroy_group()
            self._communicator, self._members = init_group(engines, len(members), self._bucket_bytes), members
        communicator, sent = self._communicator, Digest()
        for bucket in self.buckets(weights, communicator.device):
            run_concurrently(
                functools.partial(engines.load, update_info(bucket)),
                functools.partial(communicator.broadcast, bucket),
                timeout_s=engines.timeout_s + GRACE_S,
                action=f"broadcasting {len(bucket)} tensors of version {version} to {len(members)} engines",
            )
            sent.update(bucket)
        return check_digests(engines.finish_update(version), sent.hexdigest(), version)

    def _destroy_group(self) -> None:
        if self._communicator is not None:
            self._communicator.close()
        self._communicator, self._members = None, []


class Communicator:
    """The sender's end of the NCCL group, rank 0.

    Args:
        group: vLLM's ``PyNcclCommunicator``.
    """

    def __init__(self, group: Any, bucket_bytes: int) -> None:
        self.device: torch.device = group.device
        self._group, self._bucket_bytes = group, bucket_bytes

    def broadcast(self, bucket: Sequence[NamedTensor]) -> None:
        """Broadcast a bucket in one message and wait until it is sent. Callable from any thread."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        with torch.accelerator.device_index(self.device.index):  # a new thread is on device 0
            torch.accelerator.synchronize()  # vLLM's own streams do not wait for the gather
            packed_nccl_broadcast_producer(
                iter(bucket),
                self._group,
                src=0,
                post_iter_func=lambda item: item[1],
                # A tensor above the limit is a message of its own, for sender and receiver.
                buffer_size_bytes=max(self._bucket_bytes, sum(tensor.nbytes for _, tensor in bucket)),
                num_buffers=1,
            )

    def close(self) -> None:
        """Leave the group; aborts a broadcast in progress."""
        self._group.destroy()


def update_info(bucket: Sequence[NamedTensor]) -> dict[str, Any]:
    """Fields of vLLM's ``NCCLWeightTransferUpdateInfo`` for a bucket."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [dtype_name(tensor) for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def init_infos(host: str, port: int, engines: int, workers_per_engine: int, bucket_bytes: int) -> list[dict[str, Any]]:
    """Fields of vLLM's ``NCCLWeightTransferInitInfo``, one entry per engine.

    The sender is rank 0 of the group; the workers of the engines follow, engine by engine.
    """
    return [
        {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1 + engine * workers_per_engine,
            "world_size": 1 + engines * workers_per_engine,
            "packed": True,
            "packed_buffer_size_bytes": bucket_bytes,
            "packed_num_buffers": 1,
        }
        for engine in range(engines)
    ]


def init_group(engines: EngineGroup, count: int, bucket_bytes: int) -> Communicator:
    """Build the NCCL group of this process and all workers of ``count`` engines.

    Raises:
        TimeoutError: not all of them joined in time.
    """
    port = free_port()
    infos = init_infos(engines.host, port, count, engines.workers_per_engine, bucket_bytes)
    world_size = infos[0]["world_size"]
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else 0
    _, communicator = run_concurrently(
        lambda: engines.init_transfer(infos),
        lambda: open_communicator(engines.host, port, world_size, device, bucket_bytes),
        timeout_s=engines.timeout_s + GRACE_S,
        action=f"building an NCCL group of {world_size} at {engines.host}:{port} with {count} engines",
    )
    logger.info("NCCL group of %d: this process and %d engines of %d", world_size, count, engines.workers_per_engine)
    return communicator


def open_communicator(host: str, port: int, world_size: int, device: int, bucket_bytes: int) -> Communicator:
    """Join the group as rank 0; returns when all ranks have joined."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    with torch.accelerator.device_index(device):
        group = trainer_init({"master_address": host, "master_port": port, "world_size": world_size})
    validate_nccl(group)
    return Communicator(group, bucket_bytes)


def validate_nccl(group: Any) -> None:
    """Raise a RuntimeError if vLLM's communicator has no NCCL library: it would silently send nothing."""
    if not group.available or group.disabled:
        raise RuntimeError("vLLM found no NCCL library to send weights with; set online.sync.use: object_store")


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def run_concurrently(
    receive: Callable[[], Any], send: Callable[[], Any], *, timeout_s: float, action: str
) -> tuple[Any, Any]:
    """Run two calls that wait for each other in threads; returns both results. Raises the first failure at once.

    Raises:
        TimeoutError: not both returned in time; the message names ``action``.
    """
    calls = [_in_thread(receive), _in_thread(send)]
    done, pending = wait(calls, timeout=timeout_s, return_when=FIRST_EXCEPTION)
    for call in done:
        call.result()
    if pending:
        raise TimeoutError(f"{action} did not end in {timeout_s:g} s (online.sync_timeout_s)")
    return calls[0].result(), calls[1].result()


def _in_thread(call: Callable[[], Any]) -> Future[Any]:
    # Not an executor: Python joins its threads at exit, and a thread that waits for NCCL would block the exit forever.
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


@functools.cache
def _worker_extension() -> type:
    """The class to mix into vLLM's workers; the first call registers the receiver with vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    from dpo_ray.sync.receiver import DigestMixin, DigestWorker

    class NCCLReceiver(DigestMixin, NCCLWeightTransferEngine):
        """vLLM's receiver with a digest; it leaves the group of an earlier trainer."""

        def init_transfer_engine(self, init_info: Any) -> None:
            self.shutdown()
            super().init_transfer_engine(init_info)
            validate_nccl(self.model_update_group)

    WeightTransferEngineFactory.register_engine(NCCLSync.worker_extension, NCCLReceiver)
    return DigestWorker


def __getattr__(name: str) -> Any:
    if name == "NCCLWorker":
        return _worker_extension()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
