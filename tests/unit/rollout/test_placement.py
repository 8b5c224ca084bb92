"""Resources of engines and judges, the capacity check, and the choice of the weight transport; without a cluster."""

from typing import Any

import pytest
import ray

from dpo_ray.config import Config
from dpo_ray.config.schema import ClusterConfig
from dpo_ray.launch.cluster import Cluster, validate_capacity
from dpo_ray.launch.rollouts.judge_actor import start_judges
from dpo_ray.launch.rollouts.weights import build_transport
from dpo_ray.rollout.placement import (
    EnginePlacement,
    GpuSlot,
    colocated_placements,
    dedicated_placement,
    packing_strategy,
)
from dpo_ray.sync import TRANSPORTS

KEEP_VISIBLE = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def config(use: str = "auto", **cluster: Any) -> Config:
    online = {"prompts": "prompts.jsonl", "sync": {"use": use}}
    return Config.model_validate({"model": {"path": "tiny"}, "cluster": cluster, "online": online})


def test_an_engine_on_cpus_requests_cpus_only():
    placement = dedicated_placement(ClusterConfig(cpus_per_engine=3), on_gpus=False)
    assert placement == EnginePlacement(bundles=({"CPU": 3.0},), num_cpus=3)


def test_the_actor_of_a_one_gpu_engine_requests_the_gpu():
    placement = dedicated_placement(ClusterConfig(cpus_per_engine=2), on_gpus=True)
    assert placement == EnginePlacement(bundles=({"CPU": 2.0, "GPU": 1.0},), num_cpus=2, num_gpus=1)


def test_a_tensor_parallel_engine_leaves_one_gpu_per_bundle_to_the_vllm_workers():
    placement = dedicated_placement(ClusterConfig(cpus_per_engine=2, gpus_per_engine=3), on_gpus=True)
    assert [bundle.get("GPU") for bundle in placement.bundles] == [1.0] * 3, "vLLM accepts at most one per bundle"
    assert [bundle.get("CPU") for bundle in placement.bundles] == [2.0, None, None], "vLLM workers request none"
    assert (placement.num_gpus, placement.executor, placement.environment) == (0, "ray", KEEP_VISIBLE)


@pytest.mark.parametrize(("gpus", "strategy"), [(1, "STRICT_PACK"), (8, "STRICT_PACK"), (9, "PACK"), (16, "PACK")])
def test_an_engine_stays_on_one_node_if_one_is_large_enough(gpus: int, strategy: str):
    nodes = [{"CPU": 64.0, "memory": 1e9}, {"CPU": 16.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 8.0}]
    placement = dedicated_placement(ClusterConfig(cpus_per_engine=16, gpus_per_engine=gpus), on_gpus=True)
    assert packing_strategy(placement.bundles, nodes) == strategy


def test_colocated_engines_get_neighboring_ranks_of_one_node_and_request_nothing():
    slots = [GpuSlot("a", "0"), GpuSlot("a", "1"), GpuSlot("b", "2"), GpuSlot("a", "3"), GpuSlot("b", "5")]
    placements = colocated_placements(ClusterConfig(train_workers=5, rollout_engines=2, gpus_per_engine=2), slots)
    assert [(p.node, p.environment["CUDA_VISIBLE_DEVICES"]) for p in placements] == [("a", "0,1"), ("b", "2,5")]
    assert {(p.num_cpus, p.num_gpus, p.bundles, p.executor) for p in placements} == {(0, 0, (), "mp")}
    assert all(p.environment.items() >= KEEP_VISIBLE.items() for p in placements)


def test_a_single_gpu_fits_one_colocated_engine():
    (placement,) = colocated_placements(ClusterConfig(colocate=True), [GpuSlot("a", "0")])
    assert (placement.node, placement.environment["CUDA_VISIBLE_DEVICES"]) == ("a", "0")


def test_workers_spread_too_thin_for_an_engine_are_rejected():
    slots = [GpuSlot(node, "0") for node in "abcd"]
    with pytest.raises(ValueError, match=r"gpus_per_engine=2, cluster\.colocate: .* 1, 1, 1, 1 GPUs .* fit 0 engines"):
        colocated_placements(ClusterConfig(train_workers=4, rollout_engines=2, gpus_per_engine=2), slots)


def test_colocated_engines_need_no_gpus_of_their_own():
    size = ClusterConfig(train_workers=1, rollout_engines=1, colocate=True)
    validate_capacity(Cluster(gpus=1, cpus=1), size, 1, {})
    with pytest.raises(ValueError, match="need 2 GPUs; the cluster has 1"):
        validate_capacity(Cluster(gpus=1, cpus=2), size.model_copy(update={"colocate": False}), 1, {})


class FakeActorClass:
    """Stands for ``ray.remote(...)``; has the options of every actor that was started."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []

    def options(self, **options: Any) -> "FakeActorClass":
        self.latest = options
        return self

    def remote(self, *arguments: Any) -> int:
        self.started.append(self.latest)
        return len(self.started)


def test_a_judge_sees_the_gpus_that_it_asks_for_and_otherwise_none(monkeypatch: pytest.MonkeyPatch):
    actors = FakeActorClass()
    monkeypatch.setattr(ray, "remote", lambda actor: actors)
    online = {"prompts": "p", "eval_prompts": "e", "judge": {"replicas": 2}, "eval_judge": {"num_gpus": 0.5}}
    start_judges(
        Config.model_validate({"model": {"path": "tiny"}, "online": online}),
        None,
        {"judge": set(), "eval_judge": set()},
    )
    seen = [(options["num_gpus"], options["runtime_env"]) for options in actors.started]
    assert seen == [(0, {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}})] * 2 + [(0.5, {})]


def test_judges_with_gpus_count_and_one_with_both_purposes_once():
    judge: dict[str, Any] = {"use": "reward_model", "args": {"path": "r"}, "num_gpus": 1, "replicas": 2}
    online: dict[str, Any] = {"prompts": "p", "eval_prompts": "e", "judge": judge}

    def validate(gpus: int, **changes: Any) -> None:
        parsed = Config.model_validate({"model": {"path": "tiny"}, "online": online | changes})
        assert parsed.online is not None
        validate_capacity(Cluster(gpus, cpus=8), parsed.cluster, 1, parsed.online.started_judges)

    validate(4)
    with pytest.raises(
        ValueError, match=r"rollout_engines=1 .* \+ online\.judge\.replicas=2 x online\.judge\.num_gpus=1 need 4 GPUs"
    ):
        validate(3)
    validate(5, eval_judge=judge | {"num_gpus": 0.3})
    with pytest.raises(ValueError, match=r"online\.eval_judge\.replicas=2 x .*num_gpus=0\.3 need 4\.6 GPUs; .* has 4:"):
        validate(4, eval_judge=judge | {"num_gpus": 0.3})
    validate(2, source={"use": "self_play"}, eval_prompts=())
    validate(0, judge={})
    with pytest.raises(ValueError, match=r"online\.judge\.num_gpus=1 need 2 GPUs; the cluster has 0"):
        validate(0)


@pytest.mark.parametrize(
    ("on_gpus", "colocate", "name"), [(False, False, "object_store"), (True, False, "nccl"), (True, True, "ipc")]
)
def test_auto_selects_the_transport_that_fits_the_cluster(on_gpus: bool, colocate: bool, name: str):
    assert type(build_transport(config(colocate=colocate), on_gpus=on_gpus)) is TRANSPORTS[name]


def test_engines_that_load_from_the_object_store_need_no_sender_and_only_ipc_needs_all_weights_on_every_rank():
    transports: dict[str, Any] = dict(TRANSPORTS)
    assert {name for name, transport in transports.items() if transport.collective} == {"nccl", "ipc"}
    assert {name for name, transport in transports.items() if transport.every_rank} == {"ipc"}


@pytest.mark.parametrize(("use", "colocate"), [("nccl", False), ("ipc", True)])
def test_a_gpu_transport_is_rejected_on_a_cluster_without_gpus(use: str, colocate: bool):
    with pytest.raises(ValueError, match=rf"online\.sync\.use: {use} moves weights between GPUs .* has none"):
        build_transport(config(use, colocate=colocate), on_gpus=False)


def test_the_object_store_is_rejected_for_colocated_engines():
    with pytest.raises(ValueError, match=r"object_store is not for cluster\.colocate on GPUs"):
        build_transport(config("object_store", colocate=True), on_gpus=True)
