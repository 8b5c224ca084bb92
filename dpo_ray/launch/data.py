"""The data of a run: tokenized on all nodes, reported by the driver, opened by every worker."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import ray
from rich.console import Console

from dpo_ray.config import Config
from dpo_ray.config.resume import has_work
from dpo_ray.data.examples import load_prompts
from dpo_ray.data.formats import Part
from dpo_ray.data.loader import checked_gaps
from dpo_ray.data.report import DataReportBuilder
from dpo_ray.data.store import PairStore, Prepare, RunParts, prepare_pairs
from dpo_ray.data.tokenize import load_record_tokenizer
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.run_dir import make_run_dir
from dpo_ray.launch.status import StatusActor
from dpo_ray.report.live.display import live_display
from dpo_ray.rollout.judges import columns_by_judge, validate_columns
from dpo_ray.rollout.rounds import digest_of_prompts, validate_round_size
from dpo_ray.storage import storage_errors, write_atomically
from dpo_ray.types import Prompt

PART_TIMEOUT_S = 1800.0
"""Longest wait for the next part of the data, including the wait for a free CPU."""
PARTS_PER_PROCESS = 16
PARTS_PER_CPU = 2
"""Parts submitted per CPU of the cluster, so that no CPU waits for the driver."""


class PairData(NamedTuple):
    """The pairs of a run, on disk."""

    pairs: int
    """Number of training pairs."""
    digests: dict[str, str]
    """Digests of the training and held-out pairs, by key."""


class PromptData(NamedTuple):
    """The prompts of an online run."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    digests: dict[str, str]
    """Digests of the prompts and of the pairs that are mixed into rounds, by key."""


def prepare_data(
    config: Config, cluster: Cluster, console: Console, *, recorded: Mapping[str, str] | None = None
) -> PairData:
    """Tokenizes the pairs on the cluster; prints the data report and saves it in the run directory.

    Args:
        recorded: digests that the data must have, by key; None is that of the training pairs of the run that this one
            resumes.

    Raises:
        ValueError: the data cannot be used.
        TimeoutError: the cluster makes no progress.
    """
    status = StatusActor()
    status.phase("tokenizing", 0, 0)
    with live_display(status.read, title=config.run.name, rounds=None, console=console):
        pairs, held_out = open_pairs(
            config, run_parts=partial(tokenize_on_cluster, cluster), on_progress=partial(status.phase, "tokenizing")
        )
    run_dir = make_run_dir(config)
    stores = {"data.train": pairs} | ({"data.eval": held_out} if held_out else {})
    for name, store in stores.items():
        console.print(store.report.text(name), soft_wrap=True)
    reports = {name: {**asdict(store.report), "digest": store.digest} for name, store in stores.items()}
    digests = {name: store.digest for name, store in stores.items()}
    file = run_dir / "data.json"
    with storage_errors(run_dir):
        _validate_same_data(config, digests, _digest_of_run(file) if recorded is None else recorded)
        write_atomically(file, json.dumps(reports, indent=1))
    return PairData(len(pairs), digests)


def _digest_of_run(file: Path) -> dict[str, str]:
    """The digest of the training pairs in ``data.json``, if a run would resume from its directory."""
    reports = json.loads(file.read_text(encoding="utf-8")) if file.exists() and has_work(file.parent) else {}
    return {name: report["digest"] for name, report in reports.items() if name == "data.train" and "digest" in report}


def _validate_same_data(config: Config, digests: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """Raises a ValueError if a run or sweep was started with other pairs or prompts from the same sources."""
    for key, digest in digests.items():
        if recorded.get(key, digest) != digest:
            section, name = key.split(".")
            sources, kind = getattr(getattr(config, section), name), "pairs" if section == "data" else "prompts"
            raise ValueError(
                f"{key}: {', '.join(sources)} no longer has the {kind} that {config.run.path} was started with: a "
                "source, the tokenizer or the version of dpo_ray has changed; set another run.name, or remove the "
                "directory to start over"
            )


def open_pairs(
    config: Config, *, run_parts: RunParts = map, on_progress: Callable[[int, int], None] | None = None
) -> tuple[PairStore, PairStore | None]:
    """The tokenized training and held-out pairs; tokenizes those that are not in the cache."""
    prepare = partial(
        prepare_pairs,
        tokenizer=load_record_tokenizer(config),
        folder=config.reference.cache_path / "data",
        run_parts=run_parts,
        on_progress=on_progress,
    )
    pairs = prepare(config.data.train)
    for source, size in zip(config.data.train, pairs.sizes, strict=True):
        if config.data.weights and not size:
            raise ValueError(f"data.weights: {source} has a weight but no usable pair (see data.limit)")
    if config.loss.weighting == "gap":
        checked_gaps(pairs)
    return pairs, prepare(config.data.eval, kind="eval") if config.data.eval else None


def tokenize_on_cluster(
    cluster: Cluster, prepare: Prepare, parts: Sequence[tuple[int, Part]]
) -> Iterator[DataReportBuilder]:
    """Applies ``prepare`` to every part as a Ray task; a single part is processed here, faster than a task starts."""
    if len(parts) < 2:
        yield from map(prepare, parts)
        return
    prepare_ref = ray.put(prepare)
    # Each task unpickles a tokenizer, whose memory is not fully released: processes are replaced after a few parts.
    task: Any = ray.remote(num_cpus=1, max_retries=3, max_calls=PARTS_PER_PROCESS)(_prepare)
    waiting = iter(parts)
    running = deque(task.remote(prepare_ref, part) for part in islice(waiting, PARTS_PER_CPU * cluster.cpus))
    while running:
        try:
            yield ray.get(running.popleft(), timeout=PART_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(
                f"the cluster did not tokenize a part of the data in {PART_TIMEOUT_S / 60:.0f} min; "
                "do other jobs use all of its CPUs?"
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        running.extend(task.remote(prepare_ref, part) for part in islice(waiting, 1))


def _prepare(prepare: Prepare, part: tuple[int, Part]) -> DataReportBuilder:
    return prepare(part)


def prepare_prompts(
    config: Config, sources: Sequence[str], key: str, console: Console, *, answers: bool = False
) -> list[Prompt]:
    """The usable prompts of ``sources``; prints a report of the records read, kept and dropped.

    Args:
        answers: with the records' own answers, see ``load_prompts``.

    Raises:
        ValueError: a source cannot be read, no prompt is usable, or one is dropped and ``data.strict`` is set.
    """
    if not sources:
        return []
    tokenizer = load_record_tokenizer(config)
    prompts, report = load_prompts(sources, tokenizer, strict=config.data.strict, name=key, answers=answers)
    console.print(report.text(key), highlight=False, markup=False, soft_wrap=True)
    return prompts


def prepare_round_data(
    config: Config, cluster: Cluster, console: Console, *, recorded: Mapping[str, str] | None = None
) -> PromptData:
    """The prompts of the rounds and the held-out ones; tokenizes the pairs that are mixed into rounds.

    Args:
        recorded: as for ``prepare_data``, also for the prompts.

    Raises:
        ValueError: see ``prepare_prompts``; or there are fewer prompts than a round takes, or none has a column that a
            judge needs.
    """
    assert config.online is not None
    answers = config.online.source.use == "self_play"
    prompts = prepare_prompts(config, config.online.prompts, "online.prompts", console, answers=answers)
    held_out = prepare_prompts(config, config.online.eval_prompts, "online.eval_prompts", console)
    validate_round_size(prompts, config.online.prompts_per_round)
    validate_columns(config.online, columns_by_judge(prompts, held_out))
    digests = {"online.prompts": digest_of_prompts(prompts)}
    if held_out:
        digests["online.eval_prompts"] = digest_of_prompts(held_out)
    _validate_same_data(config, digests, recorded or {})
    if config.online.source.mix:
        digests |= prepare_data(config, cluster, console, recorded=recorded).digests
    return PromptData(prompts, held_out, digests)
