"""Placement of engines: on dedicated CPUs and GPUs, or colocated with training workers on their GPUs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dpo_ray.config.schema import ClusterConfig


@dataclass(frozen=True, slots=True)
class GpuSlot:
    """The GPU of one training worker."""

    node: str
    """Ray's id of the node."""
    gpu: str
    """Ray's id of the GPU on that node."""


@dataclass(frozen=True, slots=True)
class EnginePlacement:
    """The resources of one engine, as Ray's options."""

    bundles: tuple[dict[str, float], ...] = ()
    """Placement group of a dedicated engine, whose first bundle holds the actor; empty for a colocated engine."""
    node: str | None = None
    """Node of a colocated engine."""
    num_cpus: int = 0
    num_gpus: int = 0
    """GPUs of the actor itself; 0 for a tensor-parallel engine, whose vLLM workers hold the GPUs."""
    environment: dict[str, str] = field(default_factory=dict)
    executor: str = "ray"
    """See ``VLLMEngine``."""


KEEP_VISIBLE = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Ray hides all GPUs from an actor that requests none; this keeps CUDA_VISIBLE_DEVICES unchanged."""


def dedicated_placement(size: ClusterConfig, *, on_gpus: bool) -> EnginePlacement:
    """The placement of an engine with its own CPUs and GPUs."""
    cpus = {"CPU": float(size.cpus_per_engine)}
    if not on_gpus:
        return EnginePlacement(bundles=(cpus,), num_cpus=size.cpus_per_engine)
    if size.gpus_per_engine == 1:
        return EnginePlacement(bundles=(cpus | {"GPU": 1.0},), num_cpus=size.cpus_per_engine, num_gpus=1)
    # Each vLLM worker takes one whole GPU and no CPU from a bundle of its own; the first shares the actor's bundle.
    bundles = (cpus | {"GPU": 1.0}, *({"GPU": 1.0} for _ in range(size.gpus_per_engine - 1)))
    return EnginePlacement(bundles=bundles, num_cpus=size.cpus_per_engine, environment=KEEP_VISIBLE)


def colocated_placements(size: ClusterConfig, slots: Sequence[GpuSlot]) -> list[EnginePlacement]:
    """The placements of all engines on the GPUs of training workers.

    An engine gets the GPUs of neighboring ranks on one node and sees no others. It requests no resources from Ray: it
    uses those of the workers, which wait meanwhile.

    Args:
        slots: GPUs of all ranks, in order.

    Raises:
        ValueError: too few nodes have enough of the workers' GPUs.
    """
    gpus_by_node: dict[str, list[str]] = defaultdict(list)
    for slot in slots:
        gpus_by_node[slot.node].append(slot.gpu)
    width = size.gpus_per_engine
    placements = [
        EnginePlacement(
            node=node,
            environment=KEEP_VISIBLE | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[start : start + width])},
            executor="mp",
        )
        for node, gpus in gpus_by_node.items()
        for start in range(0, len(gpus) - width + 1, width)
    ]
    if len(placements) < size.rollout_engines:
        raise ValueError(
            f"cluster.rollout_engines={size.rollout_engines}, cluster.gpus_per_engine={width}, cluster.colocate: the "
            f"nodes have {', '.join(str(len(gpus)) for gpus in gpus_by_node.values())} GPUs of training workers, "
            f"which fit {len(placements)} engines; lower one of these keys"
        )
    return placements[: size.rollout_engines]


def packing_strategy(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> str:
    """Ray's placement strategy of an engine: on one node if it fits one, else on as few as possible.

    Args:
        bundles: the resources that the engine needs, by bundle.
        nodes: the resources of each node, free or not.
    """
    needed = {name: sum(other.get(name, 0.0) for other in bundles) for bundle in bundles for name in bundle}
    fits = any(all(node.get(name, 0.0) >= amount for name, amount in needed.items()) for node in nodes)
    return "STRICT_PACK" if fits else "PACK"
