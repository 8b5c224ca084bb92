"""Key figures of a run, and its outcome in one sentence."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_ray.report.formatting import count_noun, format_duration, format_number, same_decimals
from dpo_ray.report.health import Finding
from dpo_ray.report.record import Comparison, Curve, RunRecord
from dpo_ray.types import finite_float


class KeyFigure(NamedTuple):
    """A number that describes the outcome of a run, as text."""

    label: str
    value: str
    detail: str = ""
    before: str = ""
    """Value before training; "-" if it is unknown, empty if the figure has none."""


def key_figures(record: RunRecord) -> list[KeyFigure]:
    """The figures for which the run has data."""
    gain, accuracies, losses = record.score_gain, record.accuracies("eval/")[1], record.over_evals("eval/loss")[1]
    scores = same_decimals(*(e.mean("score") if e else None for e in (record.before, record.after)))
    interval = f"{gain.mean:+.2g} ± {gain.error:.1g}, {count_noun(gain.prompts, 'prompt')}" if gain else ""
    shares = [
        f"{accuracies[0]:.0%}" if len(accuracies) == len(record.evals) > 1 else "-",
        f"{accuracies[-1]:.0%}" if len(accuracies) else "-",
    ]
    tied = " (all tie at step 0)" if record.evals and record.evals[0]["step"] == 0 and shares[0] == "-" else ""
    eval_losses = same_decimals(losses[0] if len(losses) else None, losses[-1] if len(losses) > 1 else None)
    changes = [
        KeyFigure("Held-out judge score", scores[1], interval, scores[0]),
        KeyFigure(
            "Held-out accuracy",
            shares[1],
            f"of {record.examples} {record.learned.removeprefix('are ')}{tied}",
            shares[0],
        ),
        KeyFigure("Held-out loss", eval_losses[1], f"mean over {record.examples}", eval_losses[0]),
    ]
    figures = [figure for figure in changes if not figure.before == figure.value == "-"]
    if record.kl is not None:
        figures.append(KeyFigure("KL to the reference", f"{record.kl:.1f}", "nats per completion"))
    if (lengths := record.completion_tokens) and all(lengths):
        before, after = lengths
        change = f"tokens, {after / before - 1:+.0%}"
        figures.append(KeyFigure("Completion length", f"{after:.0f}", change, f"{before:.0f}"))
    return figures + _speed_figures(record)


def _speed_figures(record: RunRecord) -> list[KeyFigure]:
    """Medians over steps and rounds, and the length of the run."""
    figures = []
    pairs, tokens = (_median(record.over_steps(f"perf/{unit}_per_s")) for unit in ("pairs", "tokens"))
    if pairs is not None:
        detail = f"{format_number(tokens, 3)} tokens/s" if tokens is not None else ""
        figures.append(KeyFigure("Training", f"{format_number(pairs, 3)} {record.examples}/s", detail))
    if (generated := _median(record.over_rounds("rollout/tokens_per_s"))) is not None:
        figures.append(KeyFigure("Generation", f"{format_number(generated, 3)} tokens/s", "median over rounds"))
    if record.rounds:
        steps = count_noun(len(record.steps), "optimizer step")
        figures.append(KeyFigure("Trained for", count_noun(len(record.rounds), "round"), steps))
    elif record.steps:
        epoch = finite_float(record.steps[-1].get("epoch"))
        detail = f"{epoch:.3g} epochs" if epoch else ""
        figures.append(KeyFigure("Trained for", count_noun(len(record.steps), "step"), detail))
    if (seconds := _wall_s(record)) is not None:
        figures.append(KeyFigure("Time", format_duration(seconds), "without start-up and evaluation"))
    return figures


def comparisons(record: RunRecord, n: int = 3) -> list[Comparison]:
    """At most ``n`` held-out prompts, evenly spaced by rank from best to worst score change."""
    rows = sorted(record.comparisons, key=lambda row: -row.gain)
    return [rows[i] for i in evenly_spaced(len(rows), n)]


def evenly_spaced(total: int, n: int) -> list[int]:
    """At most ``n`` indices from the first to the last of ``total``."""
    return np.unique(np.linspace(0, total - 1, min(n, total)).round().astype(int)).tolist() if total else []


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
        share, after = f"{accuracies[-1]:.0%}", count_noun(int(eval_steps[-1]), "step")
        return f"After {after} {share} of held-out {record.examples} {record.learned}."
    accuracies, margins = record.accuracies()[1], record.over_steps("rewards/margins")[1]
    if len(accuracies) and len(margins):
        tail = max(1, len(accuracies) // 10)
        return (
            f"After {steps} {accuracies[-tail:].mean():.0%} of training {record.examples} {record.learned}, "
            f"with a mean margin of {margins[-tail:].mean():.2f}."
        )
    return f"The run has made {steps}."


def _median(curve: Curve) -> float | None:
    return float(np.median(curve[1])) if len(curve[1]) else None


def _wall_s(record: RunRecord) -> float | None:
    """Total seconds of all rounds, or of all steps offline.

    A round lasts as long as its training workers judge, if they do, train, sync and wait. Unless generation runs ahead
    of training, they wait for at least as long as generating, and judging by others, take.
    """
    if not record.rounds:
        seconds = record.over_steps("perf/step_s")[1]
        return float(seconds.sum()) if len(seconds) else None
    total = 0.0
    for line in record.rounds:
        generate, judge, train, sync, wait = (
            finite_float(line.get(f"perf/{phase}_s")) or 0.0 for phase in ("generate", "judge", "train", "sync", "wait")
        )
        by_workers, by_others = (judge, 0.0) if record.judged_by_workers else (0.0, judge)
        total += by_workers + train + sync + (wait if line.get("policy_lag") else max(wait, generate + by_others))
    return total or None
