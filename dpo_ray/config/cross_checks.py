"""Checks that involve several sections of a configuration. Each raises a ValueError that names the keys."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_ray.config.tree import Config

ONLINE_METRICS = ("heldout/score", "heldout/win_rate", "kl")
"""Metrics of the evaluations of an online run."""


def check_mesh(config: "Config") -> None:
    """Check that the parallel sizes divide the workers."""
    sizes = {name: getattr(config.shard, name) for name in ("replicate", "context_parallel", "tensor_parallel")}
    if config.cluster.train_workers % math.prod(sizes.values()):
        product = " * ".join(f"shard.{name} ({size})" for name, size in sizes.items() if size > 1)
        raise ValueError(f"{product} must divide cluster.train_workers ({config.cluster.train_workers})")


def check_router_loss(config: "Config") -> None:
    """Check that ranks have the router logits of whole sequences."""
    if config.loss.router_aux and config.shard.context_parallel > 1:
        raise ValueError(
            f"loss.router_aux: {config.loss.router_aux} needs whole sequences, which shard.context_parallel "
            f"({config.shard.context_parallel}) splits; set one of them to its default"
        )


def check_layers(config: "Config") -> None:
    """Check that layers can be sharded, compiled and checkpointed as configured."""
    shard, model = config.shard, config.model
    if shard.context_parallel > 1 and model.attention in ("sdpa", "padded"):
        raise ValueError(
            f"model.attention: {model.attention} needs whole rows, which shard.context_parallel "
            f"({shard.context_parallel}) splits; set model.attention: auto or flex"
        )
    unsupported = {
        "model.lora": model.lora is not None,
        "model.fp8": model.fp8,
        "shard.activation_offload": shard.activation_offload,
        "shard.compile": shard.compile,
        "optim.use: adamw_8bit": config.optim.use == "adamw_8bit",
    }
    if shard.tensor_parallel > 1 and any(unsupported.values()):
        key = next(key for key, is_set in unsupported.items() if is_set)
        raise ValueError(
            f"{key} is not supported with tensor parallelism; leave it out, or set "
            f"shard.tensor_parallel ({shard.tensor_parallel}) to 1"
        )
    if shard.compile and shard.activation_checkpointing == "selective":
        raise ValueError(
            "shard.compile is not supported with shard.activation_checkpointing: selective, and compiled layers "
            "save few activations anyway; set shard.activation_checkpointing: none or full"
        )


def check_refresh(config: "Config") -> None:
    """Check that there is a reference that can be refreshed as configured."""
    reference, loss = config.reference, config.loss
    kind, alpha, refresh = reference.kind, reference.mixup_alpha, f"reference.refresh: {reference.refresh}"
    if reference.refresh == "never":
        if alpha < 1:
            raise ValueError(
                f"reference.mixup_alpha: {alpha} is the policy's share in a refresh, and {refresh} has none; set "
                "reference.refresh: round or a number of rounds"
            )
        return
    if config.online is None:
        raise ValueError(f"{refresh} needs rounds; it is for online runs (give an online section)")
    if kind == "none":
        raise ValueError(f"{refresh} changes the reference, and reference.kind: none has none; set refresh: never")
    if kind == "auto" and loss.reference_free:
        raise ValueError(f"{refresh} changes the reference, and loss.use: {loss.use!r} has none; set refresh: never")
    if not reference.refreshes_copy:
        if kind in ("live", "adapters_off"):
            raise ValueError(
                f"{refresh} uses the policy as reference, reference.kind: {kind} never changes; "
                "set reference.kind: auto or cached"
            )
        return
    refresh += f" with mixup_alpha: {alpha}" if alpha < 1 else ""
    if kind in ("cached", "adapters_off"):
        source = "the policy of the round" if kind == "cached" else "the policy without its adapters"
        raise ValueError(
            f"{refresh} changes a copy of the trained weights, reference.kind: {kind} is {source}; set "
            "reference.kind: auto"
        )
    if kind == "live" and config.model.lora is not None:
        raise ValueError(
            f"{refresh} with model.lora changes a copy of the adapters, reference.kind: live is a whole model without "
            "adapters; set reference.kind: auto"
        )


def check_reference(config: "Config") -> None:
    """Check that the reference can be computed."""
    kind, lora, loss, online = config.reference.kind, config.model.lora, config.loss, config.online
    if kind == "adapters_off" and lora is None:
        raise ValueError("reference.kind: adapters_off is for a policy with adapters; give model.lora, or set auto")
    if kind == "live" and lora is not None and lora.quantize is not None:
        raise ValueError(
            "reference.kind: live would load a second, unquantized model beside the one that model.lora.quantize "
            "keeps in four bits; set reference.kind: adapters_off or auto"
        )
    if kind == "cached" and config.reference.refresh == "never" and online is not None:
        raise ValueError(
            "reference.kind: cached needs the untrained policy, which an online run no longer has for its "
            "new pairs; set reference.kind: live (or auto), or reference.refresh: round"
        )
    if online is not None and loss.examples != "pairs":
        of = "ranked lists" if loss.examples == "lists" else "completions with a label"
        raise ValueError(f"loss.use: {loss.use!r} is a loss of {of}, and rounds give pairs; use a loss of pairs")
    if kind == "none" and loss.reference_losses:
        raise ValueError(
            f"reference.kind: none, but loss {loss.reference_losses[0]!r} needs a reference; set "
            "reference.kind: auto, or use a reference-free loss such as simpo"
        )


def check_weighting(config: "Config") -> None:
    """Check that pairs have the scores that they are weighted by."""
    online = config.online
    if config.loss.weighting != "gap" or online is None:
        return
    if online.source.use == "self_play":
        raise ValueError(
            "loss.weighting: gap needs pairs with scores, and those of online.source.use: self_play have none; set "
            "loss.weighting: none or wpo"
        )
    if online.source.mix:
        raise ValueError(
            "loss.weighting: gap compares differences of scores, and those of the pairs of data.train that "
            f"online.source.mix ({online.source.mix:g}) adds have another unit than the judge's; set one of them to "
            "its default"
        )


def check_run(config: "Config") -> None:
    """Check that the run directory and the best metric suit the kind of run."""
    run, online = config.run, config.online
    if online is None:
        if run.best_metric is not None and not config.data.eval:
            raise ValueError("run.best_metric needs evaluations to compare; give data.eval")
        return
    if run.remote:
        raise ValueError(
            f"run.dir is {run.dir!r}: several processes of an online run read its rounds; object stores are "
            "for offline runs, give a path that all nodes mount"
        )
    if run.best_metric is None:
        return
    if run.best_metric not in ONLINE_METRICS:
        raise ValueError(
            f"run.best_metric is {run.best_metric!r}; evaluations of an online run have {', '.join(ONLINE_METRICS)}"
        )
    if run.best_metric == "kl" and config.reference_kind in ("none", "cached"):
        raise ValueError("run.best_metric: kl needs a reference that is held; set reference.refresh: never")
    if config.cluster.colocate:
        raise ValueError(
            "run.best_metric is not supported with cluster.colocate: engines that share GPUs sleep after an evaluation "
            "until the next round is trained; leave one of them out"
        )
    if run.best_metric != "kl" and not online.eval_prompts:
        raise ValueError(f"run.best_metric: {run.best_metric} needs held-out prompts; give online.eval_prompts")


def check_scheduler(config: "Config") -> None:
    """Check that a scheduler that ends trials early gets evaluations to judge them by."""
    scheduler, eval_every = config.sweep.scheduler, config.run.eval_every
    if scheduler.use == "none":
        return
    if eval_every is None:
        raise ValueError(
            f"sweep.scheduler.use: {scheduler.use} judges trials by evaluations during training, and run.eval_every is "
            "null; set run.eval_every to the steps (rounds online) between two evaluations"
        )
    for name in ("grace_period", "interval"):
        if (value := scheduler.args.get(name)) and value % eval_every:
            raise ValueError(
                f"sweep.scheduler.args.{name} is {value}: it must be a multiple of run.eval_every, {eval_every}"
            )


def check_lists(config: "Config") -> None:
    """Check that an epoch has whole ranked lists if the loss is of lists."""
    parts = [weight for weight in config.data.weights if weight != int(weight)]
    if config.loss.examples == "lists" and parts:
        raise ValueError(
            f"data.weights has {parts[0]:g}, which takes parts of ranked lists, and loss.use: {config.loss.use!r} is "
            "of whole ones; give whole numbers"
        )


def rounds_to_resume(save_every: int) -> int:
    """Most rounds that a resumed run trains again: it goes back to a checkpoint, and the newest may be incomplete."""
    return 2 * save_every - 1


def check_sources(config: "Config") -> None:
    """Check that the sources of a round have what they need."""
    online, reference, save_every = config.online, config.reference, config.run.save_every
    if online is None:
        return
    source, keep = online.source, online.keep_rounds
    if source.mix and not config.data.train:
        raise ValueError(f"online.source.mix is {source.mix:g}, and data.train is empty: give pairs to mix in")
    for name, share in {"mix": source.mix, "replay": source.replay}.items():
        if share and not source.pairs_of(share, online.prompts_per_round):
            raise ValueError(
                f"online.source.{name} is {share:g}, which is no pair in a round of online.prompts_per_round: "
                f"{online.prompts_per_round}; raise one of them, or leave online.source.{name} out"
            )
    needed = None if save_every is None else source.replay_rounds + rounds_to_resume(save_every)
    if source.replay and keep is not None and (needed is None or keep < needed):
        need = "null, without run.save_every" if needed is None else f"{needed} or more, for a run that resumes"
        raise ValueError(
            f"online.source.replay_rounds is {source.replay_rounds}, but online.keep_rounds: {keep} deletes the pairs "
            f"of rounds before; set online.keep_rounds to {need}"
        )
    if source.mix and config.data.weights:
        raise ValueError(
            "data.weights is not for online runs: online.source.mix takes all pairs of data.train evenly; leave it out"
        )
    policy_of_round = reference.refresh_every is not None and not reference.refreshes_copy
    if online.judged_by_trainer and (config.reference_kind == "none" or policy_of_round):
        found = "reference.refresh: round" if policy_of_round else "reference.kind: none"
        raise ValueError(
            "online.judge.use: implicit compares the policy with the reference, and with "
            f"{found} there is none that differs; set reference.kind: auto and reference.refresh: never"
        )
    if online.judged_by_trainer and not source.mix:
        raise ValueError(
            "online.judge.use: implicit compares the policy with the reference, and without other pairs the policy "
            "never comes to differ from it; give fixed pairs for the first rounds: data.train and online.source.mix"
        )


def check_engines(config: "Config") -> None:
    """Check that the weight transport suits the placement of engines, and that colocated ones fit."""
    online, cluster, lora = config.online, config.cluster, config.model.lora
    if online is None:
        return
    if online.sync.use == "ipc" and not cluster.colocate:
        raise ValueError(
            "online.sync.use: ipc needs engine and trainer on the same GPU; set cluster.colocate: true, or "
            "online.sync.use: nccl for engines with GPUs of their own"
        )
    if online.sync.use == "nccl" and cluster.colocate:
        raise ValueError(
            "online.sync.use: nccl is not supported with cluster.colocate, because NCCL rejects two ranks on one "
            "GPU; set online.sync.use: auto"
        )
    if online.sync.use == "lora":
        if lora is None or lora.quantize is not None:
            raise ValueError(
                "online.sync.use: lora sends the adapters of model.lora, which engines merge into the weights of "
                "model.path: give model.lora, without quantize, whose four-bit weights differ from these; or set auto"
            )
        if cluster.colocate:
            raise ValueError("online.sync.use: lora is not for cluster.colocate; set online.sync.use: auto")
    if not cluster.colocate:
        return
    if online.max_lag > 0:
        raise ValueError(
            f"online.max_lag is {online.max_lag}: with cluster.colocate generation and training alternate, so "
            "generation cannot run ahead; set online.max_lag: 0"
        )
    if (needed := cluster.rollout_engines * cluster.gpus_per_engine) > cluster.train_workers:
        raise ValueError(
            f"cluster.colocate: cluster.rollout_engines * cluster.gpus_per_engine is {needed}, more than "
            f"cluster.train_workers ({cluster.train_workers}), which have one GPU each"
        )


CROSS_CHECKS = (
    check_mesh, check_layers, check_router_loss, check_refresh, check_reference, check_weighting, check_run,
    check_lists, check_scheduler, check_sources, check_engines,
)  # fmt: skip
"""All checks; the first that fails is reported."""
