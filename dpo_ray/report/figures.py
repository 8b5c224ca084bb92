"""Key figures of a run, held-out completions side by side, and the outcome in one sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpo_ray.report.formatting import count_noun, same_decimals
from dpo_ray.report.health import Finding
from dpo_ray.report.record import Curve, RunRecord, number


@dataclass(frozen=True, slots=True)
class Summary:
    """Key figures of a run; None for figures without data."""

    score_before: float | None
    """Mean judge score on the held-out prompts, untrained policy."""
    score_after: float | None
    accuracy_before: float | None
    """Share of held-out pairs ordered right at the first evaluation; None if every pair ties, as at step 0."""
    accuracy_after: float | None
    loss_before: float | None
    """Loss on held-out pairs at the first evaluation."""
    loss_after: float | None
    kl: float | None
    """Final distance between policy and reference, nats per completion."""
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
    """Time of training, syncing, generating and judging, without start-up, evaluation and saving."""


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
    """Key figures of a run."""
    lengths = record.completion_tokens or (None, None)
    accuracies, losses = record.accuracies("eval/")[1], record.over_evals("eval/loss")[1]
    return Summary(
        score_before=record.before.mean("score") if record.before else None,
        score_after=record.after.mean("score") if record.after else None,
        accuracy_before=float(accuracies[0]) if len(accuracies) == len(record.evals) > 1 else None,
        accuracy_after=float(accuracies[-1]) if len(accuracies) else None,
        loss_before=float(losses[0]) if len(losses) else None,
        loss_after=float(losses[-1]) if len(losses) > 1 else None,
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

    With ``n=3``: the largest gain, the median, and the largest loss or smallest gain. Fewer if fewer prompts were
    scored both before and after.
    """
    rows = [
        Comparison(prompt_text(old.prompt), old.completion, old.score or 0.0, new.completion, new.score or 0.0)
        for old, new in record.matched_samples
    ]
    rows.sort(key=lambda row: -row.gain)
    return [rows[i] for i in evenly_spaced(len(rows), n)]


def evenly_spaced(total: int, n: int) -> list[int]:
    """At most ``n`` indices from the first to the last of ``total``."""
    return np.unique(np.linspace(0, total - 1, min(n, total)).round().astype(int)).tolist() if total else []


def prompt_text(prompt: Sequence[Mapping[str, str]] | str) -> str:
    """A conversation as plain text: a single user turn alone, several turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role", "user") == "user":
        return prompt[0].get("content", "")
    return "\n".join(f"{message.get('role', 'user')}: {message.get('content', '')}" for message in prompt)


def verdict(record: RunRecord, findings: Sequence[Finding]) -> str:
    """The outcome of a run in one or two sentences."""
    warnings = sum(finding.level == "warning" for finding in findings)
    attention = {0: "", 1: " There is one warning below."}.get(warnings, f" There are {warnings} warnings below.")
    return _outcome(record) + attention


def _outcome(record: RunRecord) -> str:
    steps = count_noun(len(record.steps), "step")
    gain = record.score_gain
    if gain is not None:
        before, after = same_decimals(gain.before, gain.after)
        rounds = f" over {count_noun(len(record.rounds), 'round')}" if record.rounds else ""
        distance = f", {record.kl:.1f} nats per completion from the reference" if record.kl is not None else ""
        if not gain.is_significant:
            return (
                f"The held-out judge score did not change significantly: from {before} to {after}{rounds} "
                f"({gain.mean:+.2g} ± {gain.error:.2g}){distance}."
            )
        change = "rose" if gain.mean > 0 else "fell"
        return f"The held-out judge score {change} from {before} to {after}{rounds}{distance}."
    scores = record.over_rounds("judge/mean_score")[1]
    if len(scores) > 1:
        before, after = same_decimals(scores[0], scores[-1])
        return f"The judge's mean score went from {before} to {after} over {len(scores)} rounds."
    eval_steps, accuracies = record.accuracies("eval/")
    if len(accuracies) and eval_steps[-1] > 0:
        return (
            f"After {count_noun(int(eval_steps[-1]), 'step')} the policy prefers the chosen completion in "
            f"{accuracies[-1]:.0%} of held-out pairs."
        )
    accuracies, margins = record.accuracies()[1], record.over_steps("rewards/margins")[1]
    if len(accuracies) and len(margins):
        tail = max(1, len(accuracies) // 10)
        return (
            f"After {steps} the policy prefers the chosen completion in {accuracies[-tail:].mean():.0%} of training "
            f"pairs, with a mean margin of {margins[-tail:].mean():.2f}."
        )
    return f"The run has made {steps}."


def _median(curve: Curve) -> float | None:
    return float(np.median(curve[1])) if len(curve[1]) else None


def _wall_s(record: RunRecord) -> float | None:
    """Total seconds of all rounds, or of all steps offline.

    A round lasts as long as its training workers train, sync and wait. Unless generation runs ahead of training, they
    wait for at least as long as generating and judging take.
    """
    if not record.rounds:
        seconds = record.over_steps("perf/step_s")[1]
        return float(seconds.sum()) if len(seconds) else None
    total = 0.0
    for line in record.rounds:
        generate, judge, train, sync, wait = (
            number(line.get(f"perf/{phase}_s")) or 0.0 for phase in ("generate", "judge", "train", "sync", "wait")
        )
        total += train + sync + (wait if line.get("policy_lag") else max(wait, generate + judge))
    return total or None
