"""Transports between GPUs, without the GPUs: messages, order of calls, and waits that end."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_ray.sync import ipc, nccl
from dpo_ray.sync.base import EngineGroup
from dpo_ray.sync.receiver import DigestMixin, RecordingModel
from dpo_ray.sync.tensors import Digest
from dpo_ray.types import EngineLost, Probe

SIZES = (10, 20, 30, 5, 5)


def weights() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"layers.{i}.weight", torch.randn(size, generator=generator)) for i, size in enumerate(SIZES)]


def digest_of(tensors: Sequence[tuple[str, Tensor]]) -> str:
    digest = Digest()
    digest.update(tensors)
    return digest.hexdigest()


PROBE = Probe((1, 2, 3), (-1.0, -2.0), 0.1)
SENT = [(name, tensor.bfloat16()) for name, tensor in weights()]


class Engines(EngineGroup):
    """Two engines of two workers each that take part in broadcasts, fail, or hang."""

    host, workers_per_engine = "10.0.0.7", 2

    def __init__(self, timeout_s: float = 20.0) -> None:
        self.timeout_s = timeout_s
        self.calls: list[Any] = []
        self.identities = ["first", "second"]
        self.in_transit: list[Any] = []
        self.sent, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.hanging = threading.Event()
        self.lose: list[str] = []
        """Engines that die at the next messages, last first."""
        self.received: list[tuple[str, Tensor]] = []

    def begin_update(self, version: int, *, collective: bool) -> list[str]:
        assert collective
        self.calls.append(f"begin {version}")
        self.received = []
        return list(self.identities)

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        self.calls.append("init")
        self.infos = list(infos)

    def load(self, message: dict[str, Any]) -> None:
        self.calls.append([name.split(".")[1] for name in message["names"]])
        if self.error:
            raise self.error
        if self.lose:
            self.identities.remove(self.lose.pop())
            raise EngineLost("engine 1 died")
        if self.hanging.is_set():
            time.sleep(30)
        self.arrived.release()  # a broadcast needs both ends
        assert self.sent.acquire(timeout=5)
        tensors = self.in_transit.pop()
        assert message["names"] == [name for name, _ in tensors]
        assert message["shapes"] == [list(tensor.shape) for _, tensor in tensors]
        assert message["dtype_names"] == ["bfloat16"] * len(tensors)
        self.received += tensors

    def end_update(self, digest: str, probe: Probe) -> None:
        assert digest == digest_of(self.received)
        assert probe is PROBE
        self.calls.append("end")


@dataclass
class Communicator:
    """The sender's end of a group with ``Engines``."""

    engines: Engines
    closed: bool = False
    device = torch.device("cpu")

    def broadcast(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        while not self.engines.arrived.acquire(timeout=0.01):
            if self.closed:
                return
        if self.closed:  # aborted: leave the receivers to the next communicator
            self.engines.arrived.release()
            return
        self.engines.in_transit.append(list(bucket))
        self.engines.sent.release()

    def destroy(self) -> None:
        self.closed = True


@pytest.fixture
def sync(
    monkeypatch: pytest.MonkeyPatch, one_rank: None
) -> Iterator[tuple[nccl.NCCLSync, Engines, list[Communicator]]]:
    engines, communicators = Engines(), []

    def join_group(host: str, port: int, world_size: int, device: int) -> Communicator:
        assert (host, world_size) == ("10.0.0.7", 1 + 2 * len(engines.identities))
        communicators.append(Communicator(engines))
        return communicators[-1]

    monkeypatch.setattr(nccl, "join_group", join_group)
    monkeypatch.setattr(nccl, "broadcast", lambda bucket, group, bucket_bytes: group.broadcast(bucket))
    sync = nccl.NCCLSync()
    sync._bucket_bytes = 60  # 20, 40, 60, 10 and 10 bytes in bfloat16
    sync.connect(engines)
    yield sync, engines, communicators
    sync.close()


def test_workers_of_all_engines_follow_the_sender_in_one_group():
    infos = nccl.init_infos("10.0.0.7", 4000, engines=3, workers_per_engine=4, bucket_bytes=60)
    ranks = [info["rank_offset"] + worker for info in infos for worker in range(4)]
    assert ranks == list(range(1, 13)), "rank 0 is the sender; each worker adds its own rank to the offset"
    assert {info["world_size"] for info in infos} == {13}
    assert {(info["packed_buffer_size_bytes"], info["packed"]) for info in infos} == {(60, True)}


def test_a_publish_over_nccl_makes_one_call_per_bucket_and_builds_the_group_once(sync):
    sender, engines, communicators = sync
    sender.publish(weights(), version=3, probe=PROBE)
    assert engines.calls == ["begin 3", "init", ["0", "1"], ["2"], ["3", "4"], "end"]
    assert [info["rank_offset"] for info in engines.infos] == [1, 3]
    assert digest_of(engines.received) == digest_of(SENT)
    engines.calls.clear()
    sender.publish(weights(), version=4, probe=PROBE)
    assert engines.calls == ["begin 4", ["0", "1"], ["2"], ["3", "4"], "end"]
    assert len(communicators) == 1


def test_weights_are_sent_again_without_an_engine_that_is_lost(sync):
    sender, engines, communicators = sync
    engines.lose = ["second"]
    sender.publish(weights(), version=3, probe=PROBE)
    every_bucket = [["0", "1"], ["2"], ["3", "4"]]
    assert engines.calls == ["begin 3", "init", ["0", "1"], "begin 3", "init", *every_bucket, "end"]
    assert [info["world_size"] for info in engines.infos] == [3], "one engine of two workers"
    assert [communicator.closed for communicator in communicators] == [True, False]
    assert digest_of(engines.received) == digest_of(SENT)


def test_publish_returns_when_the_last_engine_is_lost_and_sends_nothing_to_none(sync):
    sender, engines, _ = sync
    engines.lose = ["first", "second"]
    sender.publish(weights(), version=3, probe=PROBE)
    assert engines.calls == ["begin 3", "init", ["0", "1"]] * 2 + ["begin 3"]


def test_three_lost_engines_end_the_publish(sync):
    sender, engines, _ = sync
    engines.identities = ["first", "second", "third", "fourth"]
    engines.lose = ["third", "second", "first"]
    with pytest.raises(EngineLost, match="engine 1 died"):
        sender.publish(weights(), version=3, probe=PROBE)
    assert engines.calls == ["begin 3", "init", ["0", "1"]] * 3


def test_in_the_background_weights_are_staged_once_and_sent_again_from_the_copy(sync):
    _, engines, communicators = sync
    sender = nccl.NCCLSync(background=True)
    sender._bucket_bytes = 60
    sender.connect(engines)
    engines.lose = ["second"]
    sender.publish(iter(weights()), version=3, probe=PROBE)
    sender.wait()
    assert engines.calls.count("begin 3") == 2
    assert digest_of(engines.received) == digest_of(SENT)
    assert len(communicators) == 2
    sender.close()


def test_the_group_is_built_again_when_an_engine_was_replaced(sync):
    sender, engines, communicators = sync
    sender.publish(weights(), version=0, probe=PROBE)
    engines.identities[1] = "its replacement"
    sender.publish(weights(), version=1, probe=PROBE)
    assert [communicator.closed for communicator in communicators] == [True, False]
    assert engines.calls.count("init") == 2


def test_an_engine_that_never_answers_ends_the_publish_in_time_and_the_group(sync, monkeypatch):
    sender, engines, communicators = sync
    monkeypatch.setattr(nccl, "GRACE_S", 0.0)
    sender.publish(weights(), version=0, probe=PROBE)
    engines.timeout_s = 0.3
    engines.hanging.set()
    began = time.monotonic()
    with pytest.raises(
        TimeoutError, match=r"broadcasting 2 tensors of version 1 to 2 engines did not end in 0\.3 s .*sync_timeout_s"
    ):
        sender.publish(weights(), version=1, probe=PROBE)
    assert time.monotonic() - began < 5
    assert communicators[0].closed, "a broadcast in progress is aborted"
    engines.hanging.clear()
    engines.timeout_s = 20
    sender.publish(weights(), version=2, probe=PROBE)
    assert len(communicators) == 2


def test_an_engine_that_fails_ends_the_publish_at_once_with_its_error(sync):
    sender, engines, communicators = sync
    engines.error = RuntimeError("engine 1 is dead")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="engine 1 is dead"):
        sender.publish(weights(), version=0, probe=PROBE)
    assert time.monotonic() - began < 5, "nobody waits for the broadcast"
    assert communicators[0].closed


@pytest.mark.parametrize("transport", [nccl.NCCLSync, ipc.IPCSync])
def test_a_bucket_size_of_zero_and_a_publish_before_connect_are_rejected(transport):
    with pytest.raises(ValueError, match=r"online\.sync\.args\.bucket_mib"):
        transport(bucket_mib=0)
    with pytest.raises(RuntimeError, match="before connect"):
        transport().publish(weights(), version=0, probe=PROBE)


def test_a_communicator_without_nccl_is_rejected():
    @dataclass
    class Group:
        available: bool = False
        disabled: bool = True

    with pytest.raises(RuntimeError, match="no NCCL library"):
        nccl.validate_nccl(Group())


# ------------------------------------------------------------------------------------------------------------------ IPC


def test_handles_of_all_ranks_are_merged_by_gpu_and_two_ranks_on_one_gpu_are_rejected():
    assert ipc.merge_handles([{"GPU-a": (1,)}, {"GPU-b": (2,)}]) == {"GPU-a": (1,), "GPU-b": (2,)}
    with pytest.raises(ValueError, match="two training workers are on GPU GPU-a"):
        ipc.merge_handles([{"GPU-a": (1,)}, {"GPU-a": (2,)}])


@dataclass
class Chunk:
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    tensor_sizes: list[int]
    ipc_handle: dict[str, tuple[Any, ...]]


class Card:
    """A rank's GPU: records exports and frees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory: dict[int, list[tuple[str, Tensor]]] = {}
        self.log: list[str] = []
        monkeypatch.setattr(ipc, "current_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(ipc, "free_cuda_cache", lambda: self.log.append("cache freed"))
        monkeypatch.setattr(ipc, "export", self.export)

    def export(self, bucket: Sequence[tuple[str, Tensor]]) -> Iterator[Chunk]:
        address = len(self.log)
        self.memory[address] = list(bucket)
        self.log.append("exported")
        names = [name for name, _ in bucket]
        shapes, sizes = [list(t.shape) for _, t in bucket], [t.nbytes for _, t in bucket]
        try:
            yield Chunk(names, ["bfloat16"] * len(names), shapes, sizes, {"GPU-a": (address,)})
        finally:
            del self.memory[address]
            self.log.append("freed")


def test_a_publish_over_ipc_frees_each_bucket_after_the_engines_have_read_it(monkeypatch, one_rank):
    card = Card(monkeypatch)

    class Readers(Engines):
        def load(self, message: dict[str, Any]) -> None:
            assert message["tensor_sizes"] == [2 * shape[0] for shape in message["shapes"]]
            if self.lose:
                self.identities.remove(self.lose.pop())
                raise EngineLost("engine 1 died")
            card.log.append("read")
            self.received.extend(card.memory[message["ipc_handles"]["GPU-a"][0]])

        def end_update(self, digest: str, probe: Probe) -> None:
            super().end_update(digest, probe)
            card.log.append("end")

    engines, sender = Readers(), ipc.IPCSync()
    sender._bucket_bytes = 60
    sender.connect(engines)
    sender.publish(weights(), version=7, probe=PROBE)
    bucket = ["exported", "read", "freed"]
    assert card.log == ["cache freed", *bucket, *bucket, *bucket, "cache freed", "end"]
    assert digest_of(engines.received) == digest_of(SENT)
    assert engines.infos == [{"packed": True}] * 2
    assert not card.memory
    sender.publish(weights(), version=8, probe=PROBE)
    assert engines.calls == ["begin 7", "init", "end", "begin 8", "end"], "an engine is initialized once"

    card.log.clear()
    engines.lose = ["second"]
    sender.publish(weights(), version=9, probe=PROBE)
    again = ["cache freed", "exported", "freed", "cache freed", *bucket, *bucket, *bucket, "cache freed", "end"]
    assert card.log == again
    assert digest_of(engines.received) == digest_of(SENT)
    assert not card.memory


def test_a_rank_without_engines_exports_its_buckets_too(monkeypatch, one_rank):
    card, sender = Card(monkeypatch), ipc.IPCSync()
    sender._bucket_bytes = 60
    sender.connect(None)
    sender.publish(weights(), version=1, probe=PROBE)
    assert card.log.count("exported") == card.log.count("freed") == 3


# ------------------------------------------------------------------------------------------------------------ receiver


class Model:
    def __init__(self) -> None:
        self.loaded: list[str] = []

    def named_parameters(self) -> list[tuple[str, None]]:
        return [("qkv", None), ("head", None)]

    def named_modules(self) -> list[tuple[str, Any]]:
        return []

    def load_weights(self, tensors: list[tuple[str, Tensor]]) -> set[str]:
        self.loaded += [name for name, _ in tensors]
        return {"qkv" if name in "qkv" else name for name, _ in tensors}


class VLLMTransferEngine:
    """The part of vLLM's WeightTransferEngine that the mixin uses."""

    def __init__(self) -> None:
        self.model, self.model_config, self.calls = Model(), "config", []
        self._default = self.model

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return update_dict["names"]

    def start_weight_update(self) -> None:
        assert isinstance(self.model, Model)
        self.calls.append("start")

    def finish_weight_update(self) -> None:
        assert isinstance(self.model, Model), "vLLM finishes on its own model"
        self.calls.append("finish")

    def set_weight_update_target(self, model: Any, model_config: Any) -> None:
        self.model = model

    def reset_weight_update_target(self) -> None:
        self.model = self._default


class Receiver(DigestMixin, VLLMTransferEngine):
    pass


def test_a_receiver_records_the_weights_that_vllm_loads_and_restores_the_model():
    receiver, tensors = Receiver(), [(name, torch.ones(2)) for name in ("q", "k", "v", "head")]
    assert receiver.parse_update_info({"bucket": {"names": ["q"]}}) == ["q"]
    receiver.start_weight_update()
    assert isinstance(receiver.model, RecordingModel)
    receiver.model.load_weights(iter(tensors[:2]))
    receiver.model.load_weights(iter(tensors[2:]))
    receiver.finish_weight_update()
    assert receiver.digest == digest_of(tensors)
    assert receiver.calls == ["start", "finish"]
    assert isinstance(receiver.model, Model)
    assert receiver.model.loaded == ["q", "k", "v", "head"]


def test_an_update_without_some_parameter_cannot_be_finished():
    receiver = Receiver()
    receiver.start_weight_update()
    receiver.model.load_weights([("q", torch.ones(2))])
    with pytest.raises(ValueError, match=r"left out 1 parameters .* first 'head'"):
        receiver.finish_weight_update()
    assert receiver.calls == ["start"]


def test_calls_that_wait_for_each_other_run_concurrently():
    with ThreadPoolExecutor(1):
        meeting = threading.Barrier(2, timeout=5)
        first, second = nccl.run_concurrently(meeting.wait, meeting.wait, timeout_s=10, action="meeting")
    assert {first, second} == {0, 1}
