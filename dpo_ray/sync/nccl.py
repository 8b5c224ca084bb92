"""Weights over NCCL: rank 0 of the trainers broadcasts buckets to the GPUs of all engines. For cards of their own.

Both ends are adapters to vLLM's engine of the same name, which is imported only where weights are sent or received.
NCCL waits for ever for a peer that has died, so nothing here waits for NCCL itself: the broadcast and the question to
the engines run side by side in threads that nobody joins, and what takes too long is aborted.
"""

import functools
import logging
import socket
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

import torch
from torch import Tensor

from dpo_ray.sync.base import Checksum, EngineGroup, Sender, bytes_of, check_received, in_buckets

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""How much longer the broadcast is waited for than the engines' answers, which time out with better words."""


class NCCLSync(Sender):
    """The sending end: see ``WeightSync``.

    Args:
        bucket_mib: size of a broadcast; rank 0 and each GPU of an engine hold one.
        dtype: torch dtype that weights travel in.
    """

    worker_extension = f"{__name__}.NCCLWorker"
    replays = False

    def __init__(self, bucket_mib: int = 512, dtype: str = "bfloat16") -> None:
        super().__init__()
        self._bucket_bytes = bytes_of(bucket_mib)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._link: Communicator | None = None
        self._members: list[Hashable] = []

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> str:
        """Send all weights and put them to use as ``version``; see ``WeightSync.push``.

        Raises:
            TimeoutError: an engine did not take part in a broadcast in time.
        """
        self.require_connected()
        if self.engines is None:
            for _ in weights:  # a collective that rank 0 takes part in
                pass
            return ""
        try:
            return self._push(self.engines, weights, version)
        except BaseException:
            self._leave()  # an interrupted broadcast leaves no group behind that could be used again
            raise

    def close(self) -> None:
        """Leave the group and let go of the engines."""
        self._leave()
        super().close()

    def _push(self, engines: EngineGroup, weights: Iterable[tuple[str, Tensor]], version: int) -> str:
        members = list(engines.start_update())
        if self._link is None or members != self._members:
            self._leave()
            self._link, self._members = init_group(engines, len(members), self._bucket_bytes), members
        link, sent = self._link, Checksum()
        wired = ((name, link.on_wire(weight, self._dtype)) for name, weight in weights)
        for bucket in in_buckets(wired, lambda item: item[1].nbytes, self._bucket_bytes):
            message = message_of(bucket)
            run_concurrently(
                lambda message=message: engines.load(message),
                lambda bucket=bucket: link.broadcast(bucket),
                timeout_s=engines.timeout_s + GRACE_S,
                doing=f"broadcasting {len(bucket)} tensors of version {version} to {len(members)} engines",
            )
            for name, tensor in bucket:
                sent.update(name, tensor)
        return check_received(engines.finish_update(version), sent.hexdigest(), version)

    def _leave(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link, self._members = None, []


class Communicator:
    """The sender's place in the NCCL group, as rank 0.

    Args:
        group: vLLM's ``PyNcclCommunicator``.
    """

    def __init__(self, group: Any, bucket_bytes: int) -> None:
        self._group, self._bucket_bytes = group, bucket_bytes

    def on_wire(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor as it is sent, on the GPU."""
        wired = tensor.detach().to(self._group.device, dtype if tensor.is_floating_point() else tensor.dtype)
        return wired.contiguous()

    def broadcast(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Send a bucket in one broadcast and wait until it is out. May be called from any thread."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        with torch.accelerator.device_index(self._group.device.index):  # a thread begins on device 0
            torch.accelerator.synchronize()  # vLLM sends on streams of its own, which do not wait for the gather
            packed_nccl_broadcast_producer(
                iter(bucket),
                self._group,
                src=0,
                post_iter_func=lambda item: item[1],
                # A tensor that is larger than the limit travels alone, at either end.
                buffer_size_bytes=max(self._bucket_bytes, sum(tensor.nbytes for _, tensor in bucket)),
                num_buffers=1,
            )

    def close(self) -> None:
        """Leave the group; aborts a broadcast that still waits."""
        self._group.destroy()


def message_of(bucket: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """What the engines are told of a bucket: the fields of vLLM's ``NCCLWeightTransferUpdateInfo``."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def init_infos(host: str, port: int, engines: int, workers_per_engine: int, bucket_bytes: int) -> list[dict[str, Any]]:
    """What each engine is told before the first broadcast: the fields of vLLM's ``NCCLWeightTransferInitInfo``.

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
        TimeoutError: not all came.
    """
    port = free_port()
    infos = init_infos(engines.host, port, count, engines.workers_per_engine, bucket_bytes)
    world = infos[0]["world_size"]
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else 0
    _, link = run_concurrently(
        lambda: engines.init_transfer(infos),
        lambda: open_communicator(engines.host, port, world, device, bucket_bytes),
        timeout_s=engines.timeout_s + GRACE_S,
        doing=f"building an NCCL group of {world} at {engines.host}:{port} with {count} engines",
    )
    logger.info("NCCL group of %d: this process and %d engines of %d", world, count, engines.workers_per_engine)
    return link


def open_communicator(host: str, port: int, world: int, device: int, bucket_bytes: int) -> Communicator:
    """Join the group as rank 0; returns when all have joined."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    with torch.accelerator.device_index(device):
        group = trainer_init({"master_address": host, "master_port": port, "world_size": world})
    validate_nccl(group)
    return Communicator(group, bucket_bytes)


def validate_nccl(group: Any) -> None:
    """Raise a RuntimeError for a communicator that would send nothing without a word, for want of the library."""
    if not group.available or group.disabled:
        raise RuntimeError("vLLM found no NCCL library to send weights with; set online.sync.use: object_store")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def run_concurrently(
    ask: Callable[[], Any], act: Callable[[], Any], *, timeout_s: float, doing: str
) -> tuple[Any, Any]:
    """Both results of two calls that need each other. The first failure ends the waiting for the other.

    Raises:
        TimeoutError: they did not both return in time; names ``doing``.
    """
    calls = [_in_thread(ask), _in_thread(act)]
    done, waiting = wait(calls, timeout=timeout_s, return_when=FIRST_EXCEPTION)
    for call in done:
        call.result()
    if waiting:
        raise TimeoutError(f"{doing} did not end in {timeout_s:g} s (online.sync_timeout_s)")
    return calls[0].result(), calls[1].result()


def _in_thread(call: Callable[[], Any]) -> Future[Any]:
    # Not an executor: Python joins its threads at exit, and one that waits for NCCL would keep the process for ever.
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


@functools.cache
def _receiving_end() -> type:
    """Define the classes that run in vLLM's workers, and register the receiver with vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    from dpo_ray.sync.receiving import DigestMixin, DigestOfWorker

    class NCCLReceiver(DigestMixin, NCCLWeightTransferEngine):
        """vLLM's receiver, which notes what it loads and leaves the group of a trainer that has gone."""

        def init_transfer_engine(self, init_info: Any) -> None:
            self.shutdown()
            super().init_transfer_engine(init_info)
            validate_nccl(self.model_update_group)

    class NCCLWorker(DigestOfWorker):
        """Mixed into vLLM's worker."""

    WeightTransferEngineFactory.register_engine(NCCLSync.worker_extension, NCCLReceiver)
    return NCCLWorker


def __getattr__(name: str) -> Any:
    # vLLM's classes exist only where vLLM is: a configuration that names this transport is read without it.
    if name == "NCCLWorker":
        return _receiving_end()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
