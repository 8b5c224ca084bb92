"""What pictures are drawn with: panels, lines, levels and bars in the colours of the page, and their legends.

Colours leave as CSS variables and text as text, so that a page decides on light or dark and on the font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dpo_ray.report.formatting import indistinguishable
from dpo_ray.report.record import Lines

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


def panels(labels: Sequence[str], x_label: str, heights: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
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
        axes.spines["bottom"].set_color(light("stone"))
        axes.grid(axis="y", color=light("rule"), linewidth=1)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=TEXT_PT, labelcolor=light("faint"), pad=5)
        axes.set_title(label, loc="left", fontsize=TEXT_PT, color=light("ink"), pad=9, parse_math=False)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
    rows[-1].set_xlabel(x_label, fontsize=TEXT_PT, color=light("ink"), loc="right", parse_math=False)
    return figure, list(rows)


def draw_line(axes: Axes, line: Lines, colour: str, *, noisy: bool = False, peaks: bool = False) -> None:
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
    axes.plot(_thin(x), _thin(y, kept), color=light(colour), marker=marker, markersize=4.2, **pale)
    if smooth:
        axes.plot(_thin(x), _running(_thin(y, middle), middle), color=light(colour), linewidth=2.2)


def draw_heldout(axes: Axes, line: Lines, *, labelled: bool = False) -> None:
    """A held-out series as diamonds on a dashed line; optionally with the first and the last value beside them."""
    x, y = line
    if len(x) == 0:
        return
    colour = light("heldout")
    axes.plot(x, y, color=colour, linewidth=1.4, linestyle=(0, (4, 3)), zorder=4)
    axes.plot(x, y, color=colour, linestyle="", marker="D", markersize=6.5, zorder=5)
    if labelled:
        rises, figures = y[-1] >= y[0], indistinguishable(*y)
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


def draw_level(axes: Axes, value: float) -> None:
    """A dashed line across, for a value to compare with."""
    axes.axhline(value, color=light("faint"), linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)


def draw_stack(axes: Axes, parts: Sequence[tuple[Lines, str]], *, offset: float = 0.0, width: float) -> None:
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
        axes.bar(centres + offset * size, heights, width * size, bottom=bottom, color=light(colour), linewidth=0)
        bottom += heights


def set_swept_axis(axes: Axes, which: str, values: np.ndarray) -> None:
    """Scale and ticks for swept values: logarithmic where they span it, a tick at each value where they are few."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if values.min() > 0 and values.max() / values.min() >= LOG_RATIO:
        axes.set(**{f"{which}scale": "log"})
    distinct = np.unique(values)
    if len(distinct) <= 6:
        axis.set_major_locator(FixedLocator(distinct.tolist()))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(tick_text))
    axis.set_minor_formatter(FuncFormatter(lambda value, position: ""))
    axes.grid(axis="both", color=light("rule"), linewidth=1)


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


def tick_text(value: float, position: int | None = None) -> str:
    """A number as short as it can be: 12000 is 12k, 0.000001 is 1e-6."""
    if abs(value) >= 10_000:
        text = f"{value / 1000:.4g}k"
    else:
        text = re.sub(r"e([+-])0*", lambda match: f"e{match[1]}".replace("+", ""), f"{value:.4g}")
    return "0" if text == "-0" else text.replace("-", "−") if text.startswith("-") else text  # noqa: RUF001


def has_any(*lines: Lines) -> bool:
    """Whether one of the series has a point."""
    return any(len(x) for x, _ in lines)


def legend_of(*entries: tuple[Lines, Swatch]) -> tuple[Swatch, ...]:
    """The entries whose series has a point."""
    return tuple(swatch for line, swatch in entries if len(line[0]))


def legend_of_both(train: Sequence[Lines], heldout: Sequence[Lines]) -> tuple[Swatch, ...]:
    """A legend where there are held-out points to tell from the training line, none where the line is alone."""
    if not has_any(*heldout):
        return ()
    points = (Swatch("held-out pairs", "heldout", "point"),)
    return (Swatch("training pairs", "policy"), *points) if has_any(*train) else points


# ----------------------------------------------------------------------------------------------------------- SVG


def light(colour: str) -> str:
    """A role's colour on a light page."""
    return PALETTE[colour][0]


def svg_of(figure: Figure, name: str) -> str:
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
