"""Weights between processes on real GPUs: ``pytest -m gpu tests/gpu``. One GPU runs the IPC test, two GPUs run both.

The engine has a process of its own, as in a run: CUDA does not open a handle in the process that exported it.
"""

import asyncio
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_ray.config.rounds import EngineConfig
from dpo_ray.rollout.updates import check_probe
from dpo_ray.sync.base import EngineGroup, WeightSync
from dpo_ray.sync.ipc import IPCSync
from dpo_ray.sync.nccl import NCCLSync
from dpo_ray.types import Probe

pytest.importorskip("vllm")
pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

ENGINE = EngineConfig(gpu_memory_utilization=0.3)
PROBE = list(range(4, 104))
START_S, CALL_S = 300, 60


def serve(calls: Any, path: str, worker_extension: str) -> None:
    """The engine's process: answers (method, arguments) until ``close``."""
    from dpo_ray.rollout.vllm_engine import VLLMEngine
    from tests.rollout_vllm.test_weight_push import MAX_MODEL_LEN

    engine = VLLMEngine(
        path,
        dtype="bfloat16",
        engine=ENGINE,
        max_model_len=MAX_MODEL_LEN,
        sleeps=True,
        worker_extension=worker_extension,
        on_cpu=False,
    )
    calls.send(("answer", "ready"))
    while True:
        method, arguments = calls.recv()
        if method == "close":
            engine.close()
            return
        try:
            calls.send(("answer", asyncio.run(getattr(engine, method)(*arguments))))
        except Exception as error:
            calls.send(("error", repr(error)))


class OneProcess(EngineGroup):
    """An ``EngineGroup`` of one engine in another process."""

    host, workers_per_engine, timeout_s = "127.0.0.1", 1, float(CALL_S)

    def __init__(self, calls: Any) -> None:
        self.calls = calls
        self.buckets = 0

    def answer(self, seconds: float = CALL_S) -> Any:
        assert self.calls.poll(seconds), f"the engine did not answer in {seconds} s"
        kind, value = self.calls.recv()
        assert kind == "answer", value
        return value

    def ask(self, method: str, *arguments: Any) -> Any:
        self.calls.send((method, arguments))
        return self.answer()

    def begin_update(self, version: int, *, collective: bool) -> list[str]:
        assert collective
        self.buckets, self.version = 0, version
        self.ask("start_update")
        return ["engine"]

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        self.ask("init_transfer", infos[0])

    def load(self, message: dict[str, Any]) -> None:
        self.buckets += 1
        self.ask("load", message)

    def end_update(self, digest: str, probe: Probe) -> None:
        assert self.ask("finish_update", self.version) == digest
        assert check_probe(probe, self.ask("token_logps", probe.token_ids)) > 0
        self.ask("serve")


@contextmanager
def engine_on(gpu: int, path: Path, worker_extension: str) -> Iterator[OneProcess]:
    from dpo_ray.rollout.vllm_engine import engine_environment

    spawn = multiprocessing.get_context("spawn")
    connection, engine_connection = spawn.Pipe()
    process = spawn.Process(target=serve, args=(engine_connection, str(path), worker_extension))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    device = visible[gpu] if len(visible) > gpu and visible[0] else str(gpu)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(ENGINE, on_cpu=False, threads=2).items():
            patch.setenv(name, value)
        patch.setenv("CUDA_VISIBLE_DEVICES", device)
        process.start()
    try:
        engines = OneProcess(connection)
        engines.answer(START_S)
        yield engines
    finally:
        connection.send(("close", ()))
        process.join(30)
        process.kill()


def check_publishes(sync: WeightSync, engines: OneProcess, path: Path) -> None:
    """Publish two policies, the second one to a sleeping engine."""
    from tests.rollout_vllm.test_weight_push import saved_policy

    sync.connect(engines)
    for version, seed in ((3, 2), (4, 5)):
        policy = saved_policy(seed, path / f"policy-{seed}")
        probe = Probe(tuple(PROBE), tuple(policy.token_logps(PROBE)), 0.1)  # computed by transformers, in float32
        if version == 4:
            engines.ask("sleep")
        weights = [(name, weight.to("cuda:0", torch.bfloat16)) for name, weight in policy.weights()]
        sync.publish(weights, version=version, probe=probe)
        sync.wait()
        assert engines.buckets > 1
        assert engines.ask("status").version == version
    sync.close()


def test_an_engine_on_the_same_card_computes_with_the_weights_that_ipc_sent(tmp_path: Path, one_rank: None) -> None:
    from tests.rollout_vllm.test_weight_push import saved_policy

    initial = saved_policy(1, tmp_path / "start")
    with engine_on(0, initial.path, IPCSync.worker_extension) as engines:
        check_publishes(IPCSync(bucket_mib=1), engines, tmp_path)
    assert torch.cuda.memory_allocated() < 64 * 2**20, "buckets are freed"


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each end")
def test_an_engine_on_another_card_computes_with_the_weights_that_nccl_sent(
    tmp_path: Path, one_rank: None, background: bool
) -> None:
    from tests.rollout_vllm.test_weight_push import saved_policy

    initial = saved_policy(1, tmp_path / "start")
    with engine_on(1, initial.path, NCCLSync.worker_extension) as engines:
        check_publishes(NCCLSync(bucket_mib=1, background=background), engines, tmp_path)
