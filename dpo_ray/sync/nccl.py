"""Weights over NCCL: training rank 0 broadcasts buckets to the GPUs of all engines, which have GPUs of their own.

Sender and receiver adapt vLLM's NCCL weight-transfer engine, which is imported on first use. NCCL never times out on a
peer that has died, so nothing here waits for NCCL itself: the broadcast and the call to the engines run in two threads
that are never joined, and a broadcast that takes too long is aborted.
"""

import functools
import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from typing import Any

import torch

from dpo_ray.sync.base import EngineGroup, Sender
from dpo_ray.sync.tensors import NamedTensor, dtype_name
from dpo_ray.threads import in_thread

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""Extra wait for the broadcast: the engines' calls time out first, with a better message."""


class NCCLSync(Sender):
    """The sender; see ``WeightSync``.

    Args:
        bucket_mib: largest size of a broadcast; rank 0 holds up to three of them, each GPU of an engine one.
        dtype: torch dtype of the transfer.
        background: see ``Sender``.
    """

    worker_extension = f"{__name__}.NCCLWorker"
    collective = True

    def __init__(self, bucket_mib: int = 512, dtype: str = "bfloat16", background: bool = False) -> None:
        super().__init__(bucket_mib, dtype, background)
        self._group: Any = None
        """vLLM's ``PyNcclCommunicator``; this process is its rank 0."""

    def _init_transfer(self, engines: EngineGroup, count: int) -> None:
        self._reset()
        self._group = init_group(engines, count, self._bucket_bytes)
        self._device = self._group.device

    def _send(self, engines: EngineGroup, bucket: list[NamedTensor], version: int) -> None:
        run_concurrently(
            functools.partial(engines.load, update_info(bucket)),
            functools.partial(broadcast, bucket, self._group, self._bucket_bytes),
            timeout_s=engines.timeout_s + GRACE_S,
            action=f"broadcasting {len(bucket)} tensors of version {version} to {len(self._members)} engines",
        )

    def _reset(self) -> None:
        super()._reset()
        if self._group is not None:
            self._group.destroy()  # aborts a broadcast in progress, after which the group is unusable
        self._group = None


def broadcast(bucket: Sequence[NamedTensor], group: Any, bucket_bytes: int) -> None:
    """Broadcast a bucket in one message and wait until it is sent. Callable from any thread."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    with torch.accelerator.device_index(group.device.index):  # a new thread is on device 0
        packed_nccl_broadcast_producer(
            iter(bucket),
            group,
            src=0,
            post_iter_func=lambda item: item[1],
            # A tensor above the limit is a message of its own, for sender and receiver.
            buffer_size_bytes=max(bucket_bytes, sum(tensor.nbytes for _, tensor in bucket)),
            num_buffers=1,
        )


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


def init_group(engines: EngineGroup, count: int, bucket_bytes: int) -> Any:
    """Build the NCCL group of this process and all workers of ``count`` engines.

    Raises:
        TimeoutError: not all of them joined in time.
    """
    port = free_port()
    infos = init_infos(engines.host, port, count, engines.workers_per_engine, bucket_bytes)
    world_size = infos[0]["world_size"]
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else 0
    _, group = run_concurrently(
        lambda: engines.init_transfer(infos),
        lambda: join_group(engines.host, port, world_size, device),
        timeout_s=engines.timeout_s + GRACE_S,
        action=f"building an NCCL group of {world_size} at {engines.host}:{port} with {count} engines",
    )
    logger.info("NCCL group of %d: this process and %d engines of %d", world_size, count, engines.workers_per_engine)
    return group


def join_group(host: str, port: int, world_size: int, device: int) -> Any:
    """Join the group as rank 0; returns when all ranks have joined."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    with torch.accelerator.device_index(device):
        group = trainer_init({"master_address": host, "master_port": port, "world_size": world_size})
    validate_nccl(group)
    return group


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
    calls = [in_thread(receive), in_thread(send)]
    done, pending = wait(calls, timeout=timeout_s, return_when=FIRST_EXCEPTION)
    for call in done:
        call.result()
    if pending:
        raise TimeoutError(f"{action} did not end in {timeout_s:g} s (online.sync_timeout_s)")
    return calls[0].result(), calls[1].result()


@functools.cache
def __getattr__(name: str) -> Any:
    """``NCCLWorker``, the class to mix into vLLM's workers; its first use registers the receiver with vLLM."""
    if name != "NCCLWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
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
