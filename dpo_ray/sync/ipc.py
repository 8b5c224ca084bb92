"""Weights over CUDA IPC: engines read them where the trainer has them, on the card that both share.

Both ends are adapters to vLLM's engine of the same name, which is imported only where weights are sent or received.
Every training rank packs the same buckets on its own GPU and exports a handle to them; rank 0 sends all handles, by
the UUIDs of the GPUs, and each worker of an engine opens the one of its own. No byte leaves the card.
"""

import functools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.sync.base import Checksum, Sender, bytes_of, check_received, in_buckets


class IPCSync(Sender):
    """The sending end: see ``WeightSync``.

    Args:
        bucket_mib: size of a bucket; each card holds up to two of them during a push.
        dtype: torch dtype that weights travel in.
    """

    worker_extension = f"{__name__}.IPCWorker"
    replays = False

    def __init__(self, bucket_mib: int = 256, dtype: str = "bfloat16") -> None:
        super().__init__()
        self._bucket_bytes = bytes_of(bucket_mib)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._members: list[Hashable] = []

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> str:
        """Send all weights and put them to use as ``version``; see ``WeightSync.push``."""
        self.require_connected()
        free_cuda_cache()  # the waking engines need it
        dist.barrier()
        engines, sent = self.engines, Checksum()
        if engines is not None:
            members = list(engines.start_update())
            if members != self._members:
                engines.init_transfer([{"packed": True}] * len(members))
                self._members = members
        wired = ((name, on_wire(weight, self._dtype)) for name, weight in weights)
        for bucket in in_buckets(wired, lambda item: item[1].nbytes, self._bucket_bytes):
            for chunk in export(bucket):  # one: the buffer is as large as the bucket, and freed when the loop leaves
                handles = merged_handles(_gathered(chunk.ipc_handle))
                if engines is not None:
                    engines.load(message_of(chunk, handles))
                    for name, tensor in bucket:
                        sent.update(name, tensor)
                dist.barrier()  # until the engines have read, every rank leaves its buffer as it is
        free_cuda_cache()
        dist.barrier()  # with all buffers freed, the engines take their caches
        if engines is None:
            return ""
        return check_received(engines.finish_update(version), sent.hexdigest(), version)

    def close(self) -> None:
        """Let go of the engines."""
        self._members = []
        super().close()


def free_cuda_cache() -> None:
    """Give memory that this process's GPU holds for nothing back to whoever shares the card."""
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()


def on_wire(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as it is sent, on this process's GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    return tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def export(bucket: Sequence[tuple[str, Tensor]]) -> Iterator[Any]:
    """vLLM's ``PackedIpcChunk`` of a bucket: the tensors in one buffer of this process's GPU, and the handle to it.

    The buffer lives until the iterator is asked for more.
    """
    from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

    return packed_ipc_producer(
        iter(bucket),
        gpu_uuid=str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid),
        post_iter_func=lambda item: item[1],
        buffer_size_bytes=sum(tensor.nbytes for _, tensor in bucket),
    )


def message_of(chunk: Any, handles: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What the engines are told of a bucket: the fields of vLLM's ``IPCWeightTransferUpdateInfo``."""
    return {
        "names": chunk.names,
        "dtype_names": chunk.dtype_names,
        "shapes": chunk.shapes,
        "tensor_sizes": chunk.tensor_sizes,
        "ipc_handles": handles,
    }


def merged_handles(of_ranks: Sequence[dict[str, tuple[Any, ...]]]) -> dict[str, tuple[Any, ...]]:
    """The handles of all ranks by the UUID of their GPU.

    Raises:
        ValueError: two ranks are on one GPU.
    """
    merged: dict[str, tuple[Any, ...]] = {}
    for handles in of_ranks:
        if both := merged.keys() & handles.keys():
            raise ValueError(f"two training workers are on GPU {min(both)}; each needs one of its own")
        merged |= handles
    return merged


def _gathered(handles: dict[str, tuple[Any, ...]]) -> list[dict[str, tuple[Any, ...]]]:
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, handles)
    return of_ranks


@functools.cache
def _receiving_end() -> type:
    """Define the classes that run in vLLM's workers, and register the receiver with vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    from dpo_ray.sync.receiving import DigestMixin, DigestOfWorker

    class IPCReceiver(DigestMixin, IPCWeightTransferEngine):
        """vLLM's receiver, which notes what it loads."""

    class IPCWorker(DigestOfWorker):
        """Mixed into vLLM's worker."""

    WeightTransferEngineFactory.register_engine(IPCSync.worker_extension, IPCReceiver)
    return IPCWorker


def __getattr__(name: str) -> Any:
    # vLLM's classes exist only where vLLM is: a configuration that names this transport is read without it.
    if name == "IPCWorker":
        return _receiving_end()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
