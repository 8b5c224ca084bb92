"""Buckets, digests and the sender, against an engine group that only remembers."""

import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_ray.plugins import build
from dpo_ray.sync import TRANSPORTS
from dpo_ray.sync.base import Bucket, Digest, SyncMismatch, WireTensor
from dpo_ray.sync.object_store import ObjectStoreSync, pack


class Memory:
    """Engines that keep what they receive; the second may lose a bit on the way."""

    def __init__(self, *, damaged: bool = False) -> None:
        self.damaged = damaged
        self.calls: list[str] = []
        self.weights: dict[str, Tensor] = {}

    def start_update(self) -> None:
        self.calls.append("start")
        self.digests = [Digest(), Digest()]

    def load(self, bucket: Bucket) -> None:
        self.calls.append("load")
        for index, digest in enumerate(self.digests):
            received = pickle.loads(pickle.dumps(bucket))
            if self.damaged and index == 1:
                received.tensors[0].array.flat[0] += 1
            digest.update(received)
        self.weights |= {tensor.name: tensor.tensor() for tensor in received.tensors}

    def finish_update(self, version: int) -> list[str]:
        self.calls.append(f"finish {version}")
        return [digest.hexdigest() for digest in self.digests]

    def token_logps(self, token_ids: Sequence[int]) -> list[list[float]]:
        raise NotImplementedError


def some_weights(*, sizes: Sequence[int] = (10, 20, 30)) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"layers.{i}.weight", torch.randn(size, generator=generator)) for i, size in enumerate(sizes)]


def names(buckets: Iterator[Bucket]) -> list[list[str]]:
    return [[tensor.name.removeprefix("layers.").removesuffix(".weight") for tensor in b.tensors] for b in buckets]


def test_buckets_hold_whole_tensors_in_order_up_to_their_size():
    weights = some_weights(sizes=(10, 20, 30, 5, 5))  # 20, 40, 60, 10 and 10 bytes in bfloat16
    assert names(pack(weights, dtype=torch.bfloat16, bucket_bytes=60)) == [["0", "1"], ["2"], ["3", "4"]]


def test_a_tensor_larger_than_a_bucket_travels_alone():
    weights = some_weights(sizes=(1, 100, 1))
    assert names(pack(weights, dtype=torch.bfloat16, bucket_bytes=60)) == [["0"], ["1"], ["2"]]


def test_packing_gathers_no_further_than_the_next_bucket_needs():
    gathered = []

    def gather() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in some_weights(sizes=(30, 30, 30)):
            gathered.append(name)
            yield name, tensor

    next(pack(gather(), dtype=torch.bfloat16, bucket_bytes=60))
    assert len(gathered) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tensor_comes_back_from_the_wire_bit_for_bit(dtype: torch.dtype):
    tensor = torch.randn(3, 4).to(dtype).T  # not contiguous
    wire = pickle.loads(pickle.dumps(WireTensor.of("w", tensor, dtype)))
    assert wire.array.shape == (4, 3)
    assert wire.tensor().dtype == dtype
    assert torch.equal(wire.tensor(), tensor)


def test_integers_keep_their_dtype_on_the_wire():
    assert WireTensor.of("steps", torch.tensor(7), torch.bfloat16).tensor().dtype == torch.int64


def test_read_only_memory_becomes_a_tensor_without_a_warning(recwarn: pytest.WarningsRecorder):
    array = np.arange(4, dtype=np.float32)
    array.flags.writeable = False
    assert WireTensor("w", "float32", array).tensor().tolist() == [0, 1, 2, 3]
    assert not recwarn.list


def digest_of(*weights: tuple[str, Tensor], bucket_bytes: int = 1000) -> str:
    digest = Digest()
    for bucket in pack(weights, dtype=torch.bfloat16, bucket_bytes=bucket_bytes):
        digest.update(bucket)
    return digest.hexdigest()


def test_digest_does_not_depend_on_the_buckets():
    weights = some_weights()
    assert digest_of(*weights, bucket_bytes=1) == digest_of(*weights, bucket_bytes=1000)


def test_digest_changes_with_name_value_shape_and_order():
    a, b = torch.ones(2, 2), torch.zeros(2, 2)
    digests = {
        digest_of(("a", a), ("b", b)),
        digest_of(("a", a), ("c", b)),
        digest_of(("a", a), ("b", a)),
        digest_of(("a", a), ("b", b.reshape(4))),
        digest_of(("b", b), ("a", a)),
    }
    assert len(digests) == 5


def test_push_delivers_every_weight_in_the_wire_dtype():
    engines, sync = Memory(), ObjectStoreSync()
    sync.connect(engines)
    digest = sync.push(some_weights(), version=3)
    assert engines.calls == ["start", "load", "finish 3"]
    assert digest == digest_of(*some_weights())
    for name, tensor in some_weights():
        assert torch.equal(engines.weights[name], tensor.bfloat16())


def test_push_raises_where_an_engine_received_other_bytes():
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


def test_push_before_connect_is_refused():
    with pytest.raises(RuntimeError, match="before connect"):
        ObjectStoreSync().push(some_weights(), version=1)


def test_the_transport_is_built_by_name_with_the_wire_dtype_the_run_supplies():
    sync = build("object_store", {"bucket_mib": 1}, TRANSPORTS, "transport", dtype="float32")
    engines = Memory()
    sync.connect(engines)
    sync.push(some_weights(), version=0)
    assert {tensor.dtype for tensor in engines.weights.values()} == {torch.float32}


def test_the_sender_does_not_import_vllm():
    code = "import sys, dpo_ray.sync; sys.exit('vllm' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
