"""The actor of a real engine: concurrent calls, and a process that ends when vLLM fails."""

import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from dpo_ray.config.rounds import EngineConfig, SamplingConfig
from dpo_ray.launch.rollouts.engine_actor import EngineActor
from dpo_ray.rollout.engine import UNPUSHED, Request
from dpo_ray.sync.object_store import ObjectStoreSync
from dpo_ray.types import Prompt

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PATIENCE_S = 120.0


class BreakableActor(EngineActor):
    async def pid(self) -> int:
        return os.getpid()

    async def break_vllm(self) -> None:
        def step() -> None:
            raise IndexError("index out of range")

        self._llm.llm_engine.step = step  # pyrefly: ignore


def test_an_actor_serves_calls_at_once_and_its_process_exits_when_vllm_fails(
    joined_cluster: None, tmp_path: Path
) -> None:
    from dpo_ray.rollout.vllm_engine import engine_environment
    from tests.rollout_vllm.test_weight_push import saved_policy

    def call(method: str, *arguments: Any) -> Any:
        return ray.get(getattr(actor, method).remote(*arguments), timeout=PATIENCE_S)

    config = {
        "run": {"dir": str(tmp_path)},
        "model": {"path": str(saved_policy(1, tmp_path / "policy").path)},
        "data": {"max_prompt_tokens": 64},
        "online": {"prompts": "p.jsonl", "engine": {"kv_cache_gib": 0.125}, "sampling": {"max_tokens": 400}},
    }
    environment = engine_environment(EngineConfig(), on_cpu=True, threads=1)
    actor: Any = (
        ray.remote(BreakableActor)
        .options(num_cpus=1, max_concurrency=1000, runtime_env={"env_vars": environment})
        .remote(config, 0, on_cpu=True, executor="mp", worker_extension=ObjectStoreSync.worker_extension)
    )
    ray.get(actor.__ray_ready__.remote(), timeout=PATIENCE_S)
    request = Request(Prompt(0, (), (4, 5, 6)), SamplingConfig(max_tokens=400, min_tokens=400), 4, 0, PATIENCE_S)
    long = actor.generate.remote(request)
    while call("status").generated_tokens < 10:
        assert not ray.wait([long], timeout=0)[0]
    group = ray.get(long, timeout=PATIENCE_S)
    assert [len(completion.token_ids) for completion in group.completions] == [400] * 4
    assert group.policy_version == UNPUSHED
    process = psutil.Process(call("pid"))
    call("break_vllm")
    with pytest.raises((RuntimeError, RayActorError), match=r"index out of range|died"):
        call("generate", request)
    process.wait(PATIENCE_S)
    with pytest.raises(RayActorError):
        call("status")
