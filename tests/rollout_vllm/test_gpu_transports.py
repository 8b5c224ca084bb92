"""Transports between GPUs with vLLM's real classes and functions, as far as a CPU runs them."""

import asyncio
import inspect
import queue
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_ray.sync import ipc, nccl
from dpo_ray.sync.base import EngineGroup
from dpo_ray.sync.lora import LoraSync
from dpo_ray.sync.nccl import NCCLSync
from dpo_ray.types import Probe
from tests.rollout_vllm.test_weight_push import Policy, environment, policy_a, policy_b, start_engine

pytest.importorskip("vllm")

__all__ = ["environment", "policy_a", "policy_b"]  # fixtures

BUCKET = [("a", torch.zeros(2, 3, dtype=torch.bfloat16)), ("b", torch.zeros(4))]


def accepts(function: Any, *args: Any, **kwargs: Any) -> None:
    inspect.signature(function).bind(*args, **kwargs)


def test_nccl_messages_fit_the_records_of_vllm(environment: None):
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, trainer_init
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    first, second = (NCCLWeightTransferInitInfo(**info) for info in nccl.init_infos("10.0.0.7", 4000, 2, 2, 64))
    assert (first.rank_offset, second.rank_offset, first.world_size, first.packed) == (1, 3, 5, True)
    info = NCCLWeightTransferUpdateInfo(**nccl.update_info(BUCKET))
    assert (info.names, info.dtype_names, info.shapes) == (["a", "b"], ["bfloat16", "float32"], [[2, 3], [4]])
    accepts(trainer_init, {"master_address": "", "master_port": 0, "world_size": 2})
    accepts(
        packed_nccl_broadcast_producer,
        iter(BUCKET),
        None,
        src=0,
        post_iter_func=max,
        buffer_size_bytes=1,
        num_buffers=1,
    )


def test_a_bucket_is_one_broadcast_for_sender_and_receiver_also_when_its_tensor_is_larger_than_the_limit(
    environment: None, monkeypatch: pytest.MonkeyPatch
):
    """vLLM's producer and consumer without CUDA streams: the consumer receives exactly what the producer sends."""
    import contextlib

    from vllm.distributed.weight_transfer import packed_tensor

    class Stream:
        def synchronize(self) -> None: ...

    class Group:
        device = torch.device("cpu", 0)

        def __init__(self) -> None:
            self.sent: list[Tensor] = []

        def broadcast(self, tensor: Tensor, src: int) -> None:
            self.sent.append(tensor.clone())

    class Listening(Group):
        def broadcast(self, tensor: Tensor, src: int) -> None:
            tensor.copy_(in_transit.pop(0))

    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: (Stream(),) * count)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    for bucket in (BUCKET, [("large", torch.randn(50))]):
        group = Group()
        nccl.broadcast(bucket, group, 40)
        assert len(group.sent) == 1
        in_transit, info, loaded = group.sent, nccl.update_info(bucket), []
        dtypes = [getattr(torch, name) for name in info["dtype_names"]]
        packed_tensor.packed_nccl_broadcast_consumer(
            iter(zip(info["names"], zip(info["shapes"], dtypes, strict=True), strict=True)),
            Listening(),
            src=0,
            post_unpack_func=loaded.extend,
            buffer_size_bytes=40,
            num_buffers=1,
            device="cpu",
        )
        assert not in_transit
        assert [name for name, _ in loaded] == info["names"]
        assert all(torch.equal(got, sent) for (_, got), (_, sent) in zip(loaded, bucket, strict=True))


def test_ipc_messages_fit_the_records_of_vllm(environment: None):
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk, packed_ipc_producer

    assert IPCWeightTransferInitInfo(packed=True).packed
    chunk = PackedIpcChunk(["a"], [[2, 3]], ["bfloat16"], [12], {"GPU-x": (1, 2)})
    info = IPCWeightTransferUpdateInfo(**ipc.update_info(chunk, ipc.merge_handles([chunk.ipc_handle, {"GPU-y": (3,)}])))
    assert info.ipc_handles == {"GPU-x": (1, 2), "GPU-y": (3,)}
    assert info.tensor_sizes == [12]
    accepts(packed_ipc_producer, iter(BUCKET), gpu_uuid="", post_iter_func=max, buffer_size_bytes=1)


def test_all_receivers_are_registered_with_vllm(environment: None):
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.utils.import_utils import resolve_obj_by_qualname

    for transport in (NCCLSync, ipc.IPCSync, LoraSync):
        assert hasattr(resolve_obj_by_qualname(transport.worker_extension), "received_digest")
        receiver = WeightTransferEngineFactory._registry[transport.worker_extension]()
        assert issubclass(receiver, WeightTransferEngine)
        assert not receiver.__abstractmethods__


class Group:
    """A process group of NCCL whose ranks are in this process."""

    available, disabled, device = True, False, torch.device("cpu")

    def destroy(self) -> None: ...


def replace_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let buckets travel through a queue between trainer and engine of this process."""
    from vllm.distributed.weight_transfer import nccl_engine

    in_transit: queue.Queue[list[tuple[str, Tensor]]] = queue.Queue()

    def join(init_info: Any, parallel_config: Any) -> Group:
        assert (init_info.rank_offset, parallel_config.rank, init_info.world_size) == (1, 0, 2)
        return Group()

    def consumer(iterator: Iterator[Any], group: Any, post_unpack_func: Any, **geometry: Any) -> None:
        info, bucket = list(iterator), in_transit.get(timeout=10)
        assert [(name, list(shape)) for name, (shape, _) in info] == [(n, list(t.shape)) for n, t in bucket]
        post_unpack_func(bucket)

    monkeypatch.setattr(nccl_engine, "worker_init_process_group", join)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", consumer)
    monkeypatch.setattr(nccl, "join_group", lambda *where: Group())
    monkeypatch.setattr(nccl, "broadcast", lambda bucket, group, bucket_bytes: in_transit.put(list(bucket)))


def run(call: Awaitable[Any]) -> Any:
    """The result of a call of the engine."""

    async def answer() -> Any:
        return await call

    return asyncio.run(answer())


class OneEngine(EngineGroup):
    """An engine of this process."""

    host, workers_per_engine, timeout_s = "127.0.0.1", 1, 30.0

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def begin_update(self, version: int, *, collective: bool) -> list[str]:
        assert collective
        self.version = version
        run(self.engine.start_update())
        return ["engine"]

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        run(self.engine.init_transfer(infos[0]))

    def load(self, message: dict[str, Any]) -> None:
        run(self.engine.load(message))

    def end_update(self, digest: str, probe: Probe) -> None:
        assert run(self.engine.finish_update(self.version)) == digest
        run(self.engine.serve())


def test_a_publish_over_nccl_loads_a_real_engine_when_only_the_broadcast_is_replaced(
    policy_a: Policy, policy_b: Policy, environment: None, monkeypatch: pytest.MonkeyPatch
):
    from vllm.v1.worker.cpu_worker import CPUWorker

    # vLLM mixes the extension into this class for good, which would affect later engines in this process.
    bases = CPUWorker.__bases__
    replace_broadcast(monkeypatch)
    engine = start_engine(policy_a, worker_extension=NCCLSync.worker_extension)
    try:
        sync = NCCLSync(bucket_mib=1, background=True)
        sync.connect(OneEngine(engine))
        sync.publish(policy_b.weights(), version=5, probe=Probe((), (), 0.0))
        sync.wait()
        assert run(engine.status()).version == 5
        (norm,) = engine._llm.collective_rpc(lambda worker: worker.model_runner.model.model.norm.weight.detach())
        assert torch.equal(norm, policy_b.model.model.norm.weight)
        (embedding,) = engine._llm.collective_rpc(
            lambda worker: worker.model_runner.model.model.embed_tokens.weight.detach().clone()
        )
        assert torch.equal(embedding[: policy_b.model.config.vocab_size], policy_b.model.model.embed_tokens.weight)
        sync.close()
    finally:
        engine.close()
        CPUWorker.__bases__ = bases
