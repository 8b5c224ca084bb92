"""What sections of a configuration ask of each other. Each check raises a ValueError that names the keys."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_ray.config.schema import Config


def validate_sections(config: "Config") -> None:
    """Raise a ValueError where two sections contradict each other."""
    _workers_fill_the_mesh(config)
    _layers_can_be_split(config)
    _layers_can_be_compiled(config)
    _reference_can_be_had(config)
    _run_can_be_kept(config)
    _engines_can_share(config)


def _workers_fill_the_mesh(config: "Config") -> None:
    shapes = {name: getattr(config.shard, name) for name in ("replicate", "context_parallel", "tensor_parallel")}
    if config.cluster.train_workers % math.prod(shapes.values()):
        written = " * ".join(f"shard.{name} ({size})" for name, size in shapes.items() if size > 1)
        raise ValueError(f"{written} must divide cluster.train_workers ({config.cluster.train_workers})")


def _layers_can_be_split(config: "Config") -> None:
    if config.shard.context_parallel > 1 and config.model.attention == "sdpa":
        raise ValueError(
            "model.attention: sdpa masks a whole row, which no worker has with shard.context_parallel "
            f"({config.shard.context_parallel}) > 1; set model.attention: auto or flex"
        )
    if config.shard.tensor_parallel > 1:
        without = {
            "model.lora": config.model.lora is not None,
            "model.fp8": config.model.fp8,
            "shard.activation_offload": config.shard.activation_offload,
            "shard.compile": config.shard.compile,
            "optim.use: adamw_8bit": config.optim.use == "adamw_8bit",
        }
        if found := [name for name, is_set in without.items() if is_set]:
            raise ValueError(
                f"{found[0]} does not go with layers that workers split; leave it out, or set "
                f"shard.tensor_parallel ({config.shard.tensor_parallel}) to 1"
            )


def _layers_can_be_compiled(config: "Config") -> None:
    if config.shard.compile and config.shard.activation_checkpointing == "selective":
        raise ValueError(
            "shard.compile would compile nothing of a layer of which some is recomputed; what it compiles keeps no "
            "cheap results anyway: set shard.activation_checkpointing: none, or full"
        )


def _reference_can_be_had(config: "Config") -> None:
    kind, refresh, lora = config.reference.kind, config.reference.refresh, config.model.lora
    if refresh == "round" and config.online is None:
        raise ValueError("reference.refresh: round needs rounds; it is for online runs (give an online section)")
    if refresh == "round" and kind == "live":
        raise ValueError("reference.refresh: round scores with the policy itself; set reference.kind to auto or cached")
    if refresh == "round" and kind == "adapters_off":
        raise ValueError("reference.refresh: round needs reference.kind: auto or cached; adapters_off never changes")
    if kind == "adapters_off" and lora is None:
        raise ValueError("reference.kind: adapters_off is for a policy with adapters; give model.lora, or set auto")
    if kind == "live" and lora is not None and lora.quantize is not None:
        raise ValueError(
            "reference.kind: live would keep a second model, in full precision, beside the one that "
            "model.lora.quantize holds in four bits; set reference.kind: adapters_off, or auto"
        )
    if kind == "cached" and refresh == "never" and config.online is not None:
        raise ValueError(
            "reference.kind: cached cannot score fresh pairs with the untrained policy once it has been trained; "
            "set reference.kind: live (or auto), or reference.refresh: round"
        )
    if kind == "none" and config.loss.needing_reference:
        raise ValueError(
            f"reference.kind: none leaves loss {config.loss.needing_reference[0]!r} without the reference it needs; "
            "set reference.kind: auto, or take a loss that needs none, such as simpo"
        )


def _run_can_be_kept(config: "Config") -> None:
    if config.online is not None and config.run.remote:
        raise ValueError(
            f"run.dir is {config.run.dir!r}: an online run writes rounds that several processes read; object stores "
            "are for offline runs, give a path that all nodes mount"
        )
    if config.run.best_metric is not None and (config.online is not None or not config.data.eval):
        raise ValueError("run.best_metric needs evaluations to compare; it is for offline runs with data.eval")


def _engines_can_share(config: "Config") -> None:
    if config.online is None:
        return
    transport, size = config.online.sync.use, config.cluster
    if transport == "ipc" and not size.colocate:
        raise ValueError(
            "online.sync.use: ipc hands weights over on the card that engine and trainer share; set "
            "cluster.colocate: true, or online.sync.use: nccl for engines with GPUs of their own"
        )
    if not size.colocate:
        return
    if config.online.max_lag > 0:
        raise ValueError(
            f"online.max_lag is {config.online.max_lag}: with cluster.colocate engines and training take turns on a "
            "card, so that generation cannot run ahead; set online.max_lag: 0"
        )
    if transport == "nccl":
        raise ValueError(
            "online.sync.use: nccl cannot serve cluster.colocate, NCCL refuses two ranks on one GPU; set auto"
        )
    if (needed := size.rollout_engines * size.gpus_per_engine) > size.train_workers:
        raise ValueError(
            f"cluster.colocate: cluster.rollout_engines x cluster.gpus_per_engine is {needed}, but "
            f"cluster.train_workers brings {size.train_workers} GPUs to share"
        )
