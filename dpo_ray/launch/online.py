"""``jobs.online``: engines, judge and training workers on one cluster, round after round."""

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from rich.console import Console

from dpo_ray.config import Config, with_absolute_paths
from dpo_ray.data.records import Problem, read_prompts
from dpo_ray.data.tokenize import ChatTemplateError, load_tokenizer, render_prompt
from dpo_ray.launch.cluster import Cluster, same_node
from dpo_ray.launch.display import live_display
from dpo_ray.launch.follower import follow_run
from dpo_ray.launch.offline import validate_training
from dpo_ray.launch.rollouts.coordinator import SPARE_THREADS, Coordinator
from dpo_ray.launch.rollouts.push import BETWEEN_GPUS, build_transport
from dpo_ray.launch.run_dir import make_run_dir
from dpo_ray.launch.status import start_status_actor
from dpo_ray.launch.summary import print_summary
from dpo_ray.launch.workers import train_on_workers
from dpo_ray.rollout.judges import build_judge
from dpo_ray.rollout.selectors import build_selector
from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)

LOOP = "dpo_ray.launch.loops:online"
CLOSE_TIMEOUT_S = 60.0


def run_online(config: Config, cluster: Cluster) -> None:
    """Train in rounds, from a configuration to a report.

    Raises:
        ValueError: the configuration, the prompts or the cluster cannot be used.
        TrainingFailed: the workers or the engines failed.
    """
    console = Console()
    config = with_absolute_paths(config)
    validate_online(config)
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
    transport = build_transport(config, on_gpus=cluster.on_gpus)
    status_actor = start_status_actor()
    title = f"{config.run.name}: {config.online.rounds} rounds of {config.online.prompts_per_round} prompts"
    with (
        live_display(
            lambda: ray.get(status_actor.read.remote(), timeout=5),
            title=title,
            rounds=config.online.rounds,
            console=console,
        ),
        follow_run(config, partial(console.print, highlight=False, markup=False, soft_wrap=True)),
    ):
        coordinator: Any = (
            ray.remote(Coordinator)
            .options(
                num_cpus=0,
                max_concurrency=config.cluster.train_workers + SPARE_THREADS,
                scheduling_strategy=same_node(),
            )
            .remote(
                config.model_dump(mode="json"),
                cluster,
                prompts,
                held_out,
                status_actor,
                transport.worker_extension,
            )
        )
        try:
            # Engines and training workers start side by side; the first push of weights waits for the engines.
            coordinator.start.remote()
            train_on_workers(config, cluster, LOOP, status_actor=status_actor, handles={"coordinator": coordinator})
        finally:
            _close(coordinator)
    print_summary(config, console, seconds=time.monotonic() - started)


def _close(coordinator: Any) -> None:
    """Take engines and judge down. What comes of that must not hide how the run ended."""
    try:
        ray.get(coordinator.close.remote(), timeout=CLOSE_TIMEOUT_S)
    except Exception as error:
        logger.warning("the engines could not be asked to end: %s", error)


def validate_online(config: Config) -> None:
    """Check what can be checked before anything is loaded or started.

    Raises:
        ValueError: names the key.
    """
    assert config.online is not None
    validate_training(config)
    build_judge(config.online.judge)
    build_selector(config.online.select)
    build_transport(config, on_gpus=config.online.sync.use in BETWEEN_GPUS)


def open_prompts(config: Config, sources: Sequence[str], key: str, console: Console) -> list[Prompt]:
    """The usable prompts of ``sources``; says what was left out and why.

    Raises:
        ValueError: a source cannot be read, no prompt is usable, or ``data.strict`` and one was left out.
    """
    if not sources:
        return []
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    assert config.online is not None
    limit = config.max_model_len - config.online.sampling.max_tokens
    says = "online.engine.max_model_len less online.sampling.max_tokens"
    if config.data.max_prompt_tokens is not None and config.data.max_prompt_tokens <= limit:
        limit, says = config.data.max_prompt_tokens, "data.max_prompt_tokens"
    kept: list[Prompt] = []
    problems: list[Problem] = []
    for record in read_prompts(sources):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        try:
            tokens = len(render_prompt(record.messages, tokenizer))
        except ChatTemplateError as error:
            problems.append(Problem("template_refused", record.source, record.number, str(error)))
            continue
        if tokens > limit:
            detail = f"{tokens} tokens; {says} is {limit}"
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
