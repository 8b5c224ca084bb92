"""Buckets, digests, and the object store's sender with an engine group that keeps what it receives."""

import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_ray.plugins import build
from dpo_ray.sync import TRANSPORTS, base
from dpo_ray.sync.base import Digest, EnginePool, NamedTensor, WireTensor, to_buckets
from dpo_ray.sync.object_store import ObjectStoreSync
from dpo_ray.types import SyncMismatch


class Memory(EnginePool):
    """Two engines that keep what they receive; with ``damaged``, the second receives a changed element."""

    def __init__(self, *, damaged: bool = False) -> None:
        self.damaged = damaged
        self.calls: list[str] = []
        self.weights: dict[str, Tensor] = {}

    def start_update(self) -> list[str]:
        self.calls.append("start")
        self.digests = [Digest(), Digest()]
        return ["first", "second"]

    def init_transfer(self, infos: Sequence[dict[str, Any]]) -> None:
        raise NotImplementedError

    def load(self, bucket: list[WireTensor]) -> None:
        self.calls.append("load")
        for index, digest in enumerate(self.digests):
            received = pickle.loads(pickle.dumps(bucket))
            if self.damaged and index == 1:
                received[0].array.flat[0] += 1
            tensors = [(tensor.name, tensor.to_tensor()) for tensor in received]
            digest.update(tensors)
        self.weights |= dict(tensors)

    def finish_update(self, version: int) -> list[str]:
        self.calls.append(f"finish {version}")
        return [digest.hexdigest() for digest in self.digests]

    def token_logps(self, token_ids: Sequence[int]) -> list[list[float]]:
        raise NotImplementedError


def some_weights(*, sizes: Sequence[int] = (10, 20, 30)) -> list[NamedTensor]:
    generator = torch.Generator().manual_seed(0)
    return [(f"layers.{i}.weight", torch.randn(size, generator=generator)) for i, size in enumerate(sizes)]


def buckets_of(weights: Iterable[NamedTensor], bucket_bytes: int) -> Iterator[list[NamedTensor]]:
    return to_buckets(weights, dtype=torch.bfloat16, device=torch.device("cpu"), bucket_bytes=bucket_bytes)


def names(buckets: Iterable[list[NamedTensor]]) -> list[list[str]]:
    return [[name.removeprefix("layers.").removesuffix(".weight") for name, _ in bucket] for bucket in buckets]


def test_buckets_hold_whole_tensors_in_order_up_to_their_size():
    weights = some_weights(sizes=(10, 20, 30, 5, 5))  # 20, 40, 60, 10 and 10 bytes in bfloat16
    assert names(buckets_of(weights, 60)) == [["0", "1"], ["2"], ["3", "4"]]
    assert names(buckets_of([], 60)) == []


def test_a_tensor_larger_than_a_bucket_travels_alone():
    assert names(buckets_of(some_weights(sizes=(1, 100, 1)), 60)) == [["0"], ["1"], ["2"]]


def test_bucketing_gathers_no_further_than_the_next_bucket_needs():
    gathered = []

    def gather() -> Iterator[NamedTensor]:
        for name, tensor in some_weights(sizes=(30, 30, 30)):
            gathered.append(name)
            yield name, tensor

    next(buckets_of(gather(), 60))
    assert len(gathered) == 2


def test_buckets_cast_floats_and_keep_the_dtype_of_integers():
    [bucket] = buckets_of([("w", torch.ones(2)), ("steps", torch.tensor(7))], 60)
    assert [tensor.dtype for _, tensor in bucket] == [torch.bfloat16, torch.int64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tensor_survives_the_transfer_bit_for_bit(dtype: torch.dtype):
    tensor = torch.randn(3, 4).to(dtype).T  # not contiguous
    [bucket] = to_buckets([("w", tensor)], dtype=dtype, device=torch.device("cpu"), bucket_bytes=1000)
    received = pickle.loads(pickle.dumps(WireTensor.from_tensor(*bucket[0])))
    assert received.array.shape == (4, 3)
    assert received.to_tensor().dtype == dtype
    assert torch.equal(received.to_tensor(), tensor)


def test_read_only_memory_becomes_a_tensor_without_a_warning(recwarn: pytest.WarningsRecorder):
    array = np.arange(4, dtype=np.float32)
    array.flags.writeable = False
    assert WireTensor("w", "float32", array).to_tensor().tolist() == [0, 1, 2, 3]
    assert not recwarn.list


# -------------------------------------------------------------------------------------------------------------- digests


def digest_of(*weights: NamedTensor, bucket_bytes: int = 1000) -> str:
    digest = Digest()
    for bucket in buckets_of(weights, bucket_bytes):
        digest.update(bucket)
    return digest.hexdigest()


def exact_digest(*weights: NamedTensor) -> str:
    digest = Digest()
    digest.update(weights)
    return digest.hexdigest()


def test_the_digest_does_not_depend_on_the_buckets():
    weights = some_weights()
    assert digest_of(*weights, bucket_bytes=1) == digest_of(*weights, bucket_bytes=1000)


def test_the_digest_changes_with_name_value_shape_dtype_order_and_a_missing_weight():
    a, b = torch.ones(2, 2), torch.zeros(2, 2)
    digests = {
        exact_digest(("a", a), ("b", b)),
        exact_digest(("a", a), ("c", b)),
        exact_digest(("a", a), ("b", a)),
        exact_digest(("a", b), ("b", a)),
        exact_digest(("a", a), ("b", b.reshape(4))),
        exact_digest(("a", a), ("b", b.bfloat16())),
        exact_digest(("b", b), ("a", a)),
        exact_digest(("a", a)),
        exact_digest(("b", b)),
        exact_digest(),
    }
    assert len(digests) == 10


def test_the_digest_changes_with_swapped_elements_rows_and_columns_and_not_with_the_layout_in_memory():
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    changed = tensor.clone()
    changed[2, 3] += 1
    variants = [tensor, changed, tensor[[1, 0, 2]], tensor[:, [0, 2, 1, 3]], tensor.reshape(4, 3)]
    assert len({exact_digest(("w", variant)) for variant in variants}) == 5
    assert exact_digest(("w", tensor.T.contiguous().T)) == exact_digest(("w", tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_two_swapped_elements_and_any_changed_bit_change_the_digest(dtype: torch.dtype):
    integer = base.INTEGERS[dtype.itemsize]
    elements = torch.randperm(320, generator=torch.Generator().manual_seed(1)).to(integer)  # all different
    original = exact_digest(("w", elements.view(dtype).view(4, 80)))
    for i in range(0, 320, 7):
        for distance in (1, 31, 32, 33, 80, 256):  # also where a weighting by row and column could cancel
            swapped, j = elements.clone(), (i + distance) % 320
            swapped[[i, j]] = swapped[[j, i]]
            assert exact_digest(("w", swapped.view(dtype).view(4, 80))) != original
        flipped = elements.clone()
        flipped[i] ^= 1 << (i % (8 * dtype.itemsize - 1))
        assert exact_digest(("w", flipped.view(dtype).view(4, 80))) != original


def test_the_digest_takes_scalars_empty_tensors_and_integers():
    tensors = [torch.tensor(3.0), torch.zeros(0, 4), torch.arange(3), torch.tensor([True, False])]
    assert len({exact_digest(("w", tensor)) for tensor in tensors}) == 4


def test_the_weighted_sum_is_the_stated_one_and_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch):
    integers = torch.tensor([[1, -2], [3, 2**31 - 1], [5, 6]], dtype=torch.int32)
    expected = sum(position * value for position, value in enumerate(integers.flatten().tolist(), start=1))
    assert base._weighted_sum(integers).item() == expected
    monkeypatch.setitem(base.DIGEST_BLOCK, "cpu", 2)
    assert base._weighted_sum(integers).item() == expected


# --------------------------------------------------------------------------------------------------------------- pushes


def test_push_delivers_every_weight_in_the_dtype_of_the_transfer():
    engines, sync = Memory(), ObjectStoreSync()
    sync.connect(engines)
    digest = sync.push(some_weights(), version=3)
    assert engines.calls == ["start", "load", "finish 3"]
    assert digest == digest_of(*some_weights())
    for name, tensor in some_weights():
        assert torch.equal(engines.weights[name], tensor.bfloat16())


def test_push_raises_if_an_engine_received_other_weights():
    sync = ObjectStoreSync()
    sync.connect(Memory(damaged=True))
    with pytest.raises(SyncMismatch, match="engine 1 received weights with digest"):
        sync.push(some_weights(), version=1)


def test_a_rank_without_engines_exhausts_the_weights():
    weights = iter(some_weights())
    sync = ObjectStoreSync()
    sync.connect(None)
    assert sync.push(weights, version=1) == ""
    assert next(weights, None) is None


def test_push_before_connect_is_rejected():
    with pytest.raises(RuntimeError, match="before connect"):
        ObjectStoreSync().push(some_weights(), version=1)


def test_the_transport_is_built_by_name_with_the_dtype_of_the_run():
    sync = build("object_store", {"bucket_mib": 1}, TRANSPORTS, "transport", dtype="float32")
    engines = Memory()
    sync.connect(engines)
    sync.push(some_weights(), version=0)
    assert {tensor.dtype for tensor in engines.weights.values()} == {torch.float32}


def test_the_sender_does_not_import_vllm():
    code = "import sys, dpo_ray.sync; sys.exit('vllm' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
