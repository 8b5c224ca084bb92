"""vLLM in an engine process of its own, as on GPUs, here on the CPU."""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import pytest

from dpo_ray.rollout.stepping import EngineFailed
from dpo_ray.sync.object_store import ObjectStoreSync
from dpo_ray.types import CompletionGroup
from tests.rollout_vllm.test_engine import exactly, load, until_generated
from tests.rollout_vllm.test_weight_push import (
    Policy,
    check_logps,
    environment,
    pack,
    policy_a,
    policy_b,
    prompts,
    request,
    start_engine,
)

if TYPE_CHECKING:
    from dpo_ray.rollout.vllm_engine import VLLMEngine

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DEATH_S = 30

__all__ = ["environment", "policy_a", "policy_b"]  # fixtures


@pytest.fixture(scope="module")
def engine(policy_a: Policy, environment: None) -> Iterator["VLLMEngine"]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        engine = start_engine(policy_a, worker_extension=ObjectStoreSync.worker_extension, drain_updates=False)
        yield engine
        engine.close()


def test_requests_cross_an_update_that_was_started_twice(engine: "VLLMEngine", policy_b: Policy):
    async def updated() -> CompletionGroup:
        running = asyncio.create_task(engine.generate(request(prompts(40)[0], exactly(300), candidates=3)))
        await until_generated(engine, 60)
        await engine.start_update()
        tokens = (await engine.status()).generated_tokens
        for bucket in list(pack(policy_b.weights(), bucket_bytes=2**18))[:5]:
            await engine.load(bucket)
        await engine.start_update()
        assert (await engine.status()).generated_tokens == tokens
        await load(engine, policy_b, 6)
        return await running

    assert not engine._in_process
    group = asyncio.run(updated())
    assert [len(completion.token_ids) for completion in group.completions] == [300] * 3
    assert {(c.first_version, c.last_version) for c in group.completions} == {(-1, 6)}
    check_logps(engine, policy_b)
    assert asyncio.run(engine.status()).version == 6


def test_the_death_of_the_engine_process_shows_in_the_status(engine: "VLLMEngine"):
    """Comes last: the engine is unusable afterwards."""
    children = psutil.Process().children()
    (core,) = [child for child in children if "EngineCore" in " ".join(child.cmdline()) or "EngineCore" in child.name()]

    async def die() -> None:
        running = asyncio.create_task(engine.generate(request(prompts(3)[0], exactly(400))))
        await until_generated(engine, 1)
        core.kill()
        core.wait(DEATH_S)
        with pytest.raises(EngineFailed, match="died"):
            async with asyncio.timeout(DEATH_S):
                await until_generated(engine, 10**9)
        running.cancel()

    asyncio.run(die())
