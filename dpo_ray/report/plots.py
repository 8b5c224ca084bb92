"""The pictures of a run as inline SVG: one function a picture, each with a sentence on how to read it.

A picture whose data the run does not hold is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator

from dpo_ray.report.drawing import (
    SMALL_PT,
    Swatch,
    draw_heldout,
    draw_level,
    draw_line,
    draw_stack,
    has_any,
    legend_of,
    legend_of_both,
    light,
    panels,
    set_swept_axis,
    svg_of,
    tick_text,
)  # fmt: skip
from dpo_ray.report.record import RunRecord

DROP_COLOURS = ("rejected", "sand", "rose", "stone", "heldout", "policy")
"""One a reason, in the order of first appearance; used again from the start where there are more."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing with the words around it."""

    title: str
    svg: str
    reading: str
    """One plain sentence: how to read it."""
    legend: tuple[Swatch, ...] = ()


def run_pictures(record: RunRecord) -> list[Picture]:
    """Every picture that the run has data for, the most telling first."""
    return [picture for draw in PICTURES if (picture := draw(record)) is not None]


def judge_score(record: RunRecord) -> Picture | None:
    """Judge scores of the candidates by round, with the held-out prompts' mean."""
    lines = {
        "rejected": record.over_rounds("judge/rejected_score"),
        "policy": record.over_rounds("judge/mean_score"),
        "chosen": record.over_rounds("judge/chosen_score"),
    }
    heldout = record.over_versions("score")
    if not has_any(*lines.values(), heldout):
        return None
    figure, (axes,) = panels(["judge score"], "round", heights=[1.25])
    for colour, line in lines.items():
        draw_line(axes, line, colour)
    draw_heldout(axes, heldout, labelled=True)
    legend = legend_of(
        (lines["chosen"], Swatch("chosen candidate", "chosen")),
        (lines["policy"], Swatch("mean of all candidates", "policy")),
        (lines["rejected"], Swatch("rejected candidate", "rejected")),
        (heldout, Swatch("held-out prompts", "heldout", "point")),
    )
    reading = (
        "The held-out mean is the result: the same prompts, never trained on, before the first round and after; "
        "the lines are each round's fresh prompts."
    )
    return Picture("Judge score by round", svg_of(figure, "judge"), reading, legend)


def margin_and_accuracy(record: RunRecord) -> Picture | None:
    """Reward margin and accuracy over steps, with held-out pairs."""
    margins, accuracies = record.over_steps("rewards/margins"), record.over_steps("rewards/accuracies")
    eval_margins, eval_accuracies = record.over_evals("eval/rewards/margins"), record.held_out_accuracy
    if not has_any(margins, accuracies, eval_margins, eval_accuracies):
        return None
    figure, (upper, lower) = panels(["reward margin", "accuracy (share of pairs)"], "optimizer step")
    draw_line(upper, margins, "policy", noisy=True)
    draw_heldout(upper, eval_margins)
    draw_level(upper, 0.0)
    draw_line(lower, accuracies, "policy", noisy=True)
    draw_heldout(lower, eval_accuracies)
    draw_level(lower, 0.5)
    lower.set_ylim(-0.03, 1.03)
    reading = (
        "Both should rise and then level off; held-out points that stay behind the line mean that the pairs are being "
        "learnt by heart. An accuracy of 0.5 is chance."
    )
    legend = legend_of_both((margins, accuracies), (eval_margins, eval_accuracies))
    return Picture("Reward margin and accuracy", svg_of(figure, "margin"), reading, legend)


def loss(record: RunRecord) -> Picture | None:
    """The loss over steps, with held-out pairs and ln 2."""
    train, heldout = record.over_steps("loss"), record.over_evals("eval/loss")
    if not has_any(train, heldout):
        return None
    sigmoid = record.setting("loss.use") == "sigmoid"
    figure, (axes,) = panels(["loss (nats)" if sigmoid else "loss"], "optimizer step", heights=[1.25])
    draw_line(axes, train, "policy", noisy=True)
    draw_heldout(axes, heldout)
    legend = legend_of_both((train,), (heldout,))
    reading = "The lower, the better the policy tells chosen from rejected."
    if sigmoid:
        draw_level(axes, math.log(2))
        legend += (Swatch("ln 2", "faint", "dashed"),)
        reading = (
            "It starts at ln 2 = 0.693, where the policy equals its reference, and falls as chosen and rejected part."
        )
    return Picture("Loss", svg_of(figure, "loss"), reading, legend)


def logps(record: RunRecord) -> Picture | None:
    """Log-probabilities of chosen and rejected completions over steps."""
    chosen, rejected = record.over_steps("logps/chosen"), record.over_steps("logps/rejected")
    if not has_any(chosen, rejected):
        return None
    figure, (axes,) = panels(["nats per completion"], "optimizer step", heights=[1.25])
    draw_line(axes, rejected, "rejected", noisy=True)
    draw_line(axes, chosen, "chosen", noisy=True)
    reading = (
        "Rejected should fall; chosen may fall a little with it. Both falling fast means that the policy's weight goes "
        "elsewhere. Longer completions also lie lower."
    )
    legend = legend_of((chosen, Swatch("chosen", "chosen")), (rejected, Swatch("rejected", "rejected")))
    return Picture("Log-probability of chosen and rejected", svg_of(figure, "logps"), reading, legend)


def kl(record: RunRecord) -> Picture | None:
    """Distance of the policy from its reference by round."""
    rounds, heldout = record.over_rounds("kl"), record.over_versions("kl")
    if not has_any(rounds, heldout):
        return None
    figure, (axes,) = panels(["nats per completion"], "round", heights=[1.25])
    draw_line(axes, rounds, "policy")
    draw_heldout(axes, heldout)
    draw_level(axes, 0.0)
    reading = (
        "How far the policy has moved from its reference, on its own completions: the price of the score. A steep rise "
        "without a gain in score is a judge being gamed."
    )
    legend = legend_of(
        (rounds, Swatch("completions of the round", "policy")),
        (heldout, Swatch("held-out prompts", "heldout", "point")),
    )
    return Picture("KL to the reference", svg_of(figure, "kl"), reading, legend)


def completion_length(record: RunRecord) -> Picture | None:
    """Mean completion length by round."""
    rounds, heldout = record.over_rounds("rollout/mean_tokens"), record.over_versions("tokens")
    if not has_any(rounds, heldout):
        return None
    figure, (axes,) = panels(["tokens per completion"], "round", heights=[1.25])
    draw_line(axes, rounds, "policy")
    draw_heldout(axes, heldout)
    axes.set_ylim(bottom=0)
    reading = (
        "A level line is reassuring; a climb beside a climbing score means that the judge may be paying for length."
    )
    legend = legend_of(
        (rounds, Swatch("completions of the round", "policy")),
        (heldout, Swatch("held-out prompts", "heldout", "point")),
    )
    return Picture("Completion length", svg_of(figure, "length"), reading, legend)


def gradient_and_rate(record: RunRecord) -> Picture | None:
    """Gradient norm and learning rate over steps."""
    norms, rate = record.over_steps("optim/grad_norm"), record.over_steps("optim/lr")
    if not has_any(norms, rate):
        return None
    figure, (upper, lower) = panels(["gradient norm, before clipping", "learning rate"], "optimizer step")
    draw_line(upper, norms, "policy", noisy=True, peaks=True)
    positive = norms[1][norms[1] > 0]
    legend: tuple[Swatch, ...] = ()
    if len(positive) and positive.max() > 20 * np.median(positive):
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter(FuncFormatter(tick_text))
        upper.yaxis.set_minor_locator(NullLocator())
    else:
        upper.set_ylim(bottom=0)
    limit = record.setting("optim.max_grad_norm")
    if limit and len(positive) and limit < 1.5 * positive.max():
        draw_level(upper, limit)
        legend = (Swatch(f"clipped above {limit:g}", "faint", "dashed"),)
    draw_line(lower, rate, "sand")
    lower.set_ylim(bottom=0)
    reading = "Single peaks in the norm are bad batches; a norm that keeps growing calls for a lower learning rate."
    return Picture("Gradient norm and learning rate", svg_of(figure, "gradient"), reading, legend)


def time_by_phase(record: RunRecord) -> Picture | None:
    """Seconds of each round by phase: the engines' side and the trainers' side."""
    sides = (
        (-0.21, (("generate", "policy"), ("judge", "heldout"))),
        (0.21, (("train", "chosen"), ("sync", "sand"), ("wait", "stone"))),
    )
    phases = {name: record.over_rounds(f"perf/{name}_s") for _, side in sides for name, _ in side}
    if not has_any(*phases.values()):
        return None
    figure, (axes,) = panels(["seconds per round"], "round", heights=[1.25])
    for offset, side in sides:
        draw_stack(axes, [(phases[name], colour) for name, colour in side], offset=offset, width=0.38)
    legend = legend_of(*((phases[name], Swatch(name, colour, "box")) for _, side in sides for name, colour in side))
    reading = (
        "Left bar of a round: the engines generate and the judge scores. Right bar: the training workers train, send "
        "weights, and wait for pairs. Much waiting calls for more engines or for online.max_lag."
    )
    return Picture("Where the time goes", svg_of(figure, "time"), reading, legend)


def kept_and_dropped(record: RunRecord) -> Picture | None:
    """What became of each round's prompts."""
    reasons = sorted({key for line in record.rounds for key in line if key.startswith("rollout/dropped_")})
    kept = record.over_rounds("rollout/kept")
    dropped = [(reason.removeprefix("rollout/dropped_"), record.over_rounds(reason)) for reason in reasons]
    dropped = [(reason, line) for reason, line in dropped if line[1].sum() > 0]
    if not has_any(kept, *(line for _, line in dropped)):
        return None
    figure, (axes,) = panels(["prompts"], "round", heights=[1.25])
    coloured = [(reason, line, DROP_COLOURS[i % len(DROP_COLOURS)]) for i, (reason, line) in enumerate(dropped)]
    draw_stack(axes, [(kept, "chosen"), *((line, colour) for _, line, colour in coloured)], width=0.66)
    legend = (
        Swatch("kept as a pair", "chosen", "box"),
        *(Swatch(f"dropped: {reason.replace('_', ' ')}", colour, "box") for reason, _, colour in coloured),
    )
    reading = "Every prompt of a round is in its bar: what is not kept was generated and judged for nothing."
    return Picture("Pairs kept and dropped", svg_of(figure, "kept"), reading, legend)


PICTURES: tuple[Callable[[RunRecord], Picture | None], ...] = (
    judge_score,
    kl,
    margin_and_accuracy,
    gradient_and_rate,
    loss,
    logps,
    completion_length,
    kept_and_dropped,
    time_by_phase,
)


def sweep_picture(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str, mode: str) -> Picture | None:
    """The metric of each trial over the first two swept numbers, the best one ringed.

    Args:
        rows: trials, each with a finite ``metric`` and every one of ``keys``.
        keys: swept keys with numeric values; two give a map, one gives a curve, none gives no picture.
        mode: min | max, which end of the metric is good.
    """
    if not rows or not keys:
        return None
    values = np.array([float(row[metric]) for row in rows])
    best = int(values.argmin() if mode == "min" else values.argmax())
    x = np.array([float(row[keys[0]]) for row in rows])
    y = np.array([float(row[keys[1]]) for row in rows]) if len(keys) > 1 else values
    figure, (axes,) = panels([keys[1] if len(keys) > 1 else metric], keys[0], heights=[1.5])
    set_swept_axis(axes, "x", x)
    if len(keys) > 1:
        set_swept_axis(axes, "y", y)
        dots = axes.scatter(
            x,
            y,
            c=values,
            cmap="viridis" if mode == "max" else "viridis_r",
            s=110,
            zorder=3,
            edgecolors=light("stone"),
            linewidths=0.9,
        )
        bar = figure.colorbar(dots, ax=axes, pad=0.02, aspect=28, format=FuncFormatter(tick_text))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=SMALL_PT, labelcolor=light("faint"))
        reading = f"Each dot is a trial, coloured by {metric}; the ring marks the best one ({tick_text(values[best])})."
    else:
        axes.scatter(x, y, color=light("policy"), s=60, zorder=3)
        reading = f"Each dot is a trial; the ring marks the best {metric} ({tick_text(values[best])})."
    axes.margins(0.12, 0.2)
    axes.scatter(x[best], y[best], s=330, facecolors="none", edgecolors=light("rejected"), linewidths=2.2, zorder=4)
    if len(rows) <= 16 and len(keys) > 1:
        for value, left, up in zip(values, x, y, strict=True):
            axes.annotate(
                tick_text(value),
                (left, up),
                xytext=(0, -24),
                textcoords="offset points",
                ha="center",
                fontsize=SMALL_PT,
                color=light("ink"),
                parse_math=False,
            )
    title = f"{metric} over {' and '.join(keys[:2])}"
    return Picture(title, svg_of(figure, "sweep"), reading, (Swatch("best trial", "rejected", "ring"),))
