"""The data of an offline run: tokenised by all nodes, opened by every worker, reported to the person who started it."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from dpo_ray.config import Config
from dpo_ray.data.report import DataReportBuilder
from dpo_ray.data.sources import Part
from dpo_ray.data.store import PairStore, Prepare, RunParts, prepare_pairs
from dpo_ray.data.tokenize import load_tokenizer
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.display import live_display
from dpo_ray.launch.run_dir import has_work, make_run_dir
from dpo_ray.launch.status import StatusActor
from dpo_ray.storage import storage_errors

PART_TIMEOUT_S = 1800.0
"""Longest wait for the next part of the data, the wait for a free CPU included."""
PARTS_PER_PROCESS = 16
AHEAD = 2
"""Parts handed to the cluster for each of its CPUs, so that none waits for the driver."""


def prepare_data(config: Config, cluster: Cluster, console: Console) -> None:
    """Prepare the data on the cluster, print the report and keep it in the run directory.

    Raises:
        ValueError: the data cannot be used.
        TimeoutError: the cluster does not get on with it.
    """
    status = StatusActor()
    status.phase("tokenising", 0, 0)
    with live_display(status.read, title=config.run.name, rounds=None, console=console):
        pairs, held_out = open_pairs(
            config, run_parts=partial(tokenize_on_cluster, cluster), on_progress=partial(status.phase, "tokenising")
        )
    run_dir = make_run_dir(config)
    stores = {"data.train": pairs} | ({"data.eval": held_out} if held_out else {})
    for name, store in stores.items():
        console.print(store.report.text(name), highlight=False, markup=False, soft_wrap=True)
    told = {name: {**store.report.to_dict(), "digest": store.digest} for name, store in stores.items()}
    file = run_dir / "data.json"
    with storage_errors(run_dir):
        _validate_same_pairs(file, pairs)
        file.write_text(json.dumps(told, indent=1), encoding="utf-8")


def _validate_same_pairs(file: Path, pairs: PairStore) -> None:
    """Raise a ValueError where the run was begun with other training pairs from the same places."""
    begun = json.loads(file.read_text(encoding="utf-8")) if file.exists() and has_work(file.parent) else {}
    before = begun.get("data.train", {}).get("digest", pairs.digest)
    if before != pairs.digest:
        raise ValueError(
            f"data.train: {', '.join(pairs.sources)} no longer gives the pairs that {file.parent} was begun with: a "
            "source or the tokenizer has changed; give the run another run.name, or remove its directory to begin again"
        )


def open_pairs(
    config: Config, *, run_parts: RunParts = map, on_progress: Callable[[int, int], None] | None = None
) -> tuple[PairStore, PairStore | None]:
    """The tokenised training pairs and held-out pairs; prepared where no one did before."""
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    prepare = partial(
        prepare_pairs,
        tokenizer=tokenizer,
        data_config=config.data,
        folder=config.reference.cache_path / "data",
        run_parts=run_parts,
        on_progress=on_progress,
    )
    pairs = prepare(config.data.train)
    for source, size in zip(config.data.train, pairs.sizes, strict=True):
        if config.data.weights and not size:
            raise ValueError(f"data.weights: {source} has a weight and no pair that can be used (see data.limit)")
    return pairs, prepare(config.data.eval, kind="eval") if config.data.eval else None


def tokenize_on_cluster(
    cluster: Cluster, prepare: Prepare, parts: Sequence[tuple[int, Part]]
) -> Iterator[DataReportBuilder]:
    """Apply ``prepare`` to every part as tasks of the cluster; a single part is not worth a process and runs here."""
    if len(parts) < 2:
        yield from map(prepare, parts)
        return
    shared = ray.put(prepare)
    # Each task unpickles a tokenizer of its own, whose memory does not all come back: processes are replaced in time.
    task: Any = ray.remote(num_cpus=1, max_retries=3, max_calls=PARTS_PER_PROCESS)(_prepare)
    waiting = iter(parts)
    running = deque(task.remote(shared, part) for part in islice(waiting, AHEAD * cluster.cpus))
    while running:
        try:
            yield ray.get(running.popleft(), timeout=PART_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(
                f"waited {PART_TIMEOUT_S / 60:.0f} min for the cluster to tokenise a part of the data; "
                "are all its CPUs taken by other jobs?"
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        running.extend(task.remote(shared, part) for part in islice(waiting, 1))


def _prepare(prepare: Prepare, part: tuple[int, Part]) -> DataReportBuilder:
    return prepare(part)
