"""The plots of a run: a table of titles, panels, series and captions; and one renderer, also for those of a sweep.

In an SVG, colors are CSS variables and text stays text: the page decides on a light or a dark theme and on the font.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from dpo_ray.report.formatting import format_tick, same_decimals
from dpo_ray.report.record import Curve, RunRecord

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
    "paper": ("#ffffff", "#1b1f26"),
}
"""Each color on a light and on a dark page. Plots are drawn in the light ones."""
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
DROP_COLORS = ("rejected", "sand", "rose", "stone", "heldout", "policy")
"""Colors of the reasons for dropping a prompt, repeated where there are more reasons."""

WIDTH_IN, PANEL_IN = 6.2, 2.35  # inches of 72 SVG units: text has its nominal size on a page of about 500 pixels
TEXT_PT = 11.5
MAX_POINTS = 400  # per line; longer series are averaged in groups, which keeps the page of a long run small
MAX_BARS = 40  # per plot; more rounds than that are averaged in groups
SMOOTH_FROM = 40  # points from which a line is drawn pale, with its running mean on top
LOG_PEAK = 20.0  # ratio of the largest value to the median from which a series with peaks has a logarithmic axis


class Swatch(NamedTuple):
    """An entry of a legend."""

    label: str
    color: str
    mark: str
    """line | dashed | point | dot | ring | cross | box."""


class Series(NamedTuple):
    """One curve of a panel."""

    label: str
    """Text in the legend; empty for no entry."""
    curve: Curve
    color: str = "policy"
    style: Literal["line", "peaks", "heldout", "left bar", "right bar"] = "line"
    """peaks: a line that keeps single high values. heldout: diamonds on a dashed line. bars: stacked per round."""


class Panel(NamedTuple):
    """One set of axes, for one quantity."""

    label: str
    """Quantity and unit."""
    series: Sequence[Series]
    level: float | None = None
    """Value to compare with, a dashed line."""
    level_label: str = ""
    limits: tuple[float | None, float | None] = (None, None)
    """Lower and upper end of the axis; None fits the data."""


class Plot(NamedTuple):
    """Panels with a common horizontal axis, and the words around them."""

    title: str
    panels: Sequence[Panel]
    caption: str
    """A sentence on reading the plot."""
    x_label: str = "round"


class Drawing(NamedTuple):
    """A plot that does not consist of panels."""

    title: str
    draw: Callable[[Figure | SubFigure], None]
    caption: str
    """A sentence on reading the plot."""
    legend: Sequence[Swatch] = ()
    height_in: float = 1.25 * PANEL_IN


def run_plots(record: RunRecord) -> list[Plot]:
    """The plots that the run has data for, the most telling first."""
    table = [*_result_plots(record), *_training_plots(record), *_rollout_plots(record)]
    return [plot._replace(panels=panels) for plot in table if (panels := _with_data(plot.panels))]


def _with_heldout(kind: str, training: Curve, heldout: Curve) -> list[Series]:
    return [Series(f"training {kind}", training), Series(f"held-out {kind}", heldout, "heldout", "heldout")]


def _result_plots(record: RunRecord) -> list[Plot]:
    """Score and distance from the reference, by round."""
    rounds, versions = record.over_rounds, record.over_versions
    scores = [
        Series("chosen", rounds("judge/chosen_score"), "chosen"),
        Series("best of the candidates", rounds("judge/best_score"), "sand"),
        Series("mean of candidates", rounds("judge/mean_score")),
        Series("rejected", rounds("judge/rejected_score"), "rejected"),
        Series("held-out prompts", versions("score"), "heldout", "heldout"),
    ]
    divergences = _with_heldout("prompts", rounds("kl"), versions("kl"))
    return [
        Plot(
            "Judge score by round",
            [Panel("judge score", scores)],
            "Held-out prompts are never trained on: their change is the result. The lines are means over the new "
            "prompts of each round.",
        ),
        Plot(
            "Parts of the judge score",
            [Panel(name, [Series("", rounds(f"judge/{name}_score"))]) for name in record.judge_parts],
            "Means over all candidates of each round, before weights. A part that falls while the score rises is the "
            "price of the gain.",
        ),
        Plot(
            "KL to the reference",
            [Panel("nats per completion", divergences, 0.0)],
            "Distance from the reference on the policy's own completions. A steep rise without "
            "a gain in score is a sign that the policy exploits the judge.",
        ),
    ]


def _training_plots(record: RunRecord) -> list[Plot]:
    steps, evals = record.over_steps, record.over_evals
    margins = _with_heldout(record.examples, steps("rewards/margins"), evals("eval/rewards/margins"))
    accuracies = _with_heldout(record.examples, record.accuracies(), record.accuracies("eval/"))
    losses = _with_heldout(record.examples, steps("loss"), evals("eval/loss"))
    chosen, rejected = record.roles
    logps = [Series(name, steps(f"logps/{role}"), role) for name, role in ((chosen, "chosen"), (rejected, "rejected"))]
    unit, ln2 = (" (nats)", math.log(2)) if record.setting("loss.use") == "sigmoid" else ("", None)
    norms, max_norm = steps("optim/grad_norm"), record.setting("optim.max_grad_norm")
    if max_norm and len(norms[1]) and max_norm > 1.5 * norms[1].max():
        max_norm = None  # a limit far above the curve would flatten it
    gradients, rates = [Series("", norms, style="peaks")], [Series("", steps("optim/lr"), "sand")]
    return [
        Plot(
            "Reward and accuracy" if record.labeled else "Reward margin and accuracy",
            [
                Panel("reward in the direction of the label" if record.labeled else "reward margin", margins, 0.0),
                Panel(f"accuracy (share of {record.examples})", accuracies, 0.5, limits=(-0.03, 1.03)),
            ],
            "Both should rise and then level off; held-out points that stay behind the line are a sign of overfitting. "
            "An accuracy of 0.5 is chance; before the first update all rewards are 0 and the accuracy is left out.",
            "optimizer step",
        ),
        Plot(
            "Gradient norm and learning rate",
            [
                Panel("gradient norm, before clipping", gradients, max_norm, f"clipped above {max_norm}", (0.0, None)),
                Panel("learning rate", rates, limits=(0.0, None)),
            ],
            "A single peak is an unusual batch; a norm that keeps growing calls for a lower learning rate.",
            "optimizer step",
        ),
        Plot(
            "Loss",
            [Panel(f"loss{unit}", losses, ln2, "ln 2: policy and reference are equal")],
            f"Falls as the policy learns to prefer the {chosen} completions.",
            "optimizer step",
        ),
        Plot(
            f"Log-probability of {chosen} and {rejected}",
            [Panel("nats per completion", logps)],
            f"{rejected.capitalize()} should fall; {chosen} may fall a little with it. Where both fall fast, "
            "probability moves to completions that the data does not have. Longer completions have lower values, too.",
            "optimizer step",
        ),
    ]


def _rollout_plots(record: RunRecord) -> list[Plot]:
    """Completions, pairs and time of the rounds."""
    rounds, versions = record.over_rounds, record.over_versions
    lengths = _with_heldout("prompts", rounds("rollout/mean_tokens"), versions("tokens"))
    outcomes = [Series("kept as a pair", rounds("rollout/kept"), "chosen", "left bar")]
    dropped = [reason for reason, count in record.dropped.items() if count]
    for reason, color in zip(dropped, cycle(DROP_COLORS), strict=False):
        label = f"dropped: {reason.replace('_', ' ')}"
        outcomes.append(Series(label, rounds(f"rollout/dropped_{reason}"), color, "left bar"))
    phases = [
        Series("generate", rounds("perf/generate_s"), "policy", "left bar"),
        Series("judge", rounds("perf/judge_s"), "heldout", "right bar" if record.judged_by_workers else "left bar"),
        Series("train", rounds("perf/train_s"), "chosen", "right bar"),
        Series("sync", rounds("perf/sync_s"), "sand", "right bar"),
        Series("wait", rounds("perf/wait_s"), "stone", "right bar"),
    ]
    return [
        Plot(
            "Completion length",
            [Panel("tokens per completion", lengths, limits=(0.0, None))],
            "Should stay level; where length rises together with the score, the judge may reward length.",
        ),
        Plot(
            "Pairs kept and dropped",
            [Panel("prompts", outcomes)],
            "Each bar has all prompts of the round; generating and judging the dropped ones was wasted.",
        ),
        Plot(
            "Time by phase",
            [Panel("seconds per round", phases)],
            "Left bar: engines generate and the judge scores, unless training workers compute the scores. Right bar: "
            "these train, send weights and wait for pairs. Long waits call for more engines or a higher "
            "online.max_lag.",
        ),
    ]


def _with_data(panels: Sequence[Panel]) -> list[Panel]:
    panels = [panel._replace(series=[s for s in panel.series if len(s.curve[0])]) for panel in panels]
    return [panel for panel in panels if panel.series]


def legend(plot: Plot | Drawing) -> list[Swatch]:
    """Labeled series and levels, each label once."""
    if isinstance(plot, Drawing):
        return list(plot.legend)
    marks = {"heldout": "point", "left bar": "box", "right bar": "box"}
    swatches = [Swatch(s.label, s.color, marks.get(s.style, "line")) for panel in plot.panels for s in panel.series]
    levels = [Swatch(panel.level_label, "faint", "dashed") for panel in plot.panels if panel.level is not None]
    return list(dict.fromkeys(swatch for swatch in swatches + levels if swatch.label))


def render(plots: Sequence[Plot | Drawing]) -> list[tuple[Plot | Drawing, str, list[Swatch]]]:
    """The plots of a page, each with its SVG and its legend."""
    pictures = []
    for number, plot in enumerate(plots):
        layout = ConstrainedLayoutEngine(h_pad=0.1)
        figure = Figure(figsize=(WIDTH_IN, _height_in(plot) + 0.3), layout=layout)
        figure.patch.set_visible(False)
        draw(plot, figure)
        pictures.append((plot, _svg(figure, f"plot{number}"), legend(plot)))
    return pictures


def _height_in(plot: Plot | Drawing) -> float:
    if isinstance(plot, Drawing):
        return plot.height_in
    return PANEL_IN * (1.25 if len(plot.panels) == 1 else 0.85 * len(plot.panels))


def draw(plot: Plot | Drawing, figure: Figure | SubFigure) -> None:
    """Draw the panels of a plot one below the other, or a drawing."""
    if isinstance(plot, Drawing):
        plot.draw(figure)
        return
    rows = figure.subplots(len(plot.panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, plot.panels, strict=True):
        style_axes(axes, panel.label)
        _draw_bars(axes, [series for series in panel.series if "bar" in series.style])
        for series in panel.series:
            if series.style == "heldout":
                _draw_heldout(axes, series.curve)
            elif series.style in ("line", "peaks"):
                _draw_line(axes, series)
        if panel.level is not None:
            axes.axhline(panel.level, color=LIGHT["faint"], linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
        if axes.get_yscale() == "linear":
            axes.set_ylim(*panel.limits)
    label_x(rows[-1], plot.x_label)


def style_axes(axes: Axes, label: str) -> None:
    """Give axes the look of the report, with a title in place of a vertical label."""
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["stone"])
    axes.grid(axis="y", color=LIGHT["rule"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=TEXT_PT, labelcolor=LIGHT["faint"], pad=5)
    axes.set_title(label, loc="left", fontsize=TEXT_PT, color=LIGHT["ink"], pad=9, parse_math=False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(format_tick))


def label_x(axes: Axes, label: str) -> None:
    """Label the horizontal axis at its right end."""
    axes.set_xlabel(label, fontsize=TEXT_PT, color=LIGHT["ink"], loc="right", parse_math=False)


def label_point(axes: Axes, x: float, y: float, text: str, color: str, *, above: bool) -> None:
    """Write the value of a point above or below it."""
    text, offset = text.replace("-", "−"), (0, 9 if above else -19)  # noqa: RUF001
    style: dict[str, Any] = {"fontsize": TEXT_PT, "fontweight": "bold", "color": LIGHT[color], "zorder": 6}
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha="center", **style)


def _draw_line(axes: Axes, series: Series) -> None:
    """A line; a long one pale, with its running mean on top."""
    x, y = series.curve
    color, peaks = LIGHT[series.color], series.style == "peaks"
    center = np.median if peaks else np.mean
    smooth = len(y) >= SMOOTH_FROM
    size = math.ceil(len(x) / MAX_POINTS)
    shown = _grouped(x, size)
    pale: dict[str, Any] = {"alpha": 0.32, "linewidth": 1.0} if smooth else {"linewidth": 2.0}
    marker = "o" if len(x) <= 24 else ""
    axes.plot(shown, _grouped(y, size, np.max if peaks else center), color=color, marker=marker, markersize=4.2, **pale)
    if smooth:
        values = _grouped(y, size, center)
        half = max(1, len(values) // 40)
        running = [center(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
        axes.plot(shown, running, color=color, linewidth=2.2)
    positive = y[y > 0]
    if peaks and len(positive) and positive.max() > LOG_PEAK * np.median(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
        axes.yaxis.set_minor_locator(NullLocator())


def _draw_heldout(axes: Axes, curve: Curve) -> None:
    """Diamonds on a dashed line, with the first and the last value beside them."""
    x, y = curve
    axes.plot(x, y, color=LIGHT["heldout"], linewidth=1.4, linestyle=(0, (4, 3)), marker="D", markersize=6.5, zorder=5)
    rises, texts = y[-1] >= y[0], same_decimals(*y)
    for i, above in {0: not rises, len(x) - 1: rises}.items():
        label_point(axes, x[i], y[i], texts[i], "heldout", above=above)
    axes.margins(x=0.06, y=0.2)


def _draw_bars(axes: Axes, bars: Sequence[Series]) -> None:
    """Stacked bars per round, averaged over groups of rounds where there are too many."""
    if not bars:
        return
    rounds = np.unique(np.concatenate([series.curve[0] for series in bars]))
    size = math.ceil(len(rounds) / MAX_BARS)
    centers = _grouped(rounds, size)
    stacks = sorted({series.style for series in bars})
    bottoms = {stack: np.zeros(len(centers)) for stack in stacks}
    width = 0.76 * size / len(stacks)
    for series in bars:
        values = np.zeros(len(rounds))
        values[np.searchsorted(rounds, series.curve[0])] = series.curve[1]
        heights, bottom = _grouped(values, size), bottoms[series.style]
        x = centers + 1.1 * width * (stacks.index(series.style) - (len(stacks) - 1) / 2)
        axes.bar(x, heights, width, bottom=bottom, color=LIGHT[series.color], linewidth=0)
        bottoms[series.style] = bottom + heights


def _grouped(values: np.ndarray, size: int, reduce: Callable[..., np.ndarray] = np.mean) -> np.ndarray:
    """One value per ``size`` consecutive values."""
    return np.array([reduce(values[start : start + size]) for start in range(0, len(values), size)])


def _svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element, whose ids start with ``name``: plots of a page must not share clip paths."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[^"]*"', "", svg, count=2)  # of the svg element: the page scales it
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for color, light in LIGHT.items():
        svg = svg.replace(light, f"var(--{color})")
    return re.sub(r"\n\s*", "\n", svg)
