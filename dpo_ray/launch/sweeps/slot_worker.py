"""A slot as its workers run it: one trial after another in the same processes. Imported by training workers only.

A process imports torch, joins its process group and loads the model once. Trials share pairs and reference.
"""

import ray.train
import torch
import torch.distributed as dist

from dpo_ray.config import Config
from dpo_ray.data.store import PairStore
from dpo_ray.launch.data import open_pairs
from dpo_ray.launch.loops import online
from dpo_ray.launch.reporter import TrialReporter
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.launch.sweeps.mailbox import Channel, Task
from dpo_ray.launch.workers import describe_cause, is_retryable
from dpo_ray.parallel.collectives import broadcast_from_rank0
from dpo_ray.train.offline import train_offline
from dpo_ray.train.shared import SharedParts, release_memory

Pairs = tuple[PairStore, PairStore | None]


def run_trials(channel: Channel, device: torch.device) -> None:
    """Runs trials until there are no more."""
    rank = ray.train.get_context().get_world_rank()
    pairs: dict[str, Pairs] = {}
    shared = SharedParts()
    while (task := _next_task(channel)).trial:
        config = Config.model_validate(task.config)
        log_to_run(config.run.path, f"worker-{rank}")
        try:
            _run_trial(config, task, channel, rank, device, pairs, shared)
        except Exception as error:
            # Other workers may wait in a collective: the error ends the whole group, and Ray Train starts it again.
            alone = dist.is_initialized() and dist.get_world_size() == 1
            channel.ask("failed", task.trial, (describe_cause(error), is_retryable(error)))
            if not alone or is_retryable(error):  # after an error of the device, the process is of no use
                raise
            shared.clear()
        # No variable may keep an error: its traceback keeps the model and the batch of the trial.
        release_memory()


def _next_task(channel: Channel) -> Task:
    """The next trial, the same on every rank; waits in turns, so that no collective times out."""
    message = channel.message("idle")
    answer = None
    while answer is None:
        answer = broadcast_from_rank0(lambda: channel.ask_once(message))
    return Task(*answer)


def _run_trial(
    config: Config,
    task: Task,
    channel: Channel,
    rank: int,
    device: torch.device,
    opened: dict[str, Pairs],
    shared: SharedParts,
) -> None:
    rounds = config.online.rounds if config.online is not None else None
    reporter = TrialReporter(config.run.path, channel, task.trial, rank, rounds=rounds)
    if config.online is not None:
        online(config, device, reporter, task.rollouts, shared=shared)
    else:
        pairs, held_out = _shared_pairs(config, opened)
        train_offline(config, pairs=pairs, held_out=held_out, device=device, reporter=reporter, shared=shared)
    if rank == 0:
        channel.ask("paused" if reporter.decision == "pause" else "finished", task.trial)


def _shared_pairs(config: Config, opened: dict[str, Pairs]) -> Pairs:
    """The pairs of a trial; trials with equal settings share them."""
    key = repr((config.data, config.model.path, config.model.chat_template, config.loss.examples))
    if key not in opened:
        opened[key] = open_pairs(config)
    return opened[key]
