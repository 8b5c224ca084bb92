"""The ledger: ``rounds/NNNNNN/`` in the run directory, which grows group by group and is finished by its manifest.

    pairs.jsonl     one line per group, in the order in which they finished: prompt, texts, scores, pairs or the reason
                    for having none
    tokens.i32      token ids of prompts and completions; each line of pairs.jsonl has their position
    pairs.i64       positions of prompt, chosen and rejected of each pair in tokens.i32, in the order of the prompts
    manifest.json   counts and timings; written last and atomically

A round that was interrupted is continued: its groups are on disk. Training reads pairs from these files, memory-mapped,
so an uninterrupted run and a resumed one cannot differ, and a rank reads only the pairs that it trains on.
"""

import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from dpo_ray.storage import write_atomically
from dpo_ray.types import CompletionGroup, Dropped, Prompt, ScoredPair, TokenPair

if TYPE_CHECKING:
    from dpo_ray.data.loader import PairSource  # imports torch

_REMEDY = "delete the folder of this round to collect it again"
FAILED = "failed_"
"""Prefix of the reasons of groups that failed; they are collected again if their round is continued."""
LINE_KEYS = ("prompt", "prompt_index", "position", "tokens", "candidates", "scores", "pairs", "dropped", "seed")

Line = dict[str, Any]
"""One line of pairs.jsonl."""
to_json = partial(json.dumps, ensure_ascii=False, allow_nan=False, default=str)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a prompt in a round."""

    prompt: Prompt
    position: int
    """Position of the prompt in its round."""
    choice: tuple[ScoredPair, ...] | Dropped
    group: CompletionGroup | None = None
    """None if generating failed."""
    scores: tuple[float, ...] = ()
    """One per completion; NaN if the judge has none; empty if the group was not judged."""
    error: str | None = None
    """The error of a group that failed."""


class RoundPairs:
    """The pairs of a finished round, memory-mapped: a ``PairSource``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens = _memory_map(folder / "tokens.i32", np.int32)
        self._spans = _memory_map(folder / "pairs.i64", np.int64).reshape(-1, 6)

    @property
    def lengths(self) -> np.ndarray:
        """(n, 3) tokens of prompt, chosen and rejected."""
        return self._spans[:, 1::2]

    @property
    def members(self) -> np.ndarray | None:
        """(n, 3) positions of prompt, chosen and rejected; None if each pair has a prompt of its own."""
        starts = self._spans[:, 0::2]
        return starts if len(np.unique(starts[:, 0])) < len(starts) else None

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> TokenPair:
        prompt, chosen, rejected = (tuple(part.tolist()) for part in self._parts(index))
        return TokenPair(prompt, chosen, rejected)

    def tokens(self, index: int) -> np.ndarray:
        """Concatenated token ids of prompt, chosen and rejected."""
        return np.concatenate(self._parts(index))

    def name_of(self, index: int) -> str:
        """Round and position of the pair."""
        return f"round {int(self.folder.name)}[{index}]"

    def _parts(self, index: int) -> list[np.ndarray]:
        return [self._tokens[start : start + length] for start, length in self._spans[index].reshape(3, 2).tolist()]


@dataclass(frozen=True, slots=True)
class RoundData:
    """A finished round."""

    index: int
    pairs: "PairSource"
    policy_version: int
    """Oldest policy version that sampled a token of the round."""
    metrics: Mapping[str, float]
    """Judge scores, counts of kept and dropped groups, and timings."""


class Ledger:
    """The rounds of one run directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "rounds"

    def validate_prompts(self, digest: str, count: int) -> None:
        """Record the prompt set of the run, or check that it is the one recorded.

        Raises:
            ValueError: the run was started with other prompts: its next rounds would repeat some and miss others.
        """
        file = self.folder / "prompts.json"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, to_json({"digest": digest, "prompts": count}) + "\n")
            return
        recorded = json.loads(file.read_text(encoding="utf-8"))
        if recorded["digest"] != digest:
            raise ValueError(
                f"online.prompts: {count} usable prompts, which are not the {recorded['prompts']} that "
                f"{self.folder.parent} was started with: a source or the tokenizer has changed; restore it, set "
                "another run.name, or remove the directory to start over"
            )

    def path(self, round: int) -> Path:
        """The folder of a round."""
        return self.folder / f"{round:06d}"

    def finished(self, round: int) -> bool:
        """True if the round is complete on disk."""
        return all((self.path(round) / name).exists() for name in ("manifest.json", "pairs.i64"))

    def open(self, round: int, *, oldest: int) -> "OpenRound":
        """Open a round for appending, with the groups that an interrupted collection has left.

        Failed groups, and groups with a token of a policy version before ``oldest``, are dropped from it.
        """
        return OpenRound(self.path(round), oldest)

    def stale(self, round: int, *, oldest: int) -> bool:
        """True if a finished round has tokens of a policy version before ``oldest``."""
        return self.manifest(round)["policy_version"] < oldest

    def manifest(self, round: int) -> dict[str, Any]:
        """The manifest of a finished round; raises a ValueError if it is damaged."""
        file = self.path(round) / "manifest.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: damaged: {error}; {_REMEDY}") from None

    def lines(self, round: int) -> Iterator[Line]:
        """Yield the lines of a round's pairs.jsonl; raises a ValueError that names the first damaged line."""
        return _read_lines(self.path(round) / "pairs.jsonl")

    def read(self, round: int) -> RoundData:
        """A finished round for training.

        Raises:
            FileNotFoundError: the round is not finished.
            ValueError: a file is damaged, or does not match the manifest's counts.
        """
        manifest = self.manifest(round)
        pairs, counts = RoundPairs(self.path(round)), manifest["counts"]
        tokens = (self.path(round) / "tokens.i32").stat().st_size // 4
        if (len(pairs), tokens) != (counts["pairs"], counts["tokens_stored"]):
            raise ValueError(
                f"{self.path(round)}: damaged: {len(pairs)} pairs and {tokens} tokens, the manifest counted "
                f"{counts['pairs']} and {counts['tokens_stored']}; {_REMEDY}"
            )
        return RoundData(round, pairs, manifest["policy_version"], _metrics(manifest))

    def forget(self, *, before: int, keep: int | None) -> None:
        """Delete the token ids of all but the last ``keep`` rounds before ``before``, and their texts; None keeps all.

        Their manifests stay.
        """
        if keep is None:
            return
        for folder in self.folder.glob("[0-9]*"):
            if int(folder.name) < before - keep:
                for name in ("pairs.jsonl", "tokens.i32", "pairs.i64"):
                    (folder / name).unlink(missing_ok=True)


@dataclass(slots=True)
class _Tally:
    """Running counts of a round."""

    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    """Sums of scores, by what they are of, as are their counts in ``terms``."""
    terms: Counter[str] = field(default_factory=Counter)
    versions: Counter[int] = field(default_factory=Counter)
    """Completions by the policy version of their first token."""

    def add(self, line: Line) -> None:
        candidates, scores = line["candidates"], [score for score in line["scores"] if score is not None]
        texts = [candidate["text"] for candidate in candidates]
        self.counts.update(
            prompts=1,
            candidates=len(candidates),
            pairs=len(line["pairs"]),
            kept=bool(line["pairs"]),
            duplicates=len(texts) - len(set(texts)),
            empty=sum(not text.strip() for text in texts),
            bad_scores=len(line["scores"]) - len(scores),
            truncated=sum(not candidate["finished"] for candidate in candidates),
            tokens=sum(candidate["tokens"] for candidate in candidates),
        )
        if line["dropped"] is not None:
            self.dropped[line["dropped"]] += 1
        self.versions.update(candidate["versions"][0] for candidate in candidates)
        self._add_scores("mean", scores)
        for side in ("chosen", "rejected"):
            self._add_scores(side, [pair[f"{side}_score"] for pair in line["pairs"]])

    def _add_scores(self, name: str, scores: Sequence[float]) -> None:
        self.sums[name] += sum(scores)  # pyrefly: ignore  # a counter of floats
        self.terms[name] += len(scores)


class OpenRound:
    """A round that grows. One process appends; see ``Ledger.open``.

    Attributes:
        done: indices of the prompts that have a line.
        failed: number of groups that failed since the round was opened.
        stale: number of groups that were dropped as too old when the round was opened.
    """

    def __init__(self, folder: Path, oldest: int) -> None:
        self.folder, self.stale, self.failed = folder, 0, 0
        self.done: set[int] = set()
        self._oldest, self._generated = oldest, 0
        self._tally, self._spans = _Tally(), dict[int, list[list[int]]]()
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("manifest.json", "pairs.i64"):
            (folder / name).unlink(missing_ok=True)
        self._recover(oldest)
        self._lines: BinaryIO = (folder / "pairs.jsonl").open("ab", buffering=0)
        self._tokens: BinaryIO = (folder / "tokens.i32").open("ab", buffering=0)
        self._end = self._tokens.tell() // 4

    def append(self, outcome: Outcome) -> None:
        """Append the outcome of a prompt.

        Raises:
            ValueError: the prompt has a line already.
        """
        if outcome.prompt.index in self.done:
            raise ValueError(f"prompt {outcome.prompt.index} occurs twice in {self.folder}")
        ids = [outcome.prompt.token_ids, *(c.token_ids for c in outcome.group.completions)] if outcome.group else []
        line = _line(outcome, self._end)
        text = (to_json(line) + "\n").encode(errors="replace")  # half a surrogate pair cannot be encoded
        # Token ids first: a line whose tokens are missing would be a damaged file, tokens without a line are a gap.
        tokens = array("i", chain.from_iterable(ids))  # numpy takes four times as long for a tuple
        _write_all(self._tokens, tokens.tobytes())
        _write_all(self._lines, text)
        self._end += len(tokens)
        self._generated += sum(candidate["tokens"] for candidate in line["candidates"])
        self.failed += outcome.error is not None
        self._count(line)

    def finish(self, **values: Any) -> None:
        """Write pairs.i64 and the manifest, which has ``values`` beside counts, scores and policy versions."""
        spans = [span for position in sorted(self._spans) for span in self._spans[position]]
        (self.folder / "pairs.i64").write_bytes(np.array(spans, np.int64).tobytes())
        tally = self._tally
        means = {name: tally.sums[name] / terms if terms else None for name, terms in tally.terms.items()}
        counts = {**tally.counts, "dropped": dict(sorted(tally.dropped.items())), "stale": self.stale}
        manifest = {
            "round": int(self.folder.name),
            "policy_version": min(tally.versions, default=self._oldest),
            "policy_versions": {str(version): tally.versions[version] for version in sorted(tally.versions)},
            "counts": {**counts, "tokens_stored": self._end, "tokens_generated": self._generated},
            "scores": means,
            **values,
        }
        self.close()
        write_atomically(self.folder / "manifest.json", to_json(manifest, indent=2) + "\n")

    def close(self) -> None:
        """Write everything to the disk and close the files."""
        for file in (self._tokens, self._lines):
            if not file.closed:
                os.fsync(file.fileno())
                file.close()

    def _recover(self, oldest: int) -> None:
        """Count the lines of an interrupted collection; rewrite the file if some of them are unusable."""
        path, tokens = self.folder / "pairs.jsonl", self.folder / "tokens.i32"
        if not path.exists():
            tokens.unlink(missing_ok=True)
            return
        available = tokens.stat().st_size // 4 if tokens.exists() else 0
        usable = partial(_usable_lines, path, oldest=oldest, available=available)
        end, size = 0, 0
        for line in usable():
            self._count(line)
            end = max(end, _end_of(line))
            size += len(to_json(line).encode()) + 1
        if size != path.stat().st_size:
            self.stale = sum(_is_stale(line, oldest) for line in _read_lines(path, torn=True))
            write_atomically(path, (to_json(line) + "\n" for line in usable()))
        if tokens.exists():
            os.truncate(tokens, 4 * end)

    def _count(self, line: Line) -> None:
        self.done.add(line["prompt_index"])
        self._tally.add(line)
        if line["pairs"]:
            self._spans[line["position"]] = _pair_spans(line)


def _usable_lines(path: Path, *, oldest: int, available: int) -> Iterator[Line]:
    """The lines of an interrupted collection that it can be continued with.

    Args:
        oldest: oldest policy version that may have sampled a token.
        available: number of token ids on disk.
    """
    seen: set[int] = set()
    for line in _read_lines(path, torn=True):
        failed = line["dropped"] is not None and line["dropped"].startswith(FAILED)
        if failed or _is_stale(line, oldest) or _end_of(line) > available or line["prompt_index"] in seen:
            continue
        seen.add(line["prompt_index"])
        yield line


def _is_stale(line: Line, oldest: int) -> bool:
    return any(candidate["versions"][0] < oldest for candidate in line["candidates"])


def _line(outcome: Outcome, start: int) -> Line:
    prompt, completions = outcome.prompt, outcome.group.completions if outcome.group else ()
    pairs = () if isinstance(outcome.choice, Dropped) else outcome.choice
    scores = [score if math.isfinite(score) else None for score in outcome.scores]
    return {
        "prompt": [dict(message) for message in prompt.messages],
        "prompt_index": prompt.index,
        "position": outcome.position,
        "tokens": {"start": start, "prompt": len(prompt.token_ids)},
        "candidates": [
            {
                "text": completion.text,
                "tokens": len(completion.token_ids),
                "finished": completion.finished,
                "versions": [completion.first_version, completion.last_version],
            }
            for completion in completions
        ],
        "scores": scores,
        "pairs": [
            {
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "chosen_score": outcome.scores[pair.chosen],
                "rejected_score": outcome.scores[pair.rejected],
            }
            for pair in pairs
        ],
        "dropped": outcome.choice.reason if isinstance(outcome.choice, Dropped) else None,
        "error": outcome.error,
        "seed": outcome.group.seed if outcome.group else None,
        "fields": _finite(prompt.fields),
    }


def _finite(value: Any) -> Any:
    """A value with null for floats that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def _pair_spans(line: Line) -> list[list[int]]:
    """Start and length of prompt, chosen and rejected of each pair of a line, in tokens."""
    start, prompt = line["tokens"]["start"], line["tokens"]["prompt"]
    lengths = [candidate["tokens"] for candidate in line["candidates"]]
    starts = [start + prompt + sum(lengths[:i]) for i in range(len(lengths))]
    return [
        [
            start,
            prompt,
            *(part for side in ("chosen", "rejected") for part in (starts[pair[side]], lengths[pair[side]])),
        ]
        for pair in line["pairs"]
    ]


def _end_of(line: Line) -> int:
    if not line["candidates"]:
        return 0
    return line["tokens"]["start"] + line["tokens"]["prompt"] + sum(c["tokens"] for c in line["candidates"])


def _read_lines(path: Path, *, torn: bool = False) -> Iterator[Line]:
    """Yield lines; with ``torn`` without the last one if its writer was killed in the middle of it."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if torn and not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: damaged: not valid JSON: {error}; {_REMEDY}") from None
            if missing := [key for key in LINE_KEYS if key not in line]:
                raise ValueError(f"{path}:{number}: damaged: has no {missing[0]!r}; {_REMEDY}")
            yield line


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _memory_map(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # an empty file cannot be mapped


def _metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The round's metrics; a mean over no scores has no entry."""
    counts, timings = manifest["counts"], manifest.get("timings", {})
    metrics = {f"judge/{name}_score": score for name, score in manifest["scores"].items() if score is not None}
    metrics["rollout/kept"] = counts["kept"]
    metrics |= {f"rollout/dropped_{reason}": count for reason, count in counts["dropped"].items()}
    metrics |= {f"rollout/{name}": counts[name] for name in ("duplicates", "empty", "bad_scores", "stale")}
    if counts["candidates"]:
        metrics["rollout/mean_tokens"] = counts["tokens"] / counts["candidates"]
        metrics["rollout/truncated_share"] = counts["truncated"] / counts["candidates"]
    if timings.get("generate_s"):
        metrics["rollout/tokens_per_s"] = counts["tokens_generated"] / timings["generate_s"]
    return metrics | {f"perf/{name}": seconds for name, seconds in timings.items()} | manifest.get("metrics", {})
