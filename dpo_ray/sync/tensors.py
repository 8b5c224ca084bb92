"""Tensors on their way: whole parameters with names, grouped into buckets, as messages, and their digest."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

NamedTensor = tuple[str, Tensor]
"""A whole parameter under its name in the model's checkpoint."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by size of an element, in bytes."""
DIGEST_BLOCK = 2**22
"""Elements per step of a weighted sum, at 24 bytes of memory each."""


class Digest:
    """Running digest of tensors: names, dtypes, shapes, values and order, but not the split into buckets.

    It is computed on each tensor's device, so both ends of a transfer must be on the same kind: on CPUs from the bytes
    (XXH3, 13 GB/s), on GPUs from a sum modulo 2**64 of all elements, read as integers and multiplied by their
    positions. A changed element and two swapped ones always change the sum. It detects faults, not forgery.
    """

    def __init__(self) -> None:
        self._headers = hashlib.sha256()
        self._sums: list[Tensor | int] = []

    def update(self, tensors: Iterable[NamedTensor]) -> None:
        for name, tensor in tensors:
            self._headers.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            self._sums.append(_hash_bytes(tensor) if tensor.device.type == "cpu" else _weighted_sum(tensor))

    def hexdigest(self) -> str:
        """Digest of all tensors so far, 64 hexadecimal digits; waits for their devices."""
        sums = [int(value) for value in self._sums]
        return hashlib.sha256(f"{self._headers.hexdigest()} {sums}".encode()).hexdigest()


def _hash_bytes(tensor: Tensor) -> int:
    return xxhash.xxh3_128_intdigest(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def _weighted_sum(tensor: Tensor) -> Tensor:
    integers = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(integers), DIGEST_BLOCK):
        block = integers[start : start + DIGEST_BLOCK].to(torch.int64)
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
