"""Key figures of a run, held-out completions side by side, and the outcome in one sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpo_ray.report.formatting import count_noun, indistinguishable
from dpo_ray.report.health import Finding
from dpo_ray.report.record import Lines, RunRecord, number


@dataclass(frozen=True, slots=True)
class Summary:
    """The key figures of a run; None where the run holds no data for one."""

    score_before: float | None
    """Mean judge score of the held-out prompts under the untrained policy."""
    score_after: float | None
    accuracy_before: float | None
    """Share of held-out pairs ordered right at the first evaluation; None where all pairs tie, as at step 0."""
    accuracy_after: float | None
    kl: float | None
    """Nats per sequence between policy and reference at the end."""
    tokens_before: float | None
    """Mean completion length in tokens."""
    tokens_after: float | None
    pairs_per_s: float | None
    """Median over steps."""
    tokens_per_s: float | None
    """Training tokens, median over steps."""
    generate_tokens_per_s: float | None
    """Generated tokens, median over rounds."""
    rounds: int
    steps: int
    wall_s: float | None
    """Time of training, syncing, generating and judging; start-up, evaluation and saving are not in the metrics."""


class Comparison(NamedTuple):
    """One held-out prompt before and after training."""

    prompt: str
    before: str
    before_score: float
    after: str
    after_score: float

    @property
    def gain(self) -> float:
        """Change of the judge score."""
        return self.after_score - self.before_score


def summary(record: RunRecord) -> Summary:
    """The figures of a run that fit into a terminal table."""
    lengths = record.completion_tokens or (None, None)
    accuracies = record.held_out_accuracy[1]
    return Summary(
        score_before=record.before.score if record.before else None,
        score_after=record.after.score if record.after else None,
        accuracy_before=float(accuracies[0]) if len(accuracies) == len(record.evals) > 1 else None,
        accuracy_after=float(accuracies[-1]) if len(accuracies) else None,
        kl=record.kl,
        tokens_before=lengths[0],
        tokens_after=lengths[1],
        pairs_per_s=_median(record.over_steps("perf/pairs_per_s")),
        tokens_per_s=_median(record.over_steps("perf/tokens_per_s")),
        generate_tokens_per_s=_median(record.over_rounds("rollout/tokens_per_s")),
        rounds=len(record.rounds),
        steps=len(record.steps),
        wall_s=_wall_s(record),
    )


def comparisons(record: RunRecord, n: int = 3) -> list[Comparison]:
    """Held-out prompts before and after, evenly spaced from the largest gain to the largest loss.

    With 3: the largest gain, the median, the largest loss (or the smallest gain). Fewer where fewer prompts were scored
    both before and after.
    """
    found = [
        Comparison(prompt_text(one.prompt), one.completion, one.score or 0.0, two.completion, two.score or 0.0)
        for one, two in record.held_out
    ]
    found.sort(key=lambda comparison: -comparison.gain)
    places = np.unique(np.linspace(0, len(found) - 1, min(n, len(found))).round().astype(int)) if found else []
    return [found[place] for place in places]


def prompt_text(prompt: Sequence[Mapping[str, str]] | str) -> str:
    """A conversation as plain text: a single user turn alone, several turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role", "user") == "user":
        return prompt[0].get("content", "")
    return "\n".join(f"{message.get('role', 'user')}: {message.get('content', '')}" for message in prompt)


def verdict(record: RunRecord, findings: Sequence[Finding]) -> str:
    """The run in one or two sentences."""
    warnings = sum(finding.level == "warning" for finding in findings)
    attention = {0: "", 1: " There is one warning below."}.get(warnings, f" There are {warnings} warnings below.")
    return _outcome(record) + attention


def _outcome(record: RunRecord) -> str:
    gain = record.score_gain
    if gain is not None:
        before, after = indistinguishable(gain.before, gain.after)
        figures = f"from {before} to {after}"
        over = f" over {count_noun(len(record.rounds), 'round')}" if record.rounds else ""
        moved = f", {record.kl:.1f} nats per completion away from the reference" if record.kl is not None else ""
        if not gain.is_clear:
            return (
                f"The held-out judge score did not change beyond chance: {figures}{over} "
                f"({gain.mean:+.2g} ± {gain.error:.2g}){moved}."
            )
        return f"The held-out judge score {'rose' if gain.mean > 0 else 'fell'} {figures}{over}{moved}."
    scores = record.over_rounds("judge/mean_score")[1]
    if len(scores) > 1:
        before, after = indistinguishable(scores[0], scores[-1])
        return f"The judge's mean score went from {before} to {after} over {len(scores)} rounds."
    eval_steps, accuracies = record.held_out_accuracy
    if len(accuracies) and eval_steps[-1] > 0:
        return (
            f"After {count_noun(int(eval_steps[-1]), 'step')} the policy prefers the chosen completion in "
            f"{accuracies[-1]:.0%} of held-out pairs."
        )
    accuracies, margins = record.over_steps("rewards/accuracies")[1], record.over_steps("rewards/margins")[1]
    if len(accuracies) and len(margins):
        tail = max(1, len(accuracies) // 10)
        return (
            f"After {count_noun(len(record.steps), 'step')} the policy prefers the chosen completion in "
            f"{accuracies[-tail:].mean():.0%} of training pairs, by a mean margin of {margins[-tail:].mean():.2f}."
        )
    return f"The run has made {count_noun(len(record.steps), 'step')}."


def _median(line: Lines) -> float | None:
    return float(np.median(line[1])) if len(line[1]) else None


def _wall_s(record: RunRecord) -> float | None:
    """Seconds of all rounds, offline of all steps.

    A round lasts as long as its training workers train, send and wait. Where generation does not run ahead of training,
    it lasts at least as long as generating and judging besides.
    """
    if not record.rounds:
        seconds = record.over_steps("perf/step_s")[1]
        return float(seconds.sum()) if len(seconds) else None
    total = 0.0
    for line in record.rounds:
        phase = {
            name: number(line.get(f"perf/{name}_s")) or 0.0 for name in ("generate", "judge", "train", "sync", "wait")
        }
        made = 0.0 if line.get("policy_lag") else phase["generate"] + phase["judge"]
        total += phase["train"] + phase["sync"] + max(phase["wait"], made)
    return total or None
