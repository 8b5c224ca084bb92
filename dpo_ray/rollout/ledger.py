"""The ledger: ``rounds/NNNNNN/`` in the run directory, which grows group by group and is finished by its manifest.

    pairs.jsonl     one line per group, in the order in which they finished: prompt, texts, scores, pairs or the reason
                    for having none
    tokens.i32      token ids of prompts and completions; each line of pairs.jsonl has their position
    pairs.i64       positions of prompt, chosen and rejected of each pair in tokens.i32, in the order of the prompts
    gaps.f64        score of the chosen minus score of the rejected completion of each pair, in the same order
    reference.f64   reference log-probabilities of these pairs, where later rounds replay them
    digests.json    digests of the weights by policy version, until the manifest has them
    manifest.json   counts, timings and digests; written last and atomically

A round that was interrupted is continued: its groups are on disk. ``timings``, and the counts ``tokens_generated`` and
``stale``, are of the process that finished the round, since it opened it; other counts and the judge's metrics are of
all groups. Training reads pairs from these files, memory-mapped, so an uninterrupted run and a resumed one cannot
differ, and a rank reads only the pairs that it trains on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ray.rollout.late_judging import RoundSamples, judge_round
from dpo_ray.rollout.open_round import REMEDY, Line, OpenRound, read_lines, to_json
from dpo_ray.rollout.pair_index import GAPS, REFERENCE, SPANS, memory_map
from dpo_ray.rollout.pipeline import Select
from dpo_ray.storage import write_atomically
from dpo_ray.types import TokenPair

if TYPE_CHECKING:
    from dpo_ray.data.loader import PairSource  # imports torch


class RoundPairs:
    """The pairs of a finished round, memory-mapped: a ``PairSource``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens = memory_map(folder / "tokens.i32", np.int32)
        self._spans = memory_map(folder / SPANS, np.int64).reshape(-1, 6)

    @property
    def lengths(self) -> np.ndarray:
        return self._spans[:, 1::2]

    @property
    def members(self) -> np.ndarray | None:
        """(n, 3) positions of prompt, chosen and rejected; None if each pair has a prompt of its own."""
        starts = self._spans[:, 0::2]
        return starts if len(np.unique(starts[:, 0])) < len(starts) else None

    @property
    def gaps(self) -> np.ndarray:
        gaps = memory_map(self.folder / GAPS, np.float64)
        if len(gaps) != len(self):
            raise ValueError(f"{self.folder}: damaged: {len(gaps)} gaps of scores for {len(self)} pairs; {REMEDY}")
        return gaps

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> TokenPair:
        prompt, chosen, rejected = (tuple(part.tolist()) for part in self._parts(index))
        return TokenPair(prompt, chosen, rejected)

    def tokens(self, index: int) -> np.ndarray:
        return np.concatenate(self._parts(index))

    def name_of(self, index: int) -> str:
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
    judged: bool = True
    """False if the training workers must score the completions before there are pairs."""
    reference: np.ndarray | None = None
    """(n, 2) reference log-probabilities of the pairs, nats, if they are stored; NaN for a pair without."""


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
        return self.folder / f"{round:06d}"

    def finished(self, round: int) -> bool:
        """True if the round is complete on disk."""
        return all((self.path(round) / name).exists() for name in ("manifest.json", SPANS))

    def open(self, round: int, *, oldest: int) -> OpenRound:
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
            raise ValueError(f"{file}: damaged: {error}; {REMEDY}") from None

    def lines(self, round: int) -> Iterator[Line]:
        """Yield the lines of a round's pairs.jsonl; raises a ValueError that names the first damaged line."""
        return read_lines(self.path(round) / "pairs.jsonl")

    def read(self, round: int) -> RoundData:
        """A finished round for training.

        Raises:
            FileNotFoundError: the round is not finished.
            ValueError: a file is damaged, or does not match the manifest's counts.
        """
        manifest = self.manifest(round)
        pairs, counts = RoundPairs(self.path(round)), manifest["counts"]
        tokens = (self.path(round) / "tokens.i32").stat().st_size // 4
        judged = manifest.get("judged", True)
        # Judging that was interrupted may have written pairs; it is repeated.
        expected = counts["pairs"] if judged else len(pairs)
        if (len(pairs), tokens) != (expected, counts["tokens_stored"]):
            raise ValueError(
                f"{self.path(round)}: damaged: {len(pairs)} pairs and {tokens} tokens, the manifest counted "
                f"{counts['pairs']} and {counts['tokens_stored']}; {REMEDY}"
            )
        logps = self.path(round) / REFERENCE
        reference = np.fromfile(logps).reshape(-1, 2) if logps.exists() else None
        return RoundData(round, pairs, manifest["policy_version"], _metrics(manifest), judged, reference)

    def write_reference(self, round: int, logps: np.ndarray) -> None:
        """Store the reference log-probabilities of a round's pairs, for later rounds that replay them."""
        write_atomically(self.path(round) / REFERENCE, logps.astype(np.float64).tobytes())

    def samples(self, round: int) -> RoundSamples:
        """All completions of a round."""
        return RoundSamples(self.path(round))

    def judge(self, round: int, scores: Sequence[float], select: Select, *, max_failed_share: float) -> None:
        """Write scores of all completions of a round, in the order of ``samples``, and the pairs that follow."""
        judge_round(self.path(round), scores, select, max_failed_share=max_failed_share)

    def forget(self, *, before: int, keep: int) -> None:
        """Delete the token ids of all but the last ``keep`` rounds before ``before``, and their texts.

        Their manifests stay.
        """
        for folder in self.folder.glob("[0-9]*"):
            if int(folder.name) < before - keep:
                for name in ("pairs.jsonl", "tokens.i32", SPANS, GAPS, REFERENCE):
                    (folder / name).unlink(missing_ok=True)


def _metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The round's metrics; a mean over no scores has no entry."""
    counts, timings = manifest["counts"], manifest.get("timings", {})
    metrics = {f"judge/{name}_score": score for name, score in manifest["scores"].items() if score is not None}
    metrics |= {f"judge/{name}": value for name, value in manifest.get("judge", {}).items()}
    metrics["rollout/kept"] = counts["kept"]
    for name in ("dropped", "left_out"):
        metrics |= {f"rollout/{name}_{reason}": count for reason, count in counts.get(name, {}).items()}
    metrics |= {f"rollout/{name}": counts[name] for name in ("duplicates", "empty", "bad_scores", "stale")}
    if counts["candidates"]:
        metrics["rollout/mean_tokens"] = counts["tokens"] / counts["candidates"]
        metrics["rollout/truncated_share"] = counts["truncated"] / counts["candidates"]
    if timings.get("generate_s"):
        metrics["rollout/tokens_per_s"] = counts["tokens_generated"] / timings["generate_s"]
    return metrics | {f"perf/{name}": seconds for name, seconds in timings.items()} | manifest.get("metrics", {})
