"""Adapters alone to a real engine: it computes what an engine with the merged weights computes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dpo_ray.sync.lora import LoraSync
from dpo_ray.types import Probe
from tests.rollout_vllm.test_weight_push import (
    OneEngine,
    Policy,
    environment,
    greedy,
    policy_a,
    saved_policy,
    start_engine,
)

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

__all__ = ["environment", "policy_a"]  # fixtures


@pytest.fixture
def worker_bases() -> Iterator[None]:
    """vLLM mixes the extension into this class for good, which would affect later engines in this process."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    bases = CPUWorker.__bases__
    yield
    CPUWorker.__bases__ = bases


def adapters(policy: Policy, size: float) -> dict[str, Tensor]:
    """Adapters of rank 2 for q_proj, which the engine fuses with k_proj and v_proj, and for down_proj.

    In the precision in which they travel, and in which trainer and vLLM compute with adapters.
    """
    generator, parts = torch.Generator().manual_seed(0), {}
    for name, weight in policy.weights():
        if "q_proj" in name or "down_proj" in name:
            rows, columns = weight.shape
            parts[f"{name}.lora_A"] = torch.randn(2, columns, generator=generator).bfloat16().float()
            parts[f"{name}.lora_B"] = (size * torch.randn(rows, 2, generator=generator)).bfloat16().float()
            parts[f"{name}.lora_scale"] = torch.tensor(1.5)
    return parts


@torch.no_grad()
def merge(policy: Policy, parts: dict[str, Tensor]) -> None:
    for name, weight in policy.weights():
        if f"{name}.lora_A" in parts:
            weight += 1.5 * (parts[f"{name}.lora_B"] @ parts[f"{name}.lora_A"])


def test_an_engine_with_adapters_generates_the_completions_of_a_fresh_engine_with_the_merged_weights(
    policy_a: Policy, environment: None, worker_bases: None, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("merged")
    merged = saved_policy(1, folder)
    merged.model.float()
    parts = adapters(merged, 0.1)
    merge(merged, parts)
    merged.model.bfloat16().save_pretrained(folder)
    fresh = start_engine(merged, worker_extension=None)
    expected = greedy(fresh)
    fresh.close()

    engine = start_engine(policy_a, worker_extension=LoraSync.worker_extension)
    try:
        base = greedy(engine)
        sync = LoraSync(dtype="bfloat16")
        sync.connect(OneEngine(engine))
        probe = Probe((), (), 0.0)
        sync.publish(parts.items(), version=1, probe=probe)
        assert greedy(engine) == expected
        assert all(a != b for a, b in zip(base, expected, strict=True))
        sync.publish(adapters(policy_a, 0.0).items(), version=2, probe=probe)  # merged into the weights on disk again
        assert greedy(engine) == base
        unknown = [(f"another.{name.rpartition('.')[-1]}", part) for name, part in parts.items()]
        with pytest.raises(ValueError, match="no weights for 1 adapters, first another"):
            sync.publish(unknown, version=3, probe=probe)
        sync.publish(parts.items(), version=4, probe=probe)
        assert greedy(engine) == expected
    finally:
        engine.close()
