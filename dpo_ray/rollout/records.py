"""A round on disk: ``rounds/NNNNNN/pairs.jsonl`` and ``manifest.json``.

The manifest is written last and atomically, so a round with a manifest is complete. Training always reads the pairs
from these files, so an uninterrupted run and a resumed one cannot differ.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from dpo_ray.rollout.collect import stable_hash
from dpo_ray.storage import remove_folder, write_atomically
from dpo_ray.types import CompletionGroup, Dropped, RoundData, ScoredPair, TokenPair, TokenSample

_REMEDY = "delete the folder of this round to collect it again"

Line = dict[str, Any]
"""One line of pairs.jsonl: a prompt, its candidates, their scores, and the pair or the reason for having none."""

LINE_KEYS = (
    "prompt",
    "prompt_index",
    "prompt_token_ids",
    "candidates",
    "scores",
    "chosen",
    "rejected",
    "dropped",
    "policy_version",
    "seed",
)


class RoundStore:
    """The rounds of one run directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "rounds"

    def path(self, index: int) -> Path:
        """The folder of a round."""
        return self.folder / f"{index:06d}"

    def finished(self, index: int) -> bool:
        """True if the round is complete on disk."""
        return (self.path(index) / "manifest.json").exists()

    def write(
        self,
        index: int,
        groups: Sequence[CompletionGroup],
        scores: Sequence[Sequence[float]],
        choices: Sequence[ScoredPair | Dropped],
        *,
        timings: Mapping[str, float],
        weights_digest: str | None,
        seed: int,
        sampling: Mapping[str, Any],
    ) -> None:
        """Write a round in which every prompt occurs once; replaces an unfinished earlier attempt.

        Args:
            scores: one per completion; NaN if the judge has none.
            timings: seconds by name, including ``generate_s`` and ``judge_s``.
            seed, sampling: ``run.seed``, and ``online.sampling`` as plain values.

        Raises:
            FileExistsError: the round is finished; the policy may have been trained on its pairs.
            ValueError: there is no group, a prompt occurs twice, or groups, scores and choices differ in length.
        """
        if self.finished(index):
            raise FileExistsError(f"{self.path(index)}: the round is finished; read it instead of collecting it again")
        if not groups:
            raise ValueError(f"round {index} has no group of completions")
        lines = [_line(group, row, choice) for group, row, choice in zip(groups, scores, choices, strict=True)]
        repeated = [prompt for prompt, count in Counter(line["prompt_index"] for line in lines).items() if count > 1]
        if repeated:
            raise ValueError(f"round {index} has prompt {repeated[0]} more than once")
        manifest = {
            "round": index,
            "policy_version": min(group.policy_version for group in groups),
            "counts": _counts(lines),
            "scores": _mean_scores(lines),
            "timings": dict(timings),
            "weights_digest": weights_digest,
            "seed": seed,
            "sampling": dict(sampling),
        }
        folder = self.path(index)
        remove_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        to_json = partial(json.dumps, ensure_ascii=False, allow_nan=False, default=str)
        write_atomically(folder / "pairs.jsonl", (to_json(line) + "\n" for line in lines))
        write_atomically(folder / "manifest.json", to_json(manifest, indent=2) + "\n")

    def lines(self, index: int) -> Iterator[Line]:
        """Yield the lines of a round's pairs.jsonl; raises a ValueError that names the first damaged line."""
        path = self.path(index) / "pairs.jsonl"
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: damaged: not valid JSON: {error}; {_REMEDY}") from None
                if missing := [key for key in LINE_KEYS if key not in line]:
                    raise ValueError(f"{path}:{number}: damaged: has no {missing[0]!r}; {_REMEDY}")
                yield line

    def read(self, index: int) -> RoundData:
        """A finished round for training: token ids exactly as sampled.

        Raises:
            FileNotFoundError: the round is not finished.
            ValueError: a file is damaged, or pairs.jsonl does not match the manifest's counts.
        """
        file = self.path(index) / "manifest.json"
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: damaged: {error}; {_REMEDY}") from None
        lines = list(self.lines(index))
        for name, count in _counts(lines).items():
            if (expected := manifest["counts"].get(name)) != count:
                raise ValueError(
                    f"{self.path(index) / 'pairs.jsonl'}:{len(lines)}: damaged: up to this last line the file has "
                    f"{name} {count}, the manifest counted {name} {expected}; {_REMEDY}"
                )
        return RoundData(
            index=index,
            pairs=tuple(_token_pair(line) for line in lines if line["dropped"] is None),
            samples=tuple(filter(None, map(_token_sample, lines))),
            policy_version=manifest["policy_version"],
            metrics=_metrics(manifest),
        )


def _line(group: CompletionGroup, scores: Sequence[float], choice: ScoredPair | Dropped) -> Line:
    pair = choice if isinstance(choice, ScoredPair) else None
    return {
        "prompt": [dict(message) for message in group.prompt.messages],
        "prompt_index": group.prompt.index,
        "prompt_token_ids": list(group.prompt_token_ids),
        "candidates": [
            {"text": completion.text, "token_ids": list(completion.token_ids), "finished": completion.finished}
            for completion in group.completions
        ],
        "scores": [score if math.isfinite(score) else None for score in scores],
        "chosen": pair.chosen if pair else None,
        "rejected": pair.rejected if pair else None,
        "dropped": choice.reason if isinstance(choice, Dropped) else None,
        "policy_version": group.policy_version,
        "seed": group.seed,
        "fields": dict(group.prompt.fields),
    }


def _token_pair(line: Line) -> TokenPair:
    chosen, rejected = (tuple(line["candidates"][line[side]]["token_ids"]) for side in ("chosen", "rejected"))
    return TokenPair(prompt=tuple(line["prompt_token_ids"]), chosen=chosen, rejected=rejected)


def _token_sample(line: Line) -> TokenSample | None:
    nonempty = [candidate for candidate in line["candidates"] if candidate["token_ids"]]
    if not nonempty:
        return None
    picked = nonempty[stable_hash(line["seed"], line["prompt_index"]) % len(nonempty)]
    return TokenSample(prompt=tuple(line["prompt_token_ids"]), completion=tuple(picked["token_ids"]))


def _counts(lines: Sequence[Line]) -> dict[str, Any]:
    candidates = [candidate for line in lines for candidate in line["candidates"]]
    distinct = sum(len({candidate["text"] for candidate in line["candidates"]}) for line in lines)
    return {
        "prompts": len(lines),
        "candidates": len(candidates),
        "pairs": sum(line["dropped"] is None for line in lines),
        "dropped": dict(sorted(Counter(line["dropped"] for line in lines if line["dropped"] is not None).items())),
        "duplicates": len(candidates) - distinct,
        "empty": sum(not candidate["text"].strip() for candidate in candidates),
        "bad_scores": sum(score is None for line in lines for score in line["scores"]),
        "truncated": sum(not candidate["finished"] for candidate in candidates),
        "tokens": sum(len(candidate["token_ids"]) for candidate in candidates),
    }


def _mean_scores(lines: Sequence[Line]) -> dict[str, float | None]:
    pairs = [line for line in lines if line["dropped"] is None]
    return {
        "mean": _mean(score for line in lines for score in line["scores"] if score is not None),
        "chosen": _mean(line["scores"][line["chosen"]] for line in pairs),
        "rejected": _mean(line["scores"][line["rejected"]] for line in pairs),
    }


def _mean(numbers: Iterable[float]) -> float | None:
    numbers = list(numbers)
    return fmean(numbers) if numbers else None


def _metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The round's metrics; a mean over no scores has no entry."""
    counts, timings = manifest["counts"], manifest["timings"]
    metrics = {f"judge/{name}_score": score for name, score in manifest["scores"].items() if score is not None}
    metrics["rollout/kept"] = counts["pairs"]
    metrics |= {f"rollout/dropped_{reason}": count for reason, count in counts["dropped"].items()}
    metrics |= {f"rollout/{name}": counts[name] for name in ("duplicates", "empty", "bad_scores")}
    metrics["rollout/mean_tokens"] = counts["tokens"] / counts["candidates"]
    metrics["rollout/truncated_share"] = counts["truncated"] / counts["candidates"]
    if timings.get("generate_s"):
        metrics["rollout/tokens_per_s"] = counts["tokens"] / timings["generate_s"]
    return metrics | {f"perf/{name}": seconds for name, seconds in timings.items()}
