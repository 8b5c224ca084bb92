"""What engines ask of Ray, and which transport serves which cluster: computed, without a cluster."""

from typing import Any

import pytest

from dpo_ray.config import Config
from dpo_ray.config.schema import ClusterConfig
from dpo_ray.launch.cluster import Cluster, validate_capacity
from dpo_ray.launch.rollouts.placement import EnginePlacement, GpuSlot, colocated_placements, dedicated_placement
from dpo_ray.launch.rollouts.push import build_transport
from dpo_ray.sync import TRANSPORTS

SHOWS_ALL = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def config(use: str = "auto", **cluster: Any) -> Config:
    online = {"prompts": "prompts.jsonl", "sync": {"use": use}}
    return Config.model_validate({"model": {"path": "tiny"}, "cluster": cluster, "online": online})


def test_an_engine_on_cpus_takes_cpus_only():
    place = dedicated_placement(ClusterConfig(cpus_per_engine=3), on_gpus=False)
    assert place == EnginePlacement(bundles=({"CPU": 3.0},), num_cpus=3)


def test_an_engine_on_one_gpu_holds_it_itself():
    place = dedicated_placement(ClusterConfig(cpus_per_engine=2), on_gpus=True)
    assert place == EnginePlacement(bundles=({"CPU": 2.0, "GPU": 1.0},), num_cpus=2, num_gpus=1)


def test_a_tensor_parallel_engine_leaves_one_gpu_a_bundle_to_the_workers_of_vllm():
    place = dedicated_placement(ClusterConfig(cpus_per_engine=2, gpus_per_engine=3), on_gpus=True)
    assert [bundle.get("GPU") for bundle in place.bundles] == [1.0] * 3, "vLLM accepts at most one a bundle"
    assert [bundle.get("CPU") for bundle in place.bundles] == [2.0, None, None], "its workers ask for none"
    assert (place.num_gpus, place.executor, place.environment) == (0, "ray", SHOWS_ALL)


def test_engines_on_shared_gpus_sit_with_neighbouring_ranks_of_one_node_and_ask_for_nothing():
    seats = [GpuSlot("a", "0"), GpuSlot("a", "1"), GpuSlot("b", "2"), GpuSlot("a", "3"), GpuSlot("b", "5")]
    places = colocated_placements(ClusterConfig(train_workers=5, rollout_engines=2, gpus_per_engine=2), seats)
    assert [(p.node, p.environment["CUDA_VISIBLE_DEVICES"]) for p in places] == [("a", "0,1"), ("b", "2,5")]
    assert {(p.num_cpus, p.num_gpus, p.bundles, p.executor) for p in places} == {(0, 0, (), "mp")}
    assert all(p.environment.items() >= SHOWS_ALL.items() for p in places)


def test_a_single_card_seats_one_engine():
    (place,) = colocated_placements(ClusterConfig(colocate=True), [GpuSlot("a", "0")])
    assert (place.node, place.environment["CUDA_VISIBLE_DEVICES"]) == ("a", "0")


def test_workers_spread_too_thin_for_an_engine_are_refused():
    seats = [GpuSlot(node, "0") for node in "abcd"]
    with pytest.raises(ValueError, match=r"gpus_per_engine=2 on shared GPUs: .* have 1, 1, 1, 1 .* seats 0 engines"):
        colocated_placements(ClusterConfig(train_workers=4, rollout_engines=2, gpus_per_engine=2), seats)


def test_shared_gpus_are_counted_once():
    size = ClusterConfig(train_workers=1, rollout_engines=1, colocate=True)
    validate_capacity(Cluster(gpus=1, cpus=1, nodes=1), size, 1)
    with pytest.raises(ValueError, match="need 2 GPUs; the cluster has 1"):
        validate_capacity(Cluster(gpus=1, cpus=2, nodes=1), size.model_copy(update={"colocate": False}), 1)


@pytest.mark.parametrize(
    ("on_gpus", "share", "name"), [(False, False, "object_store"), (True, False, "nccl"), (True, True, "ipc")]
)
def test_auto_takes_the_transport_that_fits_the_cluster(on_gpus: bool, share: bool, name: str):
    assert type(build_transport(config(colocate=share), on_gpus=on_gpus)) is TRANSPORTS[name]


def test_only_the_object_store_can_give_a_push_again():
    transports: dict[str, Any] = dict(TRANSPORTS)
    assert {name for name, transport in transports.items() if transport.replays} == {"object_store"}


@pytest.mark.parametrize(("use", "share"), [("nccl", False), ("ipc", True)])
def test_a_transport_between_gpus_is_refused_on_a_cluster_without(use: str, share: bool):
    with pytest.raises(ValueError, match=rf"online\.sync\.use: {use} moves weights between GPUs .* has none"):
        build_transport(config(use, colocate=share), on_gpus=False)


def test_the_object_store_is_refused_on_shared_gpus():
    with pytest.raises(ValueError, match=r"object_store is not for cluster\.colocate on GPUs"):
        build_transport(config("object_store", colocate=True), on_gpus=True)
