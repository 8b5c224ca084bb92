"""The pictures of a run as inline SVG: one function a picture, each with a sentence on how to read it.

Colours leave as CSS variables and text as text, so that a page decides on light or dark and on the font. A picture
whose data the run does not hold is None.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dpo_ray.evaluate.health import alike
from dpo_ray.evaluate.record import Lines, RunRecord

PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#3b4351", "#c9d0db"),
    "faint": ("#6f7887", "#8f99a8"),
    "rule": ("#e4e7ec", "#2d333d"),
    "policy": ("#3a6ea8", "#7fb0e6"),
    "chosen": ("#23897c", "#5cc4b3"),
    "rejected": ("#cc6b3d", "#ee9a6c"),
    "heldout": ("#7b559f", "#bd98e2"),
    "sand": ("#c6a03f", "#dcbc66"),
    "stone": ("#a3abb8", "#69727f"),
    "rose": ("#b9507d", "#e48bb0"),
}
"""Colour of each role on a light and on a dark page. The light ones appear in the SVG until they become variables."""

DROP_COLOURS = ("rejected", "sand", "rose", "stone", "heldout", "policy")
"""One a reason, in the order of first appearance; used again from the start where there are more."""
WIDTH_IN, PANEL_IN = 6.2, 2.35
"""Inches of 72 SVG units: a page about 500 pixels wide shows the text at its nominal size."""
TEXT_PT, SMALL_PT = 11.5, 10.5
MAX_POINTS = 400
"""Points of one line; longer series are averaged in groups, which keeps a page of a long run small."""
MAX_BARS = 40
"""Bars side by side that remain readable; more rounds than that are averaged in groups."""
SMOOTH_FROM = 40
"""Points from which a noisy series is drawn pale with its running mean on top."""
LOG_RATIO = 3.0
"""Ratio of the largest to the smallest value from which an axis of positive values is logarithmic."""


@dataclass(frozen=True, slots=True)
class Swatch:
    """An entry of a legend."""

    label: str
    colour: str
    """A key of ``PALETTE``."""
    mark: str = "line"
    """line | dashed | point | ring | box."""


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
    if not _any(*lines.values(), heldout):
        return None
    figure, (axes,) = _panels(["judge score"], "round", heights=[1.25])
    for colour, line in lines.items():
        _line(axes, line, colour)
    _heldout(axes, heldout, labelled=True)
    legend = _legend(
        (lines["chosen"], Swatch("chosen candidate", "chosen")),
        (lines["policy"], Swatch("mean of all candidates", "policy")),
        (lines["rejected"], Swatch("rejected candidate", "rejected")),
        (heldout, Swatch("held-out prompts", "heldout", "point")),
    )
    reading = (
        "The held-out mean is the result: the same prompts, never trained on, before the first round and after; "
        "the lines are each round's fresh prompts."
    )
    return Picture("Judge score by round", _svg(figure, "judge"), reading, legend)


def margin_and_accuracy(record: RunRecord) -> Picture | None:
    """Reward margin and accuracy over steps, with held-out pairs."""
    margins, accuracies = record.over_steps("rewards/margins"), record.over_steps("rewards/accuracies")
    eval_margins, (eval_steps, accuracy) = (
        record.over_evals("eval/rewards/margins"),
        record.over_evals("eval/rewards/accuracies"),
    )
    # At step 0 all margins are 0, and which side of 0 rounding puts them on says nothing.
    eval_accuracies = (eval_steps[eval_steps > 0], accuracy[eval_steps > 0])
    if not _any(margins, accuracies, eval_margins, eval_accuracies):
        return None
    figure, (upper, lower) = _panels(["reward margin", "accuracy (share of pairs)"], "optimizer step")
    _line(upper, margins, "policy", noisy=True)
    _heldout(upper, eval_margins)
    _level(upper, 0.0)
    _line(lower, accuracies, "policy", noisy=True)
    _heldout(lower, eval_accuracies)
    _level(lower, 0.5)
    lower.set_ylim(-0.03, 1.03)
    reading = (
        "Both should rise and then level off; held-out points that stay behind the line mean that the pairs are being "
        "learnt by heart. An accuracy of 0.5 is chance."
    )
    legend = _train_and_heldout((margins, accuracies), (eval_margins, eval_accuracies))
    return Picture("Reward margin and accuracy", _svg(figure, "margin"), reading, legend)


def loss(record: RunRecord) -> Picture | None:
    """The loss over steps, with held-out pairs and ln 2."""
    train, heldout = record.over_steps("loss"), record.over_evals("eval/loss")
    if not _any(train, heldout):
        return None
    sigmoid = record.setting("loss.use") == "sigmoid"
    figure, (axes,) = _panels(["loss (nats)" if sigmoid else "loss"], "optimizer step", heights=[1.25])
    _line(axes, train, "policy", noisy=True)
    _heldout(axes, heldout)
    legend = _train_and_heldout((train,), (heldout,))
    reading = "The lower, the better the policy tells chosen from rejected."
    if sigmoid:
        _level(axes, math.log(2))
        legend += (Swatch("ln 2", "faint", "dashed"),)
        reading = (
            "It starts at ln 2 = 0.693, where the policy equals its reference, and falls as chosen and rejected part."
        )
    return Picture("Loss", _svg(figure, "loss"), reading, legend)


def logps(record: RunRecord) -> Picture | None:
    """Log-probabilities of chosen and rejected completions over steps."""
    chosen, rejected = record.over_steps("logps/chosen"), record.over_steps("logps/rejected")
    if not _any(chosen, rejected):
        return None
    figure, (axes,) = _panels(["nats per completion"], "optimizer step", heights=[1.25])
    _line(axes, rejected, "rejected", noisy=True)
    _line(axes, chosen, "chosen", noisy=True)
    reading = (
        "Rejected should fall; chosen may fall a little with it. Both falling fast means that the policy's weight goes "
        "elsewhere. Longer completions also lie lower."
    )
    legend = _legend((chosen, Swatch("chosen", "chosen")), (rejected, Swatch("rejected", "rejected")))
    return Picture("Log-probability of chosen and rejected", _svg(figure, "logps"), reading, legend)


def kl(record: RunRecord) -> Picture | None:
    """Distance of the policy from its reference by round."""
    rounds, heldout = record.over_rounds("kl"), record.over_versions("kl")
    if not _any(rounds, heldout):
        return None
    figure, (axes,) = _panels(["nats per completion"], "round", heights=[1.25])
    _line(axes, rounds, "policy")
    _heldout(axes, heldout)
    _level(axes, 0.0)
    reading = (
        "How far the policy has moved from its reference, on its own completions: the price of the score. A steep rise "
        "without a gain in score is a judge being gamed."
    )
    legend = _legend(
        (rounds, Swatch("completions of the round", "policy")),
        (heldout, Swatch("held-out prompts", "heldout", "point")),
    )
    return Picture("KL to the reference", _svg(figure, "kl"), reading, legend)


def completion_length(record: RunRecord) -> Picture | None:
    """Mean completion length by round."""
    rounds, heldout = record.over_rounds("rollout/mean_tokens"), record.over_versions("tokens")
    if not _any(rounds, heldout):
        return None
    figure, (axes,) = _panels(["tokens per completion"], "round", heights=[1.25])
    _line(axes, rounds, "policy")
    _heldout(axes, heldout)
    axes.set_ylim(bottom=0)
    reading = (
        "A level line is reassuring; a climb beside a climbing score means that the judge may be paying for length."
    )
    legend = _legend(
        (rounds, Swatch("completions of the round", "policy")),
        (heldout, Swatch("held-out prompts", "heldout", "point")),
    )
    return Picture("Completion length", _svg(figure, "length"), reading, legend)


def gradient_and_rate(record: RunRecord) -> Picture | None:
    """Gradient norm and learning rate over steps."""
    norms, rate = record.over_steps("optim/grad_norm"), record.over_steps("optim/lr")
    if not _any(norms, rate):
        return None
    figure, (upper, lower) = _panels(["gradient norm, before clipping", "learning rate"], "optimizer step")
    _line(upper, norms, "policy", noisy=True, peaks=True)
    positive = norms[1][norms[1] > 0]
    legend: tuple[Swatch, ...] = ()
    if len(positive) and positive.max() > 20 * np.median(positive):
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter(FuncFormatter(_tick))
        upper.yaxis.set_minor_locator(NullLocator())
    else:
        upper.set_ylim(bottom=0)
    limit = record.setting("optim.max_grad_norm")
    if limit and len(positive) and limit < 1.5 * positive.max():
        _level(upper, limit)
        legend = (Swatch(f"clipped above {limit:g}", "faint", "dashed"),)
    _line(lower, rate, "sand")
    lower.set_ylim(bottom=0)
    reading = "Single peaks in the norm are bad batches; a norm that keeps growing calls for a lower learning rate."
    return Picture("Gradient norm and learning rate", _svg(figure, "gradient"), reading, legend)


def time_by_phase(record: RunRecord) -> Picture | None:
    """Seconds of each round by phase: the engines' side and the trainers' side."""
    sides = (
        (-0.21, (("generate", "policy"), ("judge", "heldout"))),
        (0.21, (("train", "chosen"), ("sync", "sand"), ("wait", "stone"))),
    )
    phases = {name: record.over_rounds(f"perf/{name}_s") for _, side in sides for name, _ in side}
    if not _any(*phases.values()):
        return None
    figure, (axes,) = _panels(["seconds per round"], "round", heights=[1.25])
    for offset, side in sides:
        _stack(axes, [(phases[name], colour) for name, colour in side], offset=offset, width=0.38)
    legend = _legend(*((phases[name], Swatch(name, colour, "box")) for _, side in sides for name, colour in side))
    reading = (
        "Left bar of a round: the engines generate and the judge scores. Right bar: the training workers train, send "
        "weights, and wait for pairs. Much waiting calls for more engines or for online.max_lag."
    )
    return Picture("Where the time goes", _svg(figure, "time"), reading, legend)


def kept_and_dropped(record: RunRecord) -> Picture | None:
    """What became of each round's prompts."""
    reasons = sorted({key for line in record.rounds for key in line if key.startswith("rollout/dropped_")})
    kept = record.over_rounds("rollout/kept")
    dropped = [(reason.removeprefix("rollout/dropped_"), record.over_rounds(reason)) for reason in reasons]
    dropped = [(reason, line) for reason, line in dropped if line[1].sum() > 0]
    if not _any(kept, *(line for _, line in dropped)):
        return None
    figure, (axes,) = _panels(["prompts"], "round", heights=[1.25])
    coloured = [(reason, line, DROP_COLOURS[i % len(DROP_COLOURS)]) for i, (reason, line) in enumerate(dropped)]
    _stack(axes, [(kept, "chosen"), *((line, colour) for _, line, colour in coloured)], width=0.66)
    legend = (
        Swatch("kept as a pair", "chosen", "box"),
        *(Swatch(f"dropped: {reason.replace('_', ' ')}", colour, "box") for reason, _, colour in coloured),
    )
    reading = "Every prompt of a round is in its bar: what is not kept was generated and judged for nothing."
    return Picture("Pairs kept and dropped", _svg(figure, "kept"), reading, legend)


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
    figure, (axes,) = _panels([keys[1] if len(keys) > 1 else metric], keys[0], heights=[1.5])
    _swept_axis(axes, "x", x)
    if len(keys) > 1:
        _swept_axis(axes, "y", y)
        dots = axes.scatter(
            x,
            y,
            c=values,
            cmap="viridis" if mode == "max" else "viridis_r",
            s=110,
            zorder=3,
            edgecolors=_light("stone"),
            linewidths=0.9,
        )
        bar = figure.colorbar(dots, ax=axes, pad=0.02, aspect=28, format=FuncFormatter(_tick))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=SMALL_PT, labelcolor=_light("faint"))
        reading = f"Each dot is a trial, coloured by {metric}; the ring marks the best one ({_tick(values[best])})."
    else:
        axes.scatter(x, y, color=_light("policy"), s=60, zorder=3)
        reading = f"Each dot is a trial; the ring marks the best {metric} ({_tick(values[best])})."
    axes.margins(0.12, 0.2)
    axes.scatter(x[best], y[best], s=330, facecolors="none", edgecolors=_light("rejected"), linewidths=2.2, zorder=4)
    if len(rows) <= 16 and len(keys) > 1:
        for value, left, up in zip(values, x, y, strict=True):
            axes.annotate(
                _tick(value),
                (left, up),
                xytext=(0, -24),
                textcoords="offset points",
                ha="center",
                fontsize=SMALL_PT,
                color=_light("ink"),
                parse_math=False,
            )
    title = f"{metric} over {' and '.join(keys[:2])}"
    return Picture(title, _svg(figure, "sweep"), reading, (Swatch("best trial", "rejected", "ring"),))


# ------------------------------------------------------------------------------------------------------- drawing


def _panels(labels: Sequence[str], x_label: str, heights: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of panels that share their horizontal axis, each with its quantity and unit at the top left.

    Args:
        heights: of each panel, as multiples of ``PANEL_IN``.
    """
    heights = heights or [0.85] * len(labels)
    layout = ConstrainedLayoutEngine(h_pad=0.1)
    figure = Figure(figsize=(WIDTH_IN, PANEL_IN * sum(heights) + 0.3), layout=layout)
    figure.patch.set_visible(False)
    rows = figure.subplots(len(labels), 1, sharex=True, squeeze=False, height_ratios=list(heights))[:, 0]
    for axes, label in zip(rows, labels, strict=True):
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_light("stone"))
        axes.grid(axis="y", color=_light("rule"), linewidth=1)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=TEXT_PT, labelcolor=_light("faint"), pad=5)
        axes.set_title(label, loc="left", fontsize=TEXT_PT, color=_light("ink"), pad=9, parse_math=False)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    rows[-1].set_xlabel(x_label, fontsize=TEXT_PT, color=_light("ink"), loc="right", parse_math=False)
    return figure, list(rows)


def _line(axes: Axes, line: Lines, colour: str, *, noisy: bool = False, peaks: bool = False) -> None:
    """A series as a line; a long noisy one pale, with its running mean on top.

    Args:
        peaks: single high values matter: they survive the thinning, and the line on top is the running median.
    """
    x, y = line
    if len(x) == 0:
        return
    middle, kept = (np.median, np.max) if peaks else (np.mean, np.mean)
    smooth = noisy and len(y) >= SMOOTH_FROM
    marker = "o" if len(x) <= 24 else ""
    pale: dict[str, Any] = {"alpha": 0.32, "linewidth": 1.0} if smooth else {"linewidth": 2.0}
    axes.plot(_thin(x), _thin(y, kept), color=_light(colour), marker=marker, markersize=4.2, **pale)
    if smooth:
        axes.plot(_thin(x), _running(_thin(y, middle), middle), color=_light(colour), linewidth=2.2)


def _heldout(axes: Axes, line: Lines, *, labelled: bool = False) -> None:
    """A held-out series as diamonds on a dashed line; optionally with the first and the last value beside them."""
    x, y = line
    if len(x) == 0:
        return
    colour = _light("heldout")
    axes.plot(x, y, color=colour, linewidth=1.4, linestyle=(0, (4, 3)), zorder=4)
    axes.plot(x, y, color=colour, linestyle="", marker="D", markersize=6.5, zorder=5)
    if labelled:
        rises, figures = y[-1] >= y[0], alike(*y)
        for i, above in {0: not rises, len(x) - 1: rises}.items():
            axes.annotate(
                figures[i].replace("-", "−"),  # noqa: RUF001
                (x[i], y[i]),
                xytext=(0, 9 if above else -19),
                textcoords="offset points",
                ha="center",
                fontsize=TEXT_PT,
                fontweight="bold",
                color=colour,
                zorder=6,
            )
        axes.margins(x=0.06, y=0.14)


def _level(axes: Axes, value: float) -> None:
    """A dashed line across, for a value to compare with."""
    axes.axhline(value, color=_light("faint"), linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)


def _stack(axes: Axes, parts: Sequence[tuple[Lines, str]], *, offset: float = 0.0, width: float) -> None:
    """Stacked bars by round, rounds averaged in groups where there are too many."""
    rounds = np.unique(np.concatenate([x for (x, _), _ in parts]))
    if len(rounds) == 0:
        return
    size = math.ceil(len(rounds) / MAX_BARS)
    bottom = np.zeros(math.ceil(len(rounds) / size))
    centres = _grouped(rounds, size)
    for (x, y), colour in parts:
        full = np.zeros(len(rounds))
        full[np.searchsorted(rounds, x)] = y
        heights = _grouped(full, size)
        axes.bar(centres + offset * size, heights, width * size, bottom=bottom, color=_light(colour), linewidth=0)
        bottom += heights


def _swept_axis(axes: Axes, which: str, values: np.ndarray) -> None:
    """Scale and ticks for swept values: logarithmic where they span it, a tick at each value where they are few."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if values.min() > 0 and values.max() / values.min() >= LOG_RATIO:
        axes.set(**{f"{which}scale": "log"})
    distinct = np.unique(values)
    if len(distinct) <= 6:
        axis.set_major_locator(FixedLocator(distinct.tolist()))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_formatter(FuncFormatter(lambda value, position: ""))
    axes.grid(axis="both", color=_light("rule"), linewidth=1)


def _running(values: np.ndarray, middle: Callable[..., np.ndarray]) -> np.ndarray:
    """The mean or median around each point, over about a twentieth of the series and over what there is at its ends."""
    half = max(1, len(values) // 40)
    return np.array([middle(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _thin(values: np.ndarray, group: Callable[..., np.ndarray] = np.mean) -> np.ndarray:
    return _grouped(values, math.ceil(len(values) / MAX_POINTS), group)


def _grouped(values: np.ndarray, size: int, group: Callable[..., np.ndarray] = np.mean) -> np.ndarray:
    """One value for each ``size`` consecutive ones."""
    if size <= 1:
        return values
    return np.array([group(values[start : start + size]) for start in range(0, len(values), size)])


def _tick(value: float, position: int | None = None) -> str:
    """A number as short as it can be: 12000 is 12k, 0.000001 is 1e-6."""
    if abs(value) >= 10_000:
        text = f"{value / 1000:.4g}k"
    else:
        text = re.sub(r"e([+-])0*", lambda match: f"e{match[1]}".replace("+", ""), f"{value:.4g}")
    return "0" if text == "-0" else text.replace("-", "−") if text.startswith("-") else text  # noqa: RUF001


def _any(*lines: Lines) -> bool:
    return any(len(x) for x, _ in lines)


def _legend(*entries: tuple[Lines, Swatch]) -> tuple[Swatch, ...]:
    return tuple(swatch for line, swatch in entries if len(line[0]))


def _train_and_heldout(train: Sequence[Lines], heldout: Sequence[Lines]) -> tuple[Swatch, ...]:
    """A legend where there are held-out points to tell from the training line, none where the line is alone."""
    if not _any(*heldout):
        return ()
    points = (Swatch("held-out pairs", "heldout", "point"),)
    return (Swatch("training pairs", "policy"), *points) if _any(*train) else points


# ----------------------------------------------------------------------------------------------------------- SVG


def _light(colour: str) -> str:
    return PALETTE[colour][0]


def _svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element to put into a page.

    Args:
        name: unique on the page; it prefixes every id, so that pictures do not use each other's clip paths.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{colour})")
    return re.sub(r"\n\s*", "\n", svg)
