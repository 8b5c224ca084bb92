"""A round that grows: groups are appended as they finish, and an interrupted collection is continued.

The files are those of ``rollout.ledger``.
"""

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from dpo_ray.rollout.pair_index import GAPS, REFERENCE, SPANS, PairIndex
from dpo_ray.rollout.selectors.preferences import Choice, Pairs
from dpo_ray.rollout.tally import Line, Tally, sampled_candidates
from dpo_ray.storage import write_atomically
from dpo_ray.types import CompletionGroup, Dropped, Judgement, Prompt, finite_or_none

REMEDY = "delete the folder of this round to collect it again"
FAILED = "failed_"
"""Prefix of the reasons of groups that failed; they are collected again if their round is continued."""
DIGESTS = "digests.json"
LINE_KEYS = ("prompt", "prompt_index", "position", "tokens", "candidates", "scores", "pairs", "dropped", "seed")

to_json = partial(json.dumps, ensure_ascii=False, allow_nan=False, default=str)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a prompt in a round."""

    prompt: Prompt
    position: int
    """Position of the prompt in its round."""
    choice: Choice
    group: CompletionGroup | None = None
    """None if generating failed."""
    judgement: Judgement = field(default_factory=lambda: Judgement(()))
    """Without scores if the group was not judged."""
    error: str | None = None
    """The error of a group that failed."""


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
        self._versions: set[int] = set()
        """Policy versions that have sampled tokens."""
        self._tally, self._pairs = Tally(), PairIndex()
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("manifest.json", SPANS, GAPS, REFERENCE):
            (folder / name).unlink(missing_ok=True)
        self._recover(oldest)
        noted: dict[str, list[str]] = json.loads(file.read_text()) if (file := folder / DIGESTS).exists() else {}
        self._digests = {version: digests for version, digests in noted.items() if int(version) in self._versions}
        """Digests of the weights by policy version: several if a version was trained again, after its checkpoint was
        lost, while it had groups in the round."""
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
        line = line_of(outcome, self._end)
        text = (to_json(line) + "\n").encode(errors="replace")  # half a surrogate pair cannot be encoded
        # Token ids first: a line whose tokens are missing would be a damaged file, tokens without a line are a gap.
        tokens = array("i", chain.from_iterable(ids))  # numpy takes four times as long for a tuple
        _write_all(self._tokens, tokens.tobytes())
        _write_all(self._lines, text)
        self._end += len(tokens)
        self._generated += sum(candidate["tokens"] for candidate in sampled_candidates(line))
        self.failed += outcome.error is not None
        self._count(line)

    def note_digests(self, digests: Mapping[int, str]) -> None:
        """Remember the digests of the weights of policy versions, also if the round is continued by another process."""
        new = [(str(v), digest) for v, digest in digests.items() if digest not in self._digests.get(str(v), ())]
        for version, digest in new:
            self._digests.setdefault(version, []).append(digest)
        if new:
            write_atomically(self.folder / DIGESTS, to_json(self._digests))

    def finish(self, *, held_out: Sequence[float] = (), **values: Any) -> None:
        """Write the pairs and the manifest.

        Args:
            held_out: scores of held-out completions to compare the chosen ones with.
            values: further entries of the manifest, beside counts, scores and policy versions.
        """
        self._pairs.write(self.folder)
        tally = self._tally
        counts = {**tally.all_counts(), "stale": self.stale}
        manifest = {
            "round": int(self.folder.name),
            "policy_version": min(tally.versions, default=self._oldest),
            "policy_versions": {str(version): tally.versions[version] for version in sorted(tally.versions)},
            "weights_digests": {
                str(v): self._digests[str(v)] for v in sorted(self._versions) if str(v) in self._digests
            },
            "counts": {**counts, "tokens_stored": self._end, "tokens_generated": self._generated},
            "scores": tally.mean_scores(),
            "judge": tally.judging(held_out),
            **values,
        }
        self.close()
        write_atomically(self.folder / "manifest.json", to_json(manifest, indent=2) + "\n")
        (self.folder / DIGESTS).unlink(missing_ok=True)

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
            self.stale = sum(_is_stale(line, oldest) for line in read_lines(path, torn=True))
            write_atomically(path, (to_json(line) + "\n" for line in usable()))
        if tokens.exists():
            os.truncate(tokens, 4 * end)

    def _count(self, line: Line) -> None:
        self.done.add(line["prompt_index"])
        self._tally.add(line)
        self._pairs.add(line)
        for candidate in sampled_candidates(line):
            first, last = candidate["versions"]
            self._versions.update(range(first, last + 1))


def _usable_lines(path: Path, *, oldest: int, available: int) -> Iterator[Line]:
    """The lines of an interrupted collection that it can be continued with.

    Args:
        oldest: oldest policy version that may have sampled a token.
        available: number of token ids on disk.
    """
    seen: set[int] = set()
    for line in read_lines(path, torn=True):
        failed = line["dropped"] is not None and line["dropped"].startswith(FAILED)
        if failed or _is_stale(line, oldest) or _end_of(line) > available or line["prompt_index"] in seen:
            continue
        seen.add(line["prompt_index"])
        yield line


def _is_stale(line: Line, oldest: int) -> bool:
    return any(candidate["versions"][0] < oldest for candidate in line["candidates"])


def line_of(outcome: Outcome, start: int) -> Line:
    """The line of an outcome, whose token ids begin at ``start``."""
    prompt, completions = outcome.prompt, outcome.group.completions if outcome.group else ()
    pairs = () if isinstance(outcome.choice, Dropped) else outcome.choice
    judgement = outcome.judgement
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
                **({} if completion.sampled else {"sampled": False}),
            }
            for completion in completions
        ],
        "scores": finite_or_none(judgement.scores),
        "judge": finite_or_none(
            {name: value for name in ("parts", "means", "totals") if (value := getattr(judgement, name))}
        ),
        "pairs": [
            {
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "chosen_score": judgement.scores[pair.chosen] if judgement.scores else None,
                "rejected_score": judgement.scores[pair.rejected] if judgement.scores else None,
                **({} if pair.gap is None else {"gap": pair.gap}),
            }
            for pair in pairs
        ],
        "left_out": {r: n for r, n in pairs.left_out.items() if n} if isinstance(pairs, Pairs) else {},
        "dropped": outcome.choice.reason if isinstance(outcome.choice, Dropped) else None,
        "error": outcome.error,
        "seed": outcome.group.seed if outcome.group else None,
        "fields": finite_or_none(prompt.fields),
    }


def _end_of(line: Line) -> int:
    if not line["candidates"]:
        return 0
    return line["tokens"]["start"] + line["tokens"]["prompt"] + sum(c["tokens"] for c in line["candidates"])


def read_lines(path: Path, *, torn: bool = False) -> Iterator[Line]:
    """Yield lines; with ``torn`` without the last one if its writer was killed in the middle of it."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if torn and not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: damaged: not valid JSON: {error}; {REMEDY}") from None
            if missing := [key for key in LINE_KEYS if key not in line]:
                raise ValueError(f"{path}:{number}: damaged: has no {missing[0]!r}; {REMEDY}")
            yield line


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
