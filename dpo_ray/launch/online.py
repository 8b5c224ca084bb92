"""``jobs.online``: engines, judge and training workers on one cluster, round after round."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from rich.console import Console

from dpo_ray.config import Config, with_absolute_paths
from dpo_ray.data.records import Problem, read_prompts
from dpo_ray.data.tokenize import load_tokenizer, render_prompt
from dpo_ray.launch.cluster import joined
from dpo_ray.launch.coordinator import THREADS, Coordinator
from dpo_ray.launch.display import shown
from dpo_ray.launch.ending import tell_end
from dpo_ray.launch.places import Seat
from dpo_ray.launch.reporting import RunReporter, StatusBoard
from dpo_ray.launch.rollout_pool import PoolReceiver
from dpo_ray.launch.workers import make_run_dir, train_on_workers
from dpo_ray.model.load import refuse_unusable_model
from dpo_ray.objective.losses import build_loss
from dpo_ray.plugins import build
from dpo_ray.rollout.judges import build_judge
from dpo_ray.rollout.selectors import build_selector
from dpo_ray.sync import TRANSPORTS
from dpo_ray.sync.base import WeightSync
from dpo_ray.sync.ipc import release_unused
from dpo_ray.train.online import train_online
from dpo_ray.train.optim import bind_optimizer
from dpo_ray.types import Ending, Prompt, RoundData, TokenSample

LOOP = f"{__name__}:loop"
BETWEEN_GPUS = ("nccl", "ipc")
"""Transports that are nothing without GPUs."""


def run_online(config: Config) -> None:
    """Train in rounds, from a configuration to a report.

    Raises:
        ValueError: the configuration, the prompts or the cluster cannot be used.
        TrainingFailed: the workers or the engines failed.
    """
    console = Console()
    config = with_absolute_paths(config)
    refuse_unusable(config)
    assert config.online is not None
    prompts = open_prompts(config, config.online.prompts, "online.prompts", console)
    held_out = open_prompts(config, config.online.eval_prompts, "online.eval_prompts", console)
    if config.online.prompts_per_round > len(prompts):
        raise ValueError(
            f"online.prompts_per_round is {config.online.prompts_per_round}; "
            f"online.prompts gave {len(prompts)} usable prompts"
        )
    make_run_dir(config)
    started = time.monotonic()
    with joined(config.cluster, engines=config.cluster.rollout_engines) as cluster:
        transport = build_transport(config, on_gpus=cluster.on_gpus)
        board: Any = ray.remote(num_cpus=0)(StatusBoard).remote()
        title = f"{config.run.name}: {config.online.rounds} rounds of {config.online.prompts_per_round} prompts"
        with shown(
            lambda: ray.get(board.read.remote(), timeout=5), title=title, rounds=config.online.rounds, console=console
        ):
            coordinator: Any = (
                ray.remote(Coordinator)
                .options(num_cpus=0, max_concurrency=THREADS)
                .remote(
                    config.model_dump(mode="json"),
                    cluster,
                    prompts,
                    held_out,
                    board,
                    transport.worker_extension,
                )
            )
            try:
                # Engines and training workers start side by side; the first push of weights waits for the engines.
                coordinator.start.remote()
                train_on_workers(config, cluster, LOOP, board=board, handles={"coordinator": coordinator})
            finally:
                ray.get(coordinator.close.remote(), timeout=60)
    tell_end(config, console, seconds=time.monotonic() - started)


def refuse_unusable(config: Config) -> None:
    """Check what can be checked before anything is loaded or started.

    Raises:
        ValueError: names the key.
    """
    if config.online is None:
        raise ValueError("online: this command needs an online section (prompts, rounds, judge, ...)")
    build_loss(config.loss)
    bind_optimizer(config.optim)
    build_judge(config.online.judge)
    build_selector(config.online.select)
    build_transport(config, on_gpus=config.online.sync.use in BETWEEN_GPUS)
    refuse_unusable_model(config.model, tensor_parallel=config.shard.tensor_parallel)


def build_transport(config: Config, *, on_gpus: bool) -> WeightSync:
    """The configured transport; ``auto`` decided by what the cluster has.

    Raises:
        ValueError: it needs GPUs that are not there or not shared, or its arguments are wrong.
    """
    assert config.online is not None
    sync, shared = config.online.sync, config.cluster.share_gpus
    if sync.use in BETWEEN_GPUS and not on_gpus:
        raise ValueError(
            f"online.sync.use: {sync.use} moves weights between GPUs and the cluster has none; set auto or object_store"
        )
    if sync.use == "object_store" and shared and on_gpus:
        raise ValueError("online.sync.use: object_store is not for cluster.share_gpus on GPUs; set auto or ipc")
    on_cards = "ipc" if shared else "nccl"
    use = (on_cards if on_gpus else "object_store") if sync.use == "auto" else sync.use
    return build(use, sync.args, TRANSPORTS, "sync", dtype=config.model.dtype)


def open_prompts(config: Config, sources: Sequence[str], key: str, console: Console) -> list[Prompt]:
    """The usable prompts of ``sources``; says what was left out and why.

    Raises:
        ValueError: a source cannot be read, no prompt is usable, or ``data.strict`` and one was left out.
    """
    if not sources:
        return []
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    limit = config.data.max_prompt_tokens
    kept: list[Prompt] = []
    problems: list[Problem] = []
    for record in read_prompts(sources):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        tokens = len(render_prompt(record.messages, tokenizer))
        if limit is not None and tokens > limit:
            detail = f"{tokens} tokens; data.max_prompt_tokens is {limit}"
            problems.append(Problem("prompt_too_long", record.source, record.number, detail))
        else:
            kept.append(Prompt(len(kept), record.messages))
    console.print(
        f"{key}: {len(kept) + len(problems)} records read, {len(kept)} kept, {len(problems)} dropped", highlight=False
    )
    for problem in problems[:3]:
        console.print(
            f"  {problem.reason}: {problem.source}:{problem.number} ({problem.detail})", highlight=False, markup=False
        )
    if not kept:
        raise ValueError(f"{key}: no usable prompt in {', '.join(sources)}")
    if problems and config.data.strict:
        raise ValueError(f"{key}: data.strict is true and {len(problems)} records were dropped")
    return kept


class CoordinatorRounds:
    """The Rounds of one training rank, asked of the coordinator.

    Args:
        shared: whether engines use this rank's GPU while it waits for them.
    """

    def __init__(self, coordinator: Any, rank: int, *, shared: bool) -> None:
        self.coordinator, self.rank, self.shared = coordinator, rank, shared

    def take(self, round: int) -> RoundData:
        """The pairs of a round."""
        self._make_room()
        return ray.get(self.coordinator.take.remote(round))

    def held_out(self, version: int) -> Sequence[TokenSample]:
        """Completions of the held-out prompts."""
        self._make_room()
        return ray.get(self.coordinator.held_out.remote(version))

    def scored(self, version: int, policy: np.ndarray, reference: np.ndarray | None) -> None:
        """Hand the log-probabilities over, once."""
        if self.rank == 0:
            ray.get(self.coordinator.scored.remote(version, policy, reference))

    def _make_room(self) -> None:
        if self.shared:
            release_unused()
            dist.barrier()


def loop(config: Config, device: torch.device, reporter: RunReporter, handles: dict[str, Any]) -> Ending:
    """What one rank runs."""
    assert config.online is not None
    coordinator, rank = handles["coordinator"], ray.train.get_context().get_world_rank()
    on_gpus = device.type == "cuda"
    shared = on_gpus and config.cluster.share_gpus
    sync = build_transport(config, on_gpus=on_gpus)
    if shared:
        ray.get(coordinator.seat.remote(_seats()))
    receiver = PoolReceiver(
        coordinator,
        config.online.sync_timeout_s,
        workers_per_engine=config.cluster.gpus_per_engine if on_gpus else 1,
        replays=sync.replays,
    )
    sync.connect(receiver if rank == 0 else None)
    rounds = CoordinatorRounds(coordinator, rank, shared=shared)
    try:
        return train_online(config, rounds=rounds, sync=sync, device=device, reporter=reporter)
    finally:
        sync.close()


def _seats() -> list[Seat]:
    """The GPUs of all ranks. A collective."""
    here = ray.get_runtime_context()
    (gpu,) = here.get_accelerator_ids()["GPU"]
    seats: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seats, Seat(here.get_node_id(), str(gpu)))
    return seats
