"""Where engines run, on CPUs and GPUs of their own or on the GPUs of training workers."""

from collections import defaultdict
from collections.abc import Sequence
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
    """What one engine asks of Ray."""

    bundles: tuple[dict[str, float], ...] = ()
    """Of a placement group of its own, whose first bundle holds the actor; none for an engine on trainers' GPUs."""
    node: str | None = None
    """Where an engine on trainers' GPUs runs."""
    num_cpus: int = 0
    num_gpus: int = 0
    """GPUs of the actor itself. Of a tensor-parallel engine Ray gives them to the workers that vLLM starts."""
    environment: dict[str, str] = field(default_factory=dict)
    executor: str = "ray"
    """See ``VLLMEngine``."""


KEEP_VISIBLE = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Ray hides all GPUs from an actor that asks for none; with this it leaves the variable as it is."""


def dedicated_placement(size: ClusterConfig, *, on_gpus: bool) -> EnginePlacement:
    """The place of an engine with CPUs and GPUs of its own."""
    cpus = {"CPU": float(size.cpus_per_engine)}
    if not on_gpus:
        return EnginePlacement(bundles=(cpus,), num_cpus=size.cpus_per_engine)
    if size.gpus_per_engine == 1:
        return EnginePlacement(bundles=(cpus | {"GPU": 1.0},), num_cpus=size.cpus_per_engine, num_gpus=1)
    # vLLM's workers take no CPU and one whole GPU each, one a bundle; that of the first bundle sits beside the actor.
    bundles = (cpus | {"GPU": 1.0}, *({"GPU": 1.0} for _ in range(size.gpus_per_engine - 1)))
    return EnginePlacement(bundles=bundles, num_cpus=size.cpus_per_engine, environment=KEEP_VISIBLE)


def colocated_placements(size: ClusterConfig, seats: Sequence[GpuSlot]) -> list[EnginePlacement]:
    """The places of all engines on the GPUs of training workers.

    An engine gets neighbouring ranks of one node, and sees their GPUs only. It asks Ray for nothing: what it uses is
    its trainers', who wait meanwhile.

    Args:
        seats: of all ranks, in order.

    Raises:
        ValueError: the workers are spread so that not every engine finds enough GPUs on one node.
    """
    of_node: dict[str, list[str]] = defaultdict(list)
    for seat in seats:
        of_node[seat.node].append(seat.gpu)
    width = size.gpus_per_engine
    places = [
        EnginePlacement(
            node=node,
            environment=KEEP_VISIBLE | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[start : start + width])},
            executor="mp",
        )
        for node, gpus in of_node.items()
        for start in range(0, len(gpus) - width + 1, width)
    ]
    if len(places) < size.rollout_engines:
        raise ValueError(
            f"cluster.rollout_engines={size.rollout_engines} with cluster.gpus_per_engine={width} on shared GPUs: the "
            f"training workers' nodes have {', '.join(str(len(gpus)) for gpus in of_node.values())} of their GPUs, "
            f"which seats {len(places)} engines"
        )
    return places[: size.rollout_engines]
