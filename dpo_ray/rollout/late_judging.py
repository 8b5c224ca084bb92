"""Judging a complete round: for scores that only the training workers can compute."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ray.rollout.open_round import FAILED, Line, Outcome, line_of, read_lines, to_json
from dpo_ray.rollout.pair_index import PairIndex
from dpo_ray.rollout.pipeline import FailureLimit, Select
from dpo_ray.rollout.selectors.preferences import Choice
from dpo_ray.rollout.tally import Tally
from dpo_ray.storage import write_atomically
from dpo_ray.types import Completion, CompletionGroup, Dropped, Judgement, Prompt, TokenSample


def samples_of(folder: Path) -> list[TokenSample]:
    """All completions of a round, in the order of its lines."""
    samples: list[TokenSample] = []
    for _, group in _groups(folder):
        samples += [TokenSample(group.prompt.token_ids, c.token_ids) for c in group.completions]
    return samples


def judge_round(folder: Path, scores: Sequence[float], select: Select, *, max_failed_share: float) -> None:
    """Write the scores of all completions of a round, and the pairs that follow from them, into its files.

    May be repeated if it was interrupted: the manifest is written last.

    Args:
        scores: one per completion, in the order of ``samples_of``.
        max_failed_share: see ``OnlineConfig``; of the groups that were generated.

    Raises:
        TooManyFailed: the selector raised over more groups.
    """
    tally, pairs, lines = Tally(), PairIndex(), list[Line]()
    remaining, groups = iter(scores), list(_groups(folder))
    limit = FailureLimit(int(folder.name), len(groups), max_failed_share)
    for line, group in groups:
        if group.completions:
            judgement = Judgement(tuple(next(remaining) for _ in group.completions))
            choice, error = _selected(select, group, judgement)
            outcome = Outcome(group.prompt, line["position"], choice, group, judgement, error)
            limit.count(outcome)
            line = line_of(outcome, line["tokens"]["start"])
        tally.add(line)
        lines.append(line)
        pairs.add(line)
    file = folder / "manifest.json"
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    counts = {**manifest["counts"], **tally.all_counts()}
    manifest |= {"judged": True, "counts": counts, "scores": tally.mean_scores(), "judge": tally.judging()}
    write_atomically(folder / "pairs.jsonl", (to_json(line) + "\n" for line in lines))
    pairs.write(folder)
    write_atomically(file, to_json(manifest, indent=2) + "\n")


def _selected(select: Select, group: CompletionGroup, judgement: Judgement) -> tuple[Choice, str | None]:
    """The pairs of a group, or why there are none; an exception is an outcome of its group."""
    try:
        return select(group, judgement.scores), None
    except Exception as error:
        return Dropped(f"{FAILED}select"), f"{type(error).__name__}: {error}"


def _groups(folder: Path) -> Iterator[tuple[Line, CompletionGroup]]:
    """The lines of a round with their groups; a group that failed has no completions."""
    path = folder / "tokens.i32"
    tokens = np.memmap(path, np.int32, "r") if path.stat().st_size else np.empty(0, np.int32)
    for line in read_lines(folder / "pairs.jsonl"):
        start = line["tokens"]["start"]
        ends = np.cumsum([start, line["tokens"]["prompt"], *(c["tokens"] for c in line["candidates"])]).tolist()
        prompt_ids, *completion_ids = (tuple(tokens[a:b].tolist()) for a, b in pairwise(ends))
        prompt = Prompt(line["prompt_index"], tuple(line["prompt"]), prompt_ids, line["fields"])
        completions = tuple(
            Completion(candidate["text"], ids, candidate["finished"], *candidate["versions"])
            for candidate, ids in zip(line["candidates"], completion_ids, strict=True)
        )
        yield line, CompletionGroup(prompt, completions, line["seed"] or 0)
