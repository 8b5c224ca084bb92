"""Checks of a run's numbers, each with a finding in plain words and the key to change.

A check is named by the healthy state. It returns one finding, or None where the run has no data for it.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from dpo_ray.report.formatting import count_noun, same_decimals
from dpo_ray.report.record import SCORE_NOISE_SE, RunRecord
from dpo_ray.types import is_finite

Level = Literal["warning", "note", "ok"]


class Finding(NamedTuple):
    """The result of a check."""

    level: Level
    """warning: look at it before trusting the run. note: worth knowing. ok: checked and fine."""
    title: str
    text: str
    """The numbers, and what to do about them."""


warning, note, ok = (partial(Finding, level) for level in ("warning", "note", "ok"))

FIRST_LOSS_TOLERANCE = 0.02  # nats around ln 2; before the first update every margin is 0 up to rounding
CHOSEN_FALL_NATS = 20.0  # per chosen completion: an implicit reward of -2 at beta = 0.1, as large as typical margins
CHOSEN_NOISE_NATS = 2.0  # a smaller fall is within the noise of a batch
SATURATED_MARGIN = 5.0  # sigmoid(-5) = 0.7 %: a pair at this margin has almost no gradient left
SATURATED_ACCURACY = 0.98
EVAL_LOSS_RISE = 0.02  # nats above the minimum that are not noise
KL_HIGH_NATS = 30.0  # per completion: the reference would rarely generate the policy's completions
KL_NOTABLE_NATS = 15.0
LENGTH_DRIFT = 1 / 3  # judges often favor length; such a change can explain a better score without better text
GRAD_SPIKE = 10.0  # multiple of the median gradient norm
GRAD_MIN_STEPS = 10  # fewer steps have no meaningful median
CLIPPED_SHARE = 0.95  # of steps: the clipping norm then sets the size of nearly every step
TREND_MIN_ROUNDS = 4  # two rounds on each side of a comparison
TIE_SHARE = 0.3  # of prompts: a third of the generated tokens then gives no training signal
DROP_SHARE = 0.3  # of prompts, over all reasons other than ties
TRUNCATED_SHARE_WARNING = 0.5  # of candidates: the judge then mostly reads unfinished text
TRUNCATED_SHARE_NOTE = 0.2
WAIT_SHARE = 0.5  # of the training workers' time: they wait more than they train
MAX_NAMED_STEPS = 4  # that a text lists one by one


def diagnose(record: RunRecord) -> list[Finding]:
    """The findings of all checks that apply to the run, warnings first."""
    findings = [finding for check in CHECKS if (finding := check(record)) is not None]
    order: tuple[Level, ...] = ("warning", "note", "ok")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def values_are_finite(record: RunRecord) -> Finding | None:
    """Warns if a loss, gradient or reward is NaN or infinite: such steps are skipped, and many of them end a run."""
    if not record.steps:
        return None
    watched = ("loss", "optim/grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    nonfinite = [
        (line["step"], key) for line in record.steps for key in watched if key in line and not is_finite(line[key])
    ]
    if not nonfinite:
        return ok("All values are finite", f"No NaN or infinity in {count_noun(len(record.steps), 'step')}.")
    step, key = nonfinite[0]
    return warning(
        "NaN or infinite values",
        f"{key} is not finite from step {step}; {count_noun(len({step for step, _ in nonfinite}), 'step')} of "
        f"{len(record.steps)} affected. Steps whose loss or gradient is not finite are skipped; the workers' logs name "
        f"their {record.examples}. Inspect these, lower optim.lr or raise optim.warmup_steps.",
    )


def first_loss_is_ln2(record: RunRecord) -> Finding | None:
    """Warns if the first sigmoid loss is not ln 2, its value for any data while the policy equals the reference."""
    steps, losses = record.over_steps("loss")
    weighted = record.setting("loss.weights") or record.setting("loss.weighting") == "wpo"
    if record.setting("loss.use") != "sigmoid" or weighted or len(steps) == 0 or steps[0] > 1:
        return None
    if abs(losses[0] - math.log(2)) <= FIRST_LOSS_TOLERANCE:
        return ok("Training starts at the reference", f"The first loss is {losses[0]:.4f}; ln 2 = 0.6931.")
    return warning(
        "The reference does not match the policy",
        f"The first loss is {losses[0]:.4f}; with equal policy and reference it is ln 2 = 0.6931 within "
        f"{FIRST_LOSS_TOLERANCE}. Check that the reference is the model in model.path with the same chat template and "
        "the same model.dtype, and that reference.cache_dir has no entries of other weights.",
    )


def chosen_stays_likely(record: RunRecord) -> Finding | None:
    """Warns if chosen completions become much less likely while the margin grows.

    Measured by the log ratio to the reference, which depends less on the lengths of a batch's pairs than the
    log-probability does; by the latter if beta is unknown.
    """
    beta = record.setting("loss.beta")
    chosen = record.over_steps("rewards/chosen")[1] / beta if beta else record.over_steps("logps/chosen")[1]
    margins = record.over_steps("rewards/margins")[1]
    if len(chosen) < 2 or len(margins) < 2:
        return None
    (first_margin, last_margin), (first, last) = _ends(margins), _ends(chosen)
    fall, completions = first - last, f"{record.roles[0].capitalize()} completions"
    if fall > CHOSEN_FALL_NATS and last_margin > first_margin:
        return warning(
            f"{completions} became less likely",
            f"Their log-probability fell by {fall:.1f} nats per completion while the margin grew from "
            f"{first_margin:.2f} to {last_margin:.2f}: probability moves to completions that the data does not have. "
            "Raise loss.beta, lower optim.lr, stop earlier, or use a loss that anchors these completions.",
        )
    if fall > CHOSEN_NOISE_NATS:
        return note(
            f"{completions} became slightly less likely",
            f"Their log-probability fell by {fall:.1f} nats per completion. Often {' and '.join(record.roles)} fall "
            f"together; more than {CHOSEN_FALL_NATS:.0f} nats is a concern.",
        )
    change = f"rose by {-fall:.1f}" if fall < 0 else f"fell by {fall:.1f}"
    return ok(f"{completions} stayed likely", f"Their log-probability {change} nats per completion.")


def training_is_not_saturated(record: RunRecord) -> Finding | None:
    """Warns if nearly all training examples have a wide margin: further steps only fit noise."""
    margins, accuracies = record.over_steps("rewards/margins")[1], record.over_steps("rewards/accuracies")[1]
    if len(margins) < 2 or len(accuracies) < 2:
        return None
    margin, accuracy, examples = _ends(margins)[1], _ends(accuracies)[1], record.examples
    figures = f"At the end {accuracy:.0%} of training {examples} {record.learned}, with a mean margin of {margin:.2f}"
    if accuracy < SATURATED_ACCURACY or margin < SATURATED_MARGIN:
        return ok(f"Training {examples} still have gradient", f"{figures}.")
    return warning(
        f"Training {examples} are memorized",
        f"{figures}. Use fewer run.epochs (online: online.epochs_per_round), lower optim.lr, or raise loss.beta, and "
        f"compare with held-out {examples}.",
    )


def eval_loss_keeps_falling(record: RunRecord) -> Finding | None:
    """Warns if the held-out loss ends above its minimum, a sign of overfitting."""
    steps, losses = record.over_evals("eval/loss")
    if len(losses) < 3:
        return None
    best = int(np.argmin(losses))
    if losses[-1] - losses[best] <= EVAL_LOSS_RISE:
        return ok("Held-out loss did not rise", f"It went from {losses[0]:.4f} to {losses[-1]:.4f}.")
    return warning(
        "Held-out loss rose again",
        f"It was lowest at step {steps[best]:.0f} ({losses[best]:.4f}) and ended at {losses[-1]:.4f}. Stop near that "
        f"step (run.steps={steps[best]:.0f}) or lower optim.lr.",
    )


def kl_is_moderate(record: RunRecord) -> Finding | None:
    """Warns if the KL divergence from the reference, on the policy's own completions, is large."""
    if record.kl is None:
        return None
    figures = f"{record.kl:.1f} nats per completion between policy and reference, on the policy's own completions"
    if record.kl > KL_HIGH_NATS:
        return warning(
            "The policy is far from its reference",
            f"{figures}; beyond {KL_HIGH_NATS:.0f} policies often exploit the judge. Read the samples below. Raise "
            "loss.beta, lower optim.lr, or run fewer rounds.",
        )
    if record.kl > KL_NOTABLE_NATS:
        return note("The policy moved away from its reference", f"{figures}; above {KL_HIGH_NATS:.0f} is a warning.")
    return ok("The policy stayed near its reference", f"{figures}.")


def length_is_steady(record: RunRecord) -> Finding | None:
    """Warns if the mean length of completions changes by more than a third."""
    lengths = record.completion_tokens
    if lengths is None or lengths[0] <= 0:
        return None
    before, after = lengths
    change = after / before - 1
    figures = f"Completions went from {before:.0f} to {after:.0f} tokens on average ({change:+.0%})"
    if abs(change) <= LENGTH_DRIFT:
        return ok("Completion length is steady", f"{figures}.")
    explained = f"{figures}: part of any change in score may be length."
    if change > 0:
        advice = "If length is not the goal, penalize it in the judge or use a length-normalized loss."
        return warning("Completions grew longer", f"{explained} {advice}")
    advice = "Check that answers are still complete, and that the judge does not reward brevity alone."
    return warning("Completions grew shorter", f"{explained} {advice}")


def gradients_have_no_spikes(record: RunRecord) -> Finding | None:
    """Warns if a step has a gradient norm above 10 times the median."""
    steps, norms = record.over_steps("optim/grad_norm")
    if len(norms) < GRAD_MIN_STEPS:
        return None
    median, largest = float(np.median(norms)), norms.max()
    spikes = [f"{step:.0f}" for step in steps[norms > GRAD_SPIKE * median]]
    if not spikes:
        return ok("No gradient spikes", f"Median norm {median:.3g}, largest {largest:.3g} (before clipping).")
    more = f" and {len(spikes) - MAX_NAMED_STEPS} more" if len(spikes) > MAX_NAMED_STEPS else ""
    return warning(
        "Gradient spikes",
        f"The gradient norm exceeded {GRAD_SPIKE:.0f} times its median ({median:.3g}) at step "
        f"{', '.join(spikes[:MAX_NAMED_STEPS])}{more}; the largest is {largest:.3g}. Inspect their "
        f"{record.examples}; raise optim.pairs_per_step or optim.warmup_steps.",
    )


def clipping_is_rare(record: RunRecord) -> Finding | None:
    """Notes if >= 95 % of steps exceed optim.max_grad_norm."""
    limit = record.setting("optim.max_grad_norm")
    norms = record.over_steps("optim/grad_norm")[1]
    if limit is None or len(norms) < GRAD_MIN_STEPS:
        return None
    share = float(np.mean(norms > limit))
    if share < CLIPPED_SHARE:
        return ok("Not every step is clipped", f"{share:.0%} of steps were clipped at a norm of {limit:g}.")
    return note(
        "Nearly every step is clipped",
        f"{share:.0%} of steps had a gradient norm above optim.max_grad_norm = {limit:g} (median "
        f"{np.median(norms):.3g}), so the step size does not follow the gradient. Harmless while the loss falls; "
        "otherwise raise the limit.",
    )


def judge_score_rises(record: RunRecord) -> Finding | None:
    """Warns if the judge score did not rise by more than its noise."""
    gain = record.score_gain
    if gain is not None:
        change, noise = gain.mean, SCORE_NOISE_SE * gain.error
        before, after = same_decimals(gain.before, gain.after)
        figures = (
            f"{before} before and {after} after on the same {count_noun(gain.prompts, 'held-out prompt')} "
            f"({gain.mean:+.2g} ± {gain.error:.1g})"
        )
    else:
        scores = record.over_rounds("judge/mean_score")[1]
        if len(scores) < TREND_MIN_ROUNDS:
            return None
        early, late = np.array_split(scores, 2)
        change = float(late.mean() - early.mean())
        noise = SCORE_NOISE_SE * math.sqrt(early.var(ddof=1) / len(early) + late.var(ddof=1) / len(late))
        before, after = same_decimals(early.mean(), late.mean())
        figures = f"a mean of {before} in the first {len(early)} rounds and {after} after"
    if change > noise:
        return ok("The judge score rose", f"Judge score: {figures}.")
    if change < -noise:
        advice = "Lower optim.lr or raise loss.beta, and read the samples to see which answers got worse."
        return warning("The judge score fell", f"Judge score: {figures}. {advice}")
    return warning(
        "The judge score did not clearly rise",
        f"Judge score: {figures}. Train longer, raise optim.lr, lower loss.beta, raise online.candidates, or judge "
        "more held-out prompts to detect a small gain.",
    )


def few_ties(record: RunRecord) -> Finding | None:
    """Warns if many prompts give no pair, because all their candidates have the same judge score."""
    dropped, total = record.dropped, record.prompts
    if not total:
        return None
    share = dropped.get("tie", 0) / total
    if share <= TIE_SHARE:
        return ok("Few ties", f"{share:.0%} of {total:,.0f} prompts were dropped as ties.")
    return warning(
        "Many ties",
        f"{share:.0%} of {total:,.0f} prompts were dropped because all their candidates have the same judge score. "
        "Raise online.candidates or online.sampling.temperature, or use a judge with a finer scale.",
    )


def few_dropped(record: RunRecord) -> Finding | None:
    """Warns if many prompts are dropped for other reasons than ties."""
    others = Counter({reason: count for reason, count in record.dropped.items() if reason != "tie"})
    if others.total() <= DROP_SHARE * record.prompts:
        return None
    reason, count = others.most_common(1)[0]
    return warning(
        "Many prompts gave no pair",
        f"{others.total() / record.prompts:.0%} of {record.prompts:,.0f} prompts were dropped, most often for "
        f"'{reason}' ({count:,.0f} times). rounds/*/pairs.jsonl has the reason of each prompt.",
    )


def completions_end(record: RunRecord) -> Finding | None:
    """Warns if more than half of the candidates are truncated by the token limit."""
    finished = [c["finished"] for group in record.groups for c in group.get("candidates") or () if "finished" in c]
    if not finished:
        return None
    share = 1 - sum(map(bool, finished)) / len(finished)
    limit = record.setting("online.sampling.max_tokens")
    limited = f"the limit of {limit} tokens" if limit else "the token limit"
    figures = f"{share:.0%} of {len(finished):,} candidates of round {record.groups_round} were truncated at {limited}"
    if share > TRUNCATED_SHARE_WARNING:
        return warning(
            "Most completions are truncated",
            f"{figures}, so the judge reads unfinished text and the policy never learns to end. Raise "
            "online.sampling.max_tokens, check the chat template's end of turn, or set online.sampling.stop.",
        )
    if share > TRUNCATED_SHARE_NOTE:
        return note("Some completions are truncated", f"{figures}. Raising online.sampling.max_tokens may help.")
    return ok("Most completions end before the limit", f"{figures}.")


def trainers_are_busy(record: RunRecord) -> Finding | None:
    """Notes if training workers wait for pairs more than half of the time."""
    train, sync, wait = (float(record.over_rounds(f"perf/{phase}_s")[1].sum()) for phase in ("train", "sync", "wait"))
    if not train or not wait:
        return None
    share = wait / (train + sync + wait)
    if share <= WAIT_SHARE:
        return ok("Training workers are busy", f"They waited for pairs {share:.0%} of the time.")
    return note(
        "Training waits for pairs",
        f"Training workers waited {share:.0%} of the time. Add cluster.rollout_engines, or let generation run ahead of "
        f"training with online.max_lag (now {record.setting('online.max_lag', 0)}).",
    )


CHECKS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    values_are_finite,
    first_loss_is_ln2,
    judge_score_rises,
    kl_is_moderate,
    length_is_steady,
    chosen_stays_likely,
    training_is_not_saturated,
    eval_loss_keeps_falling,
    few_ties,
    few_dropped,
    completions_end,
    gradients_have_no_spikes,
    clipping_is_rare,
    trainers_are_busy,
)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Means of the first and of the last tenth of a series, at least one value each."""
    tenth = max(1, len(values) // 10)
    return float(values[:tenth].mean()), float(values[-tenth:].mean())
