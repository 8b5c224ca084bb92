"""Buckets, digests, and the object store's sender with an engine group that keeps what it receives."""

import pickle
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_ray.plugins import build
from dpo_ray.sync import TRANSPORTS, tensors
from dpo_ray.sync.base import EngineGroup
from dpo_ray.sync.object_store import ObjectStoreSync
from dpo_ray.sync.tensors import Digest, NamedTensor, WireTensor, to_buckets
from dpo_ray.types import Probe

PROBE = Probe((1, 2, 3), (-1.0, -2.0), 0.1)


class Memory(EngineGroup):
    """Engines that keep what they receive."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: dict[str, Tensor] = {}

    def begin_update(self, version: int, *, collective: bool) -> list[str]:
        assert not collective
        self.calls.append(f"begin {version}")
        self.received = Digest()
        return []

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        raise NotImplementedError

    def load(self, message: list[WireTensor]) -> None:
        self.calls.append("load")
        tensors = [(tensor.name, tensor.to_tensor()) for tensor in pickle.loads(pickle.dumps(message))]
        self.received.update(tensors)
        self.weights |= dict(tensors)

    def end_update(self, digest: str, probe: Probe) -> None:
        assert digest == self.received.hexdigest()
        assert probe is PROBE
        self.calls.append("end")


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


@pytest.mark.parametrize("checksum", [tensors._hash_bytes, tensors._weighted_sum], ids=["on CPUs", "on GPUs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_two_swapped_elements_and_any_changed_bit_change_the_digest(dtype: torch.dtype, checksum: Any):
    integer = tensors.INTEGERS[dtype.itemsize]
    elements = torch.randperm(320, generator=torch.Generator().manual_seed(1)).to(integer)  # all different
    original = int(checksum(elements.view(dtype).view(4, 80)))
    for i in range(0, 320, 7):
        for distance in (1, 31, 32, 33, 80, 256):  # also where a weighting by row and column could cancel
            swapped, j = elements.clone(), (i + distance) % 320
            swapped[[i, j]] = swapped[[j, i]]
            assert int(checksum(swapped.view(dtype).view(4, 80))) != original
        flipped = elements.clone()
        flipped[i] ^= 1 << (i % (8 * dtype.itemsize - 1))
        assert int(checksum(flipped.view(dtype).view(4, 80))) != original


def test_the_digest_takes_scalars_empty_tensors_and_integers():
    tensors = [torch.tensor(3.0), torch.zeros(0, 4), torch.arange(3), torch.tensor([True, False])]
    assert len({exact_digest(("w", tensor)) for tensor in tensors}) == 4


def test_the_weighted_sum_is_the_stated_one_and_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch):
    integers = torch.tensor([[1, -2], [3, 2**31 - 1], [5, 6]], dtype=torch.int32)
    expected = sum(position * value for position, value in enumerate(integers.flatten().tolist(), start=1))
    assert tensors._weighted_sum(integers).item() == expected
    monkeypatch.setattr(tensors, "DIGEST_BLOCK", 2)
    assert tensors._weighted_sum(integers).item() == expected


# ------------------------------------------------------------------------------------------------------------ publishes


def connected(engines: EngineGroup, **arguments: Any) -> ObjectStoreSync:
    sync = ObjectStoreSync(**arguments)
    sync._bucket_bytes = 60  # 20, 40 and 60 bytes in bfloat16
    sync.connect(engines)
    return sync


def test_publish_delivers_every_weight_in_the_dtype_of_the_transfer():
    engines = Memory()
    connected(engines).publish(some_weights(), version=3, probe=PROBE)
    assert engines.calls == ["begin 3", "load", "load", "end"]
    for name, tensor in some_weights():
        assert torch.equal(engines.weights[name], tensor.bfloat16())


def test_a_bucket_is_sent_while_the_next_one_is_gathered():
    gathering, met = threading.Event(), []

    class Slow(Memory):
        def load(self, message: list[WireTensor]) -> None:
            met.append(gathering.wait(5))
            super().load(message)

    def gather() -> Iterator[NamedTensor]:
        yield from some_weights(sizes=(30, 30))  # the second tensor completes the first bucket
        gathering.set()
        yield from some_weights(sizes=(30,))

    connected(Slow()).publish(gather(), version=0, probe=PROBE)
    assert met == [True, True, True]


def test_all_weights_are_gathered_also_if_sending_fails():
    class Failing(Memory):
        def load(self, message: list[WireTensor]) -> None:
            raise OSError("the object store is full")

    weights = iter(some_weights(sizes=(30, 30, 30, 30)))
    with pytest.raises(OSError, match="full"):
        connected(Failing()).publish(weights, version=1, probe=PROBE)
    assert next(weights, None) is None, "other ranks take part in each gather"


def test_a_rank_without_engines_exhausts_the_weights():
    for background in (False, True):
        weights = iter(some_weights())
        sync = ObjectStoreSync(background=background)
        sync.connect(None)
        sync.publish(weights, version=1, probe=PROBE)
        sync.wait()
        assert next(weights, None) is None


def test_publish_before_connect_is_rejected():
    with pytest.raises(RuntimeError, match="before connect"):
        ObjectStoreSync().publish(some_weights(), version=1, probe=PROBE)


def test_the_transport_is_built_by_name_with_the_dtype_of_the_run():
    sync = build("object_store", {"bucket_mib": 1}, TRANSPORTS, "transport", dtype="float32")
    engines = Memory()
    sync.connect(engines)
    sync.publish(some_weights(), version=0, probe=PROBE)
    assert {tensor.dtype for tensor in engines.weights.values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- in background


class Gated(Memory):
    """Engines that take each message after ``gate`` opens; an ``error`` is raised instead."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.error: Exception | None = None

    def load(self, message: list[WireTensor]) -> None:
        assert self.gate.wait(5)
        if self.error:
            raise self.error
        super().load(message)


def test_publish_in_the_background_sends_the_weights_that_it_was_given_although_they_change_meanwhile():
    engines = Gated()
    sync, weights = connected(engines, background=True), some_weights()
    sync.publish(weights, version=3, probe=PROBE)
    for _, tensor in weights:
        tensor.zero_()
    assert "load" not in engines.calls
    engines.gate.set()
    sync.wait()
    assert engines.calls == ["begin 3", "load", "load", "end"]
    for name, tensor in some_weights():
        assert torch.equal(engines.weights[name], tensor.bfloat16())


def test_the_next_publish_waits_for_the_last_one_and_reuses_its_memory():
    engines = Gated()
    sync = connected(engines, background=True)
    sync.publish(some_weights(), version=3, probe=PROBE)
    assert sync._staging is not None
    memory = {name: copy.data_ptr() for name, copy in sync._staging._copies.items()}
    opening = threading.Timer(0.2, engines.gate.set)
    opening.start()
    sync.publish([(name, -tensor) for name, tensor in some_weights()], version=4, probe=PROBE)
    assert engines.calls[:4] == ["begin 3", "load", "load", "end"]
    sync.wait()
    assert engines.calls[4:] == ["begin 4", "load", "load", "end"]
    for name, tensor in some_weights():
        assert torch.equal(engines.weights[name], -tensor.bfloat16())
    assert {name: copy.data_ptr() for name, copy in sync._staging._copies.items()} == memory


def test_an_error_in_the_background_is_raised_once_by_the_next_publish_or_wait():
    engines = Gated()
    engines.error = TimeoutError("no answer")
    engines.gate.set()
    sync = connected(engines, background=True)
    for then in (lambda: sync.publish(some_weights(), version=4, probe=PROBE), sync.wait):
        sync.publish(some_weights(), version=3, probe=PROBE)
        with pytest.raises(TimeoutError, match="no answer"):
            then()
        sync.wait()


def test_the_sender_does_not_import_vllm():
    code = "import sys, dpo_ray.sync; sys.exit('vllm' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
