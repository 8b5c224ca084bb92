"""What a run's numbers say about its health, in plain words and with the key to change.

Each rule is a function of the record that returns one finding, or None where the run holds no data for it. Reads no
files and draws nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpo_ray.report.formatting import count_noun, indistinguishable
from dpo_ray.report.record import SCORE_NOISE_SE, RunRecord

Level = Literal["ok", "note", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a reader should know about the run."""

    level: Level
    """ok: checked and fine. note: worth knowing. warning: look at it before trusting the run."""
    title: str
    text: str
    """The numbers, and what to do about them."""


Rule = Callable[["RunRecord"], Finding | None]

FIRST_LOSS_TOLERANCE = 0.02
"""Nats around ln 2. Before the first update policy and reference are one model, so every margin is 0 up to rounding."""
CHOSEN_FALL_NATS = 20.0
"""Nats per chosen completion: an implicit reward of -2 at beta = 0.1, as large as the margins aimed for."""
CHOSEN_HELD_NATS = 2.0
"""A fall below this is within the noise of a batch."""
SATURATED_MARGIN = 5.0
"""sigmoid(-5) = 0.7 %: a pair at this margin has almost no gradient left."""
SATURATED_ACCURACY = 0.98
"""At most one pair in fifty is still ordered wrongly."""
EVAL_LOSS_RISE = 0.02
"""Nats above its minimum: the held-out loss has turned, not wobbled."""
KL_HIGH_NATS = 30.0
"""Nats per sequence: few of the policy's completions would still be written by the reference."""
KL_NOTABLE_NATS = 15.0
"""Half way to high."""
LENGTH_DRIFT = 1 / 3
"""Judges often favour length; a change by a third can explain a better score without better text."""
GRAD_SPIKE = 10.0
"""Times the median gradient norm."""
GRAD_SPIKE_MIN_STEPS = 10
"""Fewer steps have no median to speak of."""
CLIPPED_SHARE = 0.95
"""Share of steps: the clipping norm then sets the size of nearly every step."""
TREND_MIN_ROUNDS = 4
"""Two rounds on each side of a comparison."""
TIE_SHARE = 0.3
"""Share of prompts: a third of the generated tokens then teaches nothing."""
DROP_SHARE = 0.3
"""As for ties, all reasons together."""
CUT_SHARE_WARNING = 0.5
"""Share of candidates: the judge then mostly reads unfinished text."""
CUT_SHARE_NOTE = 0.2
"""Share of candidates that is too many to be the odd rambler."""
WAIT_SHARE = 0.5
"""Share of the trainers' time: they idle more than they train."""
MAX_NAMED_STEPS = 4
"""Steps that a text lists before it says how many more there are."""


def diagnose(record: RunRecord) -> list[Finding]:
    """What every rule that applies to the run has to say, warnings first."""
    findings = [finding for rule in RULES if (finding := rule(record)) is not None]
    order: tuple[Level, ...] = ("warning", "note", "ok")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def values_are_finite(record: RunRecord) -> Finding | None:
    """A step with a NaN or infinite loss or gradient is skipped; many of them end a run."""
    if not record.steps:
        return None
    watched = ("loss", "optim/grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    broken = [
        (line["step"], key)
        for line in record.steps
        for key in watched
        if key in line and (line[key] is None or not math.isfinite(line[key]))
    ]
    if not broken:
        return Finding("ok", "All values are finite", f"No NaN or infinity in {count_noun(len(record.steps), 'step')}.")
    step, key = broken[0]
    steps = len({step for step, _ in broken})
    return Finding(
        "warning",
        "NaN or infinite values",
        f"{key} is not finite from step {step}; {count_noun(steps, 'step')} of {len(record.steps)} affected. "
        "Steps whose loss or gradient is not finite are skipped; the workers' logs name their pairs. "
        "Look at those, lower optim.lr or lengthen optim.warmup_steps.",
    )


def first_loss_is_ln2(record: RunRecord) -> Finding | None:
    """Before the first update the sigmoid loss is ln 2 exactly, whatever the data."""
    steps, loss = record.over_steps("loss")
    weighted = record.setting("loss.weights") or record.setting("loss.weighting") == "wpo"
    if record.setting("loss.use") != "sigmoid" or weighted or len(steps) == 0 or steps[0] > 1:
        return None
    first = float(loss[0])
    if abs(first - math.log(2)) <= FIRST_LOSS_TOLERANCE:
        return Finding(
            "ok", "Training starts at the reference", f"The first loss is {first:.4f}, against ln 2 = 0.6931."
        )
    return Finding(
        "warning",
        "The reference does not match the policy",
        f"The first loss is {first:.4f}; with policy and reference the same model it is ln 2 = 0.6931 within "
        f"{FIRST_LOSS_TOLERANCE}. Check that the reference is the model in model.path with the same chat template and "
        "the same model.dtype, and that reference.cache_dir holds no entries of other weights.",
    )


def chosen_holds(record: RunRecord) -> Finding | None:
    """Whether chosen completions became much less likely while the margin grew.

    Measured by the implicit reward over beta, the log ratio to the reference: unlike the log-probability itself it does
    not move with the lengths of the pairs in a batch. Falls back to the log-probability where beta is not known.
    """
    beta = record.setting("loss.beta")
    chosen = record.over_steps("rewards/chosen")[1] / beta if beta else record.over_steps("logps/chosen")[1]
    margins = record.over_steps("rewards/margins")[1]
    if len(chosen) < 2 or len(margins) < 2:
        return None
    margin_start, margin_end = _ends(margins)
    start, end = _ends(chosen)
    fall = start - end
    if fall > CHOSEN_FALL_NATS and margin_end > margin_start:
        return Finding(
            "warning",
            "Chosen completions became less likely",
            f"Their log-probability fell by {fall:.1f} nats per completion while the margin grew from "
            f"{margin_start:.2f} to {margin_end:.2f}: the policy learns what not to say, and its weight goes to texts "
            "nobody ranked. Raise loss.beta, lower optim.lr, stop earlier, or use a loss that anchors the chosen text.",
        )
    if fall > CHOSEN_HELD_NATS:
        return Finding(
            "note",
            "Chosen completions fell a little",
            f"By {fall:.1f} nats per completion. Chosen and rejected falling together is common in DPO; it is a "
            f"concern beyond {CHOSEN_FALL_NATS:.0f} nats.",
        )
    change = f"rose by {-fall:.1f}" if fall < 0 else f"fell by {fall:.1f}"
    return Finding("ok", "Chosen completions stayed likely", f"Their log-probability {change} nats per completion.")


def not_saturated(record: RunRecord) -> Finding | None:
    """Every pair ordered right by a wide margin: nothing left to learn but the noise of the set."""
    margins, accuracies = record.over_steps("rewards/margins")[1], record.over_steps("rewards/accuracies")[1]
    if len(margins) < 2 or len(accuracies) < 2:
        return None
    margin, accuracy = _ends(margins)[1], _ends(accuracies)[1]
    figures = f"At the end {accuracy:.0%} of training pairs are ordered right, by a margin of {margin:.2f}"
    if accuracy >= SATURATED_ACCURACY and margin >= SATURATED_MARGIN:
        return Finding(
            "warning",
            "Training pairs are learnt by heart",
            f"{figures}. Further steps only push them further apart. Use fewer run.epochs (online: "
            "online.epochs_per_round), lower optim.lr, or raise loss.beta, and compare with held-out pairs.",
        )
    return Finding("ok", "Training pairs still teach", f"{figures}.")


def eval_loss_kept_falling(record: RunRecord) -> Finding | None:
    """Whether the held-out loss turned up again."""
    steps, loss = record.over_evals("eval/loss")
    if len(loss) < 3:
        return None
    best = int(np.argmin(loss))
    if loss[-1] - loss[best] > EVAL_LOSS_RISE:
        return Finding(
            "warning",
            "Held-out loss has turned up",
            f"It was lowest at step {steps[best]:.0f} ({loss[best]:.4f}) and ended at {loss[-1]:.4f}. Stop near that "
            f"step (run.steps={steps[best]:.0f}) or lower optim.lr.",
        )
    return Finding("ok", "Held-out loss did not turn up", f"It went from {loss[0]:.4f} to {loss[-1]:.4f}.")


def kl_is_moderate(record: RunRecord) -> Finding | None:
    """How far the policy's own completions are from the reference."""
    kl = record.kl
    if kl is None:
        return None
    figures = f"{kl:.1f} nats per completion between policy and reference, on the policy's own completions"
    if kl > KL_HIGH_NATS:
        return Finding(
            "warning",
            "The policy is far from its reference",
            f"{figures}; beyond {KL_HIGH_NATS:.0f} judges are easily gamed. Read the samples below. Raise loss.beta, "
            "lower optim.lr, or run fewer rounds.",
        )
    if kl > KL_NOTABLE_NATS:
        return Finding("note", "The policy has moved a good way", f"{figures}; above {KL_HIGH_NATS:.0f} is a warning.")
    return Finding("ok", "The policy stayed near its reference", f"{figures}.")


def length_is_steady(record: RunRecord) -> Finding | None:
    """Whether completions grew or shrank."""
    lengths = record.completion_tokens
    if lengths is None or lengths[0] <= 0:
        return None
    before, after = lengths
    change = after / before - 1
    figures = f"Completions went from {before:.0f} to {after:.0f} tokens on average ({change:+.0%})"
    if abs(change) <= LENGTH_DRIFT:
        return Finding("ok", "Completion length is steady", f"{figures}.")
    grew = change > 0
    advice = (
        "If length is not what you want, penalise it in the judge or use a length-normalised loss."
        if grew
        else "Check that answers are still complete, and that the judge does not reward brevity alone."
    )
    return Finding(
        "warning",
        "Completions grew longer" if grew else "Completions grew shorter",
        f"{figures}: part of any change in score may be length. {advice}",
    )


def gradients_are_calm(record: RunRecord) -> Finding | None:
    """Single steps with a gradient far out of line."""
    steps, norms = record.over_steps("optim/grad_norm")
    if len(norms) < GRAD_SPIKE_MIN_STEPS:
        return None
    median = float(np.median(norms))
    spikes = steps[norms > GRAD_SPIKE * median]
    if len(spikes) == 0:
        return Finding(
            "ok", "Gradients are calm", f"Median norm {median:.3g}, largest {norms.max():.3g} (before clipping)."
        )
    more = f" and {len(spikes) - MAX_NAMED_STEPS} more" if len(spikes) > MAX_NAMED_STEPS else ""
    named = ", ".join(f"{step:.0f}" for step in spikes[:MAX_NAMED_STEPS]) + more
    return Finding(
        "warning",
        "Gradient spikes",
        f"The gradient norm exceeded {GRAD_SPIKE:.0f} times its median ({median:.3g}) at step {named}; the largest is "
        f"{norms.max():.3g}. Look at the pairs of those steps; raise optim.pairs_per_step or optim.warmup_steps.",
    )


def clipping_is_not_the_rule(record: RunRecord) -> Finding | None:
    """Gradients above the clipping norm in nearly every step."""
    limit = record.setting("optim.max_grad_norm")
    norms = record.over_steps("optim/grad_norm")[1]
    if limit is None or len(norms) < GRAD_SPIKE_MIN_STEPS:
        return None
    share = float(np.mean(norms > limit))
    if share < CLIPPED_SHARE:
        return Finding("ok", "Not every step is clipped", f"{share:.0%} of steps were clipped at a norm of {limit:g}.")
    return Finding(
        "note",
        "Nearly every step is clipped",
        f"{share:.0%} of steps had a gradient norm above optim.max_grad_norm = {limit:g} (median "
        f"{np.median(norms):.3g}), so the step size no longer follows the gradient. Harmless while the loss falls; "
        "otherwise raise the limit.",
    )


def judge_score_rises(record: RunRecord) -> Finding | None:
    """Whether the judge likes the completions better after training than before."""
    gain = record.score_gain
    if gain is not None:
        where = f"on the same {count_noun(gain.prompts, 'held-out prompt')}"
        before, after = indistinguishable(gain.before, gain.after)
        figures = f"{before} before and {after} after {where} ({gain.mean:+.2g} ± {gain.error:.1g})"
        change, noise = gain.mean, SCORE_NOISE_SE * gain.error
    else:
        scores = record.over_rounds("judge/mean_score")[1]
        if len(scores) < TREND_MIN_ROUNDS:
            return None
        early, late = np.array_split(scores, 2)
        change = float(late.mean() - early.mean())
        noise = SCORE_NOISE_SE * math.sqrt(early.var(ddof=1) / len(early) + late.var(ddof=1) / len(late))
        before, after = indistinguishable(float(early.mean()), float(late.mean()))
        figures = f"a mean of {before} in the first {len(early)} rounds and {after} after"
    if change > noise:
        return Finding("ok", "The judge score rose", f"Judge score: {figures}.")
    fell = change < -noise
    return Finding(
        "warning",
        "The judge score fell" if fell else "The judge score did not clearly rise",
        f"Judge score: {figures}. "
        + (
            "Lower optim.lr or raise loss.beta, and read the samples for what got worse."
            if fell
            else "Train longer, raise optim.lr, lower loss.beta, draw more online.candidates, or judge more held-out "
            "prompts to tell a small gain from chance."
        ),
    )


def few_ties(record: RunRecord) -> Finding | None:
    """Prompts whose candidates the judge could not tell apart."""
    kept, dropped = record.kept_and_dropped
    total = kept + sum(dropped.values())
    if not total:
        return None
    share = dropped.get("tie", 0) / total
    if share <= TIE_SHARE:
        return Finding("ok", "Few ties", f"{share:.0%} of {total:,.0f} prompts were dropped as ties.")
    return Finding(
        "warning",
        "Many ties",
        f"{share:.0%} of {total:,.0f} prompts were dropped because the judge scored their candidates alike. Raise "
        "online.candidates or online.sampling.temperature, or use a judge with a finer scale.",
    )


def few_dropped(record: RunRecord) -> Finding | None:
    """Prompts lost for reasons other than ties."""
    kept, dropped = record.kept_and_dropped
    others = Counter({reason: count for reason, count in dropped.items() if reason != "tie"})
    total = kept + sum(dropped.values())
    if not total or sum(others.values()) / total <= DROP_SHARE:
        return None
    reason, count = others.most_common(1)[0]
    return Finding(
        "warning",
        "Many prompts gave no pair",
        f"{sum(others.values()) / total:.0%} of {total:,.0f} prompts were dropped, most often for '{reason}' "
        f"({count:,.0f} times). rounds/*/pairs.jsonl names the reason beside each prompt.",
    )


def completions_end(record: RunRecord) -> Finding | None:
    """Candidates that the token limit cut."""
    finished = [c["finished"] for group in record.samples for c in group.get("candidates") or () if "finished" in c]
    if not finished:
        return None
    share = 1 - sum(map(bool, finished)) / len(finished)
    limit = record.setting("online.sampling.max_tokens")
    limited = f"the limit of {limit} tokens" if limit else "the token limit"
    figures = f"{share:.0%} of {len(finished):,} candidates of round {record.samples_round} were cut by {limited}"
    if share > CUT_SHARE_WARNING:
        return Finding(
            "warning",
            "Most completions are cut off",
            f"{figures}, so the judge reads unfinished text and the policy never learns to end. Raise "
            "online.sampling.max_tokens, check the chat template's end of turn, or set online.sampling.stop.",
        )
    if share > CUT_SHARE_NOTE:
        return Finding(
            "note", "Some completions are cut off", f"{figures}. Raising online.sampling.max_tokens may help."
        )
    return Finding("ok", "Completions end by themselves", f"{figures}.")


def trainers_are_busy(record: RunRecord) -> Finding | None:
    """Time that training workers spend waiting for pairs."""
    train, sync, wait = (float(record.over_rounds(f"perf/{phase}_s")[1].sum()) for phase in ("train", "sync", "wait"))
    if not train or not wait:
        return None
    share = wait / (train + sync + wait)
    if share <= WAIT_SHARE:
        return Finding("ok", "Training workers are busy", f"They waited for pairs {share:.0%} of the time.")
    return Finding(
        "note",
        "Training waits for pairs",
        f"Training workers waited {share:.0%} of the time. Add cluster.rollout_engines, or let generation run ahead of "
        f"training with online.max_lag (now {record.setting('online.max_lag', 0)}).",
    )


RULES: tuple[Rule, ...] = (
    values_are_finite,
    first_loss_is_ln2,
    judge_score_rises,
    kl_is_moderate,
    length_is_steady,
    chosen_holds,
    not_saturated,
    eval_loss_kept_falling,
    few_ties,
    few_dropped,
    completions_end,
    gradients_are_calm,
    clipping_is_not_the_rule,
    trainers_are_busy,
)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Mean of the first and of the last tenth of a series (at least one value each)."""
    tenth = max(1, len(values) // 10)
    return float(values[:tenth].mean()), float(values[-tenth:].mean())
