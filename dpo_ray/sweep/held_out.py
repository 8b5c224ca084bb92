"""Results of evaluations by held-out pair or prompt: they pair trials for a comparison.

Offline runs write ``heldout.npz``, and trials of a sweep also ``heldout-STEP.npz`` of each evaluation. These have
``step``, ``pairs`` (digest of the store) and, with one value per pair in the store's order, ``loss``, ``margin``,
``chosen_log_ratio`` and ``rejected_log_ratio`` in nats, and ``correct`` (1 if the margin is positive, else 0, as
``rewards/accuracies`` counts). Online runs have the scores of their prompts in ``evaluations/VERSION.jsonl``.
"""

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dpo_ray.storage import read_jsonl, storage_errors, write_atomically
from dpo_ray.types import PAIR_RESULTS

FILE = "heldout.npz"
COLUMNS = {"eval/rewards/accuracies": "correct", "eval/loss": "loss", "eval/rewards/margins": "margin"}
"""Column of ``heldout.npz`` whose mean is the metric."""
SCORE = "heldout/score"
"""Metric that is the mean of the scores of held-out prompts."""

Unit = Literal["pairs", "completions", "prompts"]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The values, one per held-out example, whose mean is a metric."""

    values: np.ndarray
    """(n,) float64."""
    names: np.ndarray
    """(n,) identifies the examples within their set, in ascending order."""
    examples: Unit
    set: str = ""
    """Digest of the held-out set; values of different sets cannot be paired."""


def file_of(step: int) -> str:
    """Name of the file that keeps the results of a step."""
    return f"heldout-{step:06d}.npz"


def write_pair_results(run_dir: Path, results: np.ndarray, *, step: int, pairs: str, keep: bool = False) -> None:
    """Writes ``heldout.npz`` atomically.

    Args:
        results: (n, 4) in the order of PAIR_RESULTS.
        step: optimizer step of the evaluated policy.
        pairs: digest of the held-out pairs.
        keep: write a second file, which later evaluations leave alone.
    """
    columns = dict(zip(PAIR_RESULTS, results.T, strict=True))
    margin, file = columns["margin"], io.BytesIO()
    np.savez(file, step=step, pairs=pairs, correct=np.where(margin > 0, 1.0, 0.0), **columns)
    with storage_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (FILE, file_of(step)) if keep else (FILE,):
            write_atomically(run_dir / name, file.getvalue())


def read_held_out(run_dir: Path, metric: str, *, step: int | None = None, version: int | None = None) -> HeldOut | None:
    """The values behind a metric of an evaluation of a run.

    Args:
        metric: a key of COLUMNS, or SCORE.
        step: step that the metric was reported at, offline; None is the latest evaluation.
        version: policy version that it was reported at, online; None is the newest.

    Returns:
        None if the metric is not a mean over held-out examples, or if there is no readable file of that evaluation, as
        after a kill between writing and reporting it.
    """
    if metric == SCORE:
        return _read_scores(run_dir, version)
    if metric not in COLUMNS:
        return None
    latest = _read_pairs(run_dir / FILE, COLUMNS[metric], step)
    return latest or (_read_pairs(run_dir / file_of(step), COLUMNS[metric], step) if step is not None else None)


def _read_pairs(path: Path, column: str, step: int | None) -> HeldOut | None:
    try:
        with np.load(path) as file:
            if step is not None and int(file["step"]) != step:
                return None
            values, one_sided = file[column], np.isnan(file["chosen_log_ratio"]) != np.isnan(file["rejected_log_ratio"])
            examples: Unit = "completions" if one_sided.any() else "pairs"
            return HeldOut(values, np.arange(len(values)), examples, str(file["pairs"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def evaluation_files(run_dir: Path) -> dict[int, Path]:
    """The files of the evaluations of an online run by policy version, in order."""
    files = {int(file.stem): file for file in (run_dir / "evaluations").glob("*.jsonl") if file.stem.isdigit()}
    return dict(sorted(files.items()))


def _read_scores(run_dir: Path, version: int | None) -> HeldOut | None:
    """Scores of a version, or of the newest; prompts without a score are left out."""
    files = evaluation_files(run_dir)
    file = files.get(max(files, default=0) if version is None else version)
    if file is None:
        return None
    scores = {
        json.dumps([line.get("prompt_index"), line["prompt"]], sort_keys=True): float(line["score"])
        for line in read_jsonl(file)
        if line.get("score") is not None
    }
    names = sorted(scores)
    return HeldOut(np.array([scores[name] for name in names]), np.array(names), "prompts")


def paired(first: HeldOut, second: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """The values of both on their common examples; empty for examples of different sets."""
    if first.set != second.set:
        return np.zeros(0), np.zeros(0)
    _, of_first, of_second = np.intersect1d(first.names, second.names, assume_unique=True, return_indices=True)
    return first.values[of_first], second.values[of_second]


def mean_held_out(repeats: list[HeldOut]) -> HeldOut | None:
    """The mean over repeats of the values on their common examples; None if there is no common one."""
    mean, *others = repeats
    total = mean.values
    for other in others:
        total, more = paired(HeldOut(total, mean.names, mean.examples, mean.set), other)
        total, mean = total + more, HeldOut(total, np.intersect1d(mean.names, other.names), mean.examples, mean.set)
    return HeldOut(total / len(repeats), mean.names, mean.examples, mean.set) if len(total) else None
