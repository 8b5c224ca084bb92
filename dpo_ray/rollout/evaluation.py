"""Evaluation of one policy version: completions of held-out prompts for the judge, samples for the KL divergence."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dpo_ray.config.rounds import OnlineConfig, SamplingConfig
from dpo_ray.rollout.engine import Request
from dpo_ray.rollout.rounds import seed_of
from dpo_ray.storage import write_atomically
from dpo_ray.types import CompletionGroup, Prompt, TokenSample, finite_or_none

EVALUATION_ROUND = 2**20
"""Round number from which the seeds of evaluations are derived: the same at every evaluation."""
UNMODIFIED: Mapping[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0, "repetition_penalty": 1.0
}  # fmt: skip
"""Sampling settings with which completions are samples of the policy itself."""


Line = Mapping[str, Any]
"""One line of an evaluation's file: a prompt, its completion and the score."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The completions of an evaluation."""

    version: int
    """Policy version that generated them; also the number of finished rounds."""
    judged: tuple[tuple[CompletionGroup, float], ...] = ()
    """Completions of the held-out prompts and their scores."""
    samples: tuple[CompletionGroup, ...] = ()
    """Samples of the policy for the KL divergence; the judged completions if these are samples of the policy."""
    judge_metrics: Mapping[str, float] = field(default_factory=dict)
    """Means and sums over ``judged`` of the judge's metrics, see ``tally.judge_metrics``."""
    failed: int = 0
    """Held-out prompts without a completion."""
    instead_of: int | None = None
    """The version that was asked for, if the engines went beyond it before they had completed its prompts."""

    @property
    def requested(self) -> int:
        """The version that was asked for."""
        return self.version if self.instead_of is None else self.instead_of

    @property
    def empty(self) -> bool:
        """True if nothing was completed or failed: another evaluation is of the version that the engines have."""
        return not (self.judged or self.samples or self.failed)

    @property
    def token_samples(self) -> list[TokenSample]:
        return [TokenSample(group.prompt.token_ids, group.completions[0].token_ids) for group in self.samples]

    @property
    def engine_logps(self) -> list[float]:
        """The engine's log-probability of each of ``samples``, nats."""
        return [group.completions[0].logp or 0.0 for group in self.samples]


def evaluation_requests(
    online: OnlineConfig, prompts: Sequence[Prompt], held_out: Sequence[Prompt], *, seed: int
) -> tuple[list[Request], list[Request]]:
    """The requests of an evaluation: those to judge, and those for the KL divergence.

    Where the sampling settings modify the policy's distribution, the divergence needs samples of its own.
    """

    def requests(prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Request]:
        seeds = [seed_of(seed, EVALUATION_ROUND, prompt.index) for prompt in prompts]
        deadline = online.generate_timeout_s
        return [Request(p, sampling, 1, s, deadline, evaluation=True) for p, s in zip(prompts, seeds, strict=True)]

    unmodified = online.sampling.model_copy(update=UNMODIFIED)
    judged = requests(held_out, online.sampling)
    if held_out and unmodified == online.sampling:
        return judged, []
    return judged, requests((held_out or prompts)[: online.kl_samples], unmodified)


def kl_divergence(policy: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """KL divergence of the policy from the reference, estimated on the policy's samples, with its standard error.

    Args:
        policy, reference: log-probability of each sample, nats.

    Returns:
        ``kl`` and ``kl_stderr``, nats per completion; empty without samples.
    """
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    if not ratios:
        return {}
    error = stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    return {"kl": fmean(ratios), "kl_stderr": error}


class EvaluationStore:
    """``evaluations/VERSION.jsonl`` (judged completions) and ``evaluations/VERSION.kl.json`` in the run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "evaluations"

    def recorded(self, version: int) -> bool:
        """True if the evaluation of a version is complete on disk."""
        return self._file(version).exists()

    def complete(self, version: int, prompts: int) -> bool:
        """True if the evaluation of a version is on disk, with a score for each of ``prompts`` held-out prompts."""
        return self.recorded(version) and len(_score_of_prompt(self._lines(version))) == prompts

    def write(
        self, evaluation: Evaluation, policy: Sequence[float] | None, reference: Sequence[float] | None
    ) -> dict[str, float]:
        """Write an evaluation.

        Args:
            policy, reference: log-probability of each of ``evaluation.samples``, nats; None without a reference.

        Returns:
            Its metrics: ``heldout/score``, ``heldout/unscored``, ``heldout/win_rate``, ``kl`` and ``kl_stderr``, as far
            as there are any, and ``heldout/judge_NAME`` for each of ``evaluation.judge_metrics``.
        """
        kl = {} if policy is None or reference is None else kl_divergence(policy, reference)
        lines = [_line(group, score) for group, score in evaluation.judged]
        self.folder.mkdir(parents=True, exist_ok=True)
        finite = {key: finite_or_none(value) for key, value in kl.items()}
        summary: dict[str, Any] = {"version": evaluation.version, "samples": len(evaluation.samples), **finite}
        summary |= {"failed": evaluation.failed, "judge": dict(evaluation.judge_metrics)}
        write_atomically(self._file(evaluation.version).with_suffix(".kl.json"), json.dumps(summary) + "\n")
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        write_atomically(self._file(evaluation.version), text)
        return kl | self._judged(evaluation.version, lines, summary)

    def read(self, version: int) -> dict[str, float]:
        """The metrics of a recorded evaluation."""
        summary = json.loads(self._file(version).with_suffix(".kl.json").read_text(encoding="utf-8"))
        kl = {key: math.nan if summary[key] is None else summary[key] for key in ("kl", "kl_stderr") if key in summary}
        return kl | self._judged(version, self._lines(version), summary)

    def scores_before(self, version: int) -> list[float]:
        """Scores of the newest recorded evaluation of an earlier version."""
        return [line["score"] for line in self._before(version) if line["score"] is not None]

    def copy(self, other: "EvaluationStore", version: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in (self._file(version).with_suffix(".kl.json"), self._file(version)):  # in the order of ``write``
            write_atomically(file, (other.folder / file.name).read_text(encoding="utf-8"))

    def _judged(self, version: int, lines: Sequence[Line], summary: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of an evaluation that are not about the KL divergence."""
        scores = [line["score"] for line in lines if line["score"] is not None]
        unscored = len(lines) - len(scores) + summary.get("failed", 0)
        return {
            **({"heldout/score": fmean(scores)} if scores else {}),
            # Evaluations without the number of prompts that failed are of versions that did not count them.
            **({"heldout/unscored": unscored} if "failed" in summary and (lines or summary["failed"]) else {}),
            **win_rate(lines, self._before(version)),
            **{f"heldout/judge_{name}": value for name, value in summary.get("judge", {}).items()},
        }

    def _before(self, version: int) -> list[Line]:
        """Lines of the newest recorded evaluation of an earlier version; none if there is no such evaluation."""
        earlier = [int(file.stem) for file in self.folder.glob("[0-9]*.jsonl") if int(file.stem) < version]
        return self._lines(max(earlier)) if earlier else []

    def _lines(self, version: int) -> list[Line]:
        with self._file(version).open(encoding="utf-8") as file:
            return list(map(json.loads, file))

    def _file(self, version: int) -> Path:
        return self.folder / f"{version:06d}.jsonl"


def win_rate(lines: Sequence[Line], before: Sequence[Line]) -> dict[str, float]:
    """``heldout/win_rate``: share of the prompts that score higher than before; a tie counts half.

    Only prompts with a score in both evaluations count; empty if there is none.
    """
    scores, scores_before = _score_of_prompt(lines), _score_of_prompt(before)
    wins = [
        1.0 if score > scores_before[prompt] else 0.5 if score == scores_before[prompt] else 0.0
        for prompt, score in scores.items()
        if prompt in scores_before
    ]
    return {"heldout/win_rate": fmean(wins)} if wins else {}


def _score_of_prompt(lines: Sequence[Line]) -> dict[tuple[int | None, str], float]:
    """Scores by index and text of the prompt: ``online.eval_prompts`` may change when a run is resumed."""
    return {
        (line.get("prompt_index"), json.dumps(line["prompt"], default=str)): line["score"]
        for line in lines
        if line["score"] is not None
    }


def _line(group: CompletionGroup, score: float) -> Line:
    completion = group.completions[0]
    return {
        "prompt_index": group.prompt.index,
        "prompt": [dict(message) for message in group.prompt.messages],
        "completion": completion.text,
        "tokens": len(completion.token_ids),
        "finished": completion.finished,
        "score": finite_or_none(score),
    }
