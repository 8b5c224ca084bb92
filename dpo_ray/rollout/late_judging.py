"""Judging a complete round: for scores that only the training workers can compute."""

import json
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ray.rollout.open_round import FAILED, Line, Outcome, line_of, read_lines, to_json
from dpo_ray.rollout.pair_index import PairIndex, memory_map
from dpo_ray.rollout.pipeline import FailureLimit, Select
from dpo_ray.rollout.selectors.preferences import Choice
from dpo_ray.rollout.tally import Tally
from dpo_ray.storage import write_atomically
from dpo_ray.types import Completion, CompletionGroup, Dropped, Judgement, Prompt, TokenSample


class RoundSamples:
    """All completions of a round, in the order of its lines, memory-mapped: a ``SampleSource``."""

    def __init__(self, folder: Path) -> None:
        self._tokens = memory_map(folder / "tokens.i32", np.int32)
        spans = array("q")
        for line in read_lines(folder / "pairs.jsonl"):
            start, prompt = line["tokens"]["start"], line["tokens"]["prompt"]
            lengths = [candidate["tokens"] for candidate in line["candidates"]]
            for position, length in zip(accumulate(lengths, initial=start + prompt), lengths, strict=False):
                spans.extend((start, prompt, position, length))
        self._spans = np.array(spans, np.int64).reshape(-1, 4)

    @property
    def lengths(self) -> np.ndarray:
        """(n, 2) tokens of prompt and completion."""
        return self._spans[:, 1::2]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> TokenSample:
        spans = self._spans[index].reshape(2, 2).tolist()
        return TokenSample(*(tuple(self._tokens[start : start + length].tolist()) for start, length in spans))


def judge_round(folder: Path, scores: Sequence[float], select: Select, *, max_failed_share: float) -> None:
    """Write the scores of all completions of a round, and the pairs that follow from them, into its files.

    May be repeated if it was interrupted: the manifest is written last. One group at a time is in memory.

    Args:
        scores: one per completion, in the order of ``RoundSamples``.
        max_failed_share: see ``OnlineConfig``; of the groups that were generated.

    Raises:
        TooManyFailed: the selector raised over more groups.
    """
    file, tally, pairs, remaining = folder / "manifest.json", Tally(), PairIndex(), iter(scores)
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    limit = FailureLimit(int(folder.name), manifest["counts"].get("prompts", 0), max_failed_share)

    def judged_lines() -> Iterator[Line]:
        for line, group in _groups(folder):
            if group.completions:
                judgement = Judgement(tuple(next(remaining) for _ in group.completions))
                choice, error = _selected(select, group, judgement)
                outcome = Outcome(group.prompt, line["position"], choice, group, judgement, error)
                limit.count(outcome)
                line = line_of(outcome, line["tokens"]["start"])
            tally.add(line)
            pairs.add(line)
            yield line

    write_atomically(folder / "pairs.jsonl", (to_json(line) + "\n" for line in judged_lines()))
    pairs.write(folder)
    counts = {**manifest["counts"], **tally.all_counts()}
    manifest |= {"judged": True, "counts": counts, "scores": tally.mean_scores(), "judge": tally.judging()}
    write_atomically(file, to_json(manifest, indent=2) + "\n")


def _selected(select: Select, group: CompletionGroup, judgement: Judgement) -> tuple[Choice, str | None]:
    """The pairs of a group, or why there are none; an exception is an outcome of its group."""
    try:
        return select(group, judgement.scores), None
    except Exception as error:
        return Dropped(f"{FAILED}select"), f"{type(error).__name__}: {error}"


def _groups(folder: Path) -> Iterator[tuple[Line, CompletionGroup]]:
    """The lines of a round with their groups; a group that failed has no completions."""
    tokens = memory_map(folder / "tokens.i32", np.int32)
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
