"""The environment in which an engine is started."""

import pytest

from dpo_ray.config.schema import EngineConfig
from dpo_ray.rollout.vllm_engine import engine_environment


@pytest.mark.parametrize(
    ("inherited", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "8"}, "ACTIVE")]
)
def test_waiting_threads_of_a_cpu_engine_sleep_unless_the_starting_process_has_another_policy(
    inherited: dict[str, str], policy: str
) -> None:
    environment = engine_environment(EngineConfig(), on_cpu=True, threads=2, inherited=inherited)
    assert environment["OMP_WAIT_POLICY"] == policy
    assert environment["OMP_NUM_THREADS"] == "2", "the engine's own, not the starting process's"
