"""Weights over CUDA IPC: engines read them from the trainer's memory, on the GPU that both share.

Sender and receiver adapt vLLM's IPC weight-transfer engine, which is imported on first use. Every training rank packs
the same buckets on its own GPU and exports a handle to each; rank 0 sends all handles, keyed by GPU UUID, and each
engine worker opens the handle of its own GPU. No weights leave the GPU.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dpo_ray.parallel.collectives import broadcast_or_raise, gather_values
from dpo_ray.sync.base import EngineGroup, Sender
from dpo_ray.sync.tensors import Digest, NamedTensor
from dpo_ray.threads import in_thread
from dpo_ray.types import Probe

Handles = dict[str, tuple[Any, ...]]
"""CUDA IPC handles of one packed buffer by GPU UUID."""


class IPCSync(Sender):
    """The sender; see ``WeightSync``.

    Args:
        bucket_mib: largest size of a bucket; each GPU holds up to three of them during a publish.
        dtype: torch dtype of the transfer.
    """

    worker_extension = f"{__name__}.IPCWorker"
    collective = True
    every_rank = True

    def __init__(self, bucket_mib: int = 256, dtype: str = "bfloat16") -> None:
        super().__init__(bucket_mib, dtype)

    def _begin_update(self, version: int) -> bool:
        free_cuda_cache()  # for the engines, which wake up on the same GPUs
        dist.barrier()
        return super()._begin_update(version)

    def _send_all(self, weights: Iterable[NamedTensor], version: int, probe: Probe) -> None:
        engines, sent = self.engines, Digest()
        buckets = self._buckets(weights, current_device())
        bucket = next(buckets, None)
        while bucket is not None:
            for chunk in export(bucket):  # yields once; the buffer is as large as the bucket and freed afterwards
                handles = merge_handles(gather_values(chunk.ipc_handle))
                load = None if engines is None else in_thread(partial(engines.load, update_info(chunk, handles)))
                sent.update(bucket)
                bucket = next(buckets, None)
                # No rank reuses its buffer before the engines have read it.
                broadcast_or_raise(lambda load=load: None if load is None else load.result())
        free_cuda_cache()
        dist.barrier()  # all buffers are freed before the engines allocate their key-value caches
        if engines is not None:
            engines.end_update(sent.hexdigest(), probe)

    def _init_transfer(self, engines: EngineGroup, count: int) -> None:
        engines.init_transfer([{"packed": True}] * count)


def free_cuda_cache() -> None:
    """Return this process's unused GPU memory to the GPU, for the other processes on it."""
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()


def current_device() -> torch.device:
    """This process's GPU."""
    return torch.device("cuda", torch.cuda.current_device())


def export(bucket: Sequence[NamedTensor]) -> Iterator[Any]:
    """Yield vLLM's ``PackedIpcChunk`` of a bucket: its tensors in one buffer on this process's GPU, and its handle.

    The buffer lives until the iterator is advanced.
    """
    from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

    return packed_ipc_producer(
        iter(bucket),
        gpu_uuid=str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid),
        post_iter_func=lambda item: item[1],
        buffer_size_bytes=sum(tensor.nbytes for _, tensor in bucket),
    )


def update_info(chunk: Any, handles: Handles) -> dict[str, Any]:
    """Fields of vLLM's ``IPCWeightTransferUpdateInfo`` for a bucket."""
    return {
        "names": chunk.names,
        "dtype_names": chunk.dtype_names,
        "shapes": chunk.shapes,
        "tensor_sizes": chunk.tensor_sizes,
        "ipc_handles": handles,
    }


def merge_handles(per_rank: Sequence[Handles]) -> Handles:
    """Merge the handles of all ranks.

    Raises:
        ValueError: two ranks are on one GPU.
    """
    merged: Handles = {}
    for handles in per_rank:
        if shared := merged.keys() & handles.keys():
            raise ValueError(f"two training workers are on GPU {min(shared)}; each needs one of its own")
        merged |= handles
    return merged


@functools.cache
def __getattr__(name: str) -> Any:
    """``IPCWorker``, the class to mix into vLLM's workers; its first use registers the receiver with vLLM."""
    if name != "IPCWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    from dpo_ray.sync.receiver import DigestMixin, DigestWorker

    class IPCReceiver(DigestMixin, IPCWeightTransferEngine):
        """vLLM's receiver with a digest."""

    WeightTransferEngineFactory.register_engine(IPCSync.worker_extension, IPCReceiver)
    return DigestWorker
