"""The plots of a sweep: learning curves, maps of two keys, parallel coordinates, frontier and importance.

Trials with a metric are colored by it, on a scale that is safe for color-blind readers and visible on a light and on
a dark page; others are crosses.
"""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from dpo_ray.report.formatting import format_number, format_tick, same_decimals, short_names
from dpo_ray.report.plots import LIGHT, PANEL_IN, TEXT_PT, Drawing, Swatch, label_point, label_x, style_axes
from dpo_ray.report.sweep_record import SweepRecord
from dpo_ray.sweep.importance import MAX_GROUPS, MIN_TRIALS, Importance, frontier, importance
from dpo_ray.sweep.trials import Trial
from dpo_ray.types import finite_float, is_number

COLORS: Colormap = ListedColormap(matplotlib.colormaps["cividis"](np.linspace(0.12, 0.97, 256)))
LOG_RATIO = 3.0  # ratio of the largest to the smallest swept value from which their axis is logarithmic
MAX_MAPS = 3  # pairs of numeric keys, the most important keys first
MAX_KEY_PLOTS = 3
MAX_LABELS = 16  # trials up to which points have their value as text
MAX_AXES = 8  # of parallel coordinates; more would not have room for their names
LABEL_GAP = (0.085, 0.075)  # of the axes' width and height, between the texts of two points


def sweep_plots(record: SweepRecord) -> list[Drawing]:
    """The plots that the sweep has data for, the most telling first."""
    shares = key_importance(record)
    keys = sorted(record.keys, key=lambda key: -shares[key].share) if shares else list(record.keys)
    numeric = [key for key in keys if _is_numeric(record, key)]
    maps = [sorted(pair, key=record.keys.index) for pair in combinations(numeric, 2)][:MAX_MAPS]
    plots = [_curves(record), *(_map(record, x, y) for x, y in maps)]
    plots += [_frontier(record), _parallel(record, keys), _shares(record, shares)]
    plots += [_over_key(record, key) for key in numeric[:MAX_KEY_PLOTS]]
    return [plot for plot in plots if plot is not None]


def key_importance(record: SweepRecord) -> dict[str, Importance] | None:
    """Importance of each key among the finished trials, or among all where few finished; None for too few trials.

    All trials are compared at the last step that each of them has reached.
    """
    finished = [trial for trial in record.ranked if trial.status == "done" and trial.name in record.curves]
    trials = finished if len(finished) >= MIN_TRIALS else [t for t in record.ranked if t.name in record.curves]
    if len(trials) < MIN_TRIALS:
        return None
    last = min(record.curves[trial.name][0][-1] for trial in trials)
    metric = [_value_at(record, trial, last) for trial in trials]
    known = [(trial.values, value) for trial, value in zip(trials, metric, strict=True) if value is not None]
    return importance([values for values, _ in known], np.array([value for _, value in known]), record.keys)


def _value_at(record: SweepRecord, trial: Trial, place: float) -> float | None:
    places, values = record.curves[trial.name]
    at = values[places == place]
    return float(at[0]) if len(at) else None


def _is_numeric(record: SweepRecord, key: str) -> bool:
    return all(is_number(trial.values.get(key)) for trial in record.trials)


def _metric(record: SweepRecord, trial: Trial) -> float:
    return float(trial.metrics[record.objective.metric])


def _colors(record: SweepRecord, trials: Sequence[Trial]) -> np.ndarray:
    """(n, 4) colors by metric; the best value has the light end."""
    values = np.array([_metric(record, trial) for trial in trials])
    scale = Normalize(values.min(), values.max())(values) if len(values) and np.ptp(values) else np.ones(len(values))
    return COLORS(np.asarray(scale) if record.objective.mode == "max" else 1 - np.asarray(scale))


def _curves(record: SweepRecord) -> Drawing | None:
    if not record.curves:
        return None
    stopped = any(trial.status == "stopped" for trial in record.trials)
    failed = any(trial.status == "failed" and trial.name in record.curves for trial in record.trials)
    legend = [Swatch("best trial", "policy", "line"), Swatch("other trials", "stone", "line")]
    legend += [Swatch("stopped early", "rejected", "dot")] * stopped + [Swatch("failed", "rejected", "cross")] * failed
    ends = " A curve that ends early with a dot belongs to a trial that the scheduler stopped." if stopped else ""
    caption = f"{record.objective.metric} of every trial on held-out data.{ends}"
    return Drawing("Learning curves", partial(_draw_curves, record), caption, legend)


def _draw_curves(record: SweepRecord, figure: Figure | SubFigure) -> None:
    axes = figure.subplots()
    style_axes(axes, record.objective.metric)
    best = record.verdict.pick.name if record.verdict.pick else None
    for trial in record.trials:
        if trial.name not in record.curves:
            continue
        x, y = record.curves[trial.name]
        if trial.name == best:
            axes.plot(x, y, color=LIGHT["policy"], linewidth=2.4, marker="o" * (len(x) <= 24), markersize=5, zorder=5)
            label_point(axes, x[-1], y[-1], same_decimals(y[-1])[0], "policy", above=record.objective.mode == "max")
            continue
        dot = "o" if len(x) == 1 else ""
        axes.plot(x, y, color=LIGHT["stone"], linewidth=1.2, alpha=0.75, marker=dot, markersize=4)
        if end := {"stopped": "o", "failed": "x"}.get(trial.status):
            axes.plot(x[-1:], y[-1:], color=LIGHT["rejected"], marker=end, markersize=6, markeredgewidth=2, zorder=4)
    axes.margins(x=0.06, y=0.14)
    label_x(axes, record.unit)


def _ring_best(
    record: SweepRecord, trials: Sequence[Trial], axes: Axes, x: np.ndarray, y: np.ndarray, size: float = 330
) -> None:
    best = [trial is record.verdict.pick for trial in trials]
    axes.scatter(x[best], y[best], s=size, facecolors="none", edgecolors=LIGHT["rejected"], linewidths=2.2, zorder=4)


def _trial_swatches(record: SweepRecord) -> list[Swatch]:
    excluded = [Swatch("no result", "rejected", "cross")] if record.verdict.ranking.excluded else []
    return [Swatch("best trial", "rejected", "ring"), *excluded]


def _map(record: SweepRecord, x: str, y: str) -> Drawing | None:
    if not record.ranked:
        return None
    caption = f"Each point is a trial, colored by {record.objective.metric}: the lighter, the better."
    title = f"{x} and {y}"
    return Drawing(title, partial(_draw_map, record, x, y), caption, _trial_swatches(record), 1.45 * PANEL_IN)


def _draw_map(record: SweepRecord, x: str, y: str, figure: Figure | SubFigure) -> None:
    axes = figure.subplots()
    style_axes(axes, y)
    axes.grid(axis="both", color=LIGHT["rule"], linewidth=1)
    trials = list(record.ranked)
    points = np.array([[trial.values[x], trial.values[y]] for trial in trials], dtype=float)
    axes.scatter(*points.T, s=90, c=_colors(record, trials), edgecolors=LIGHT["faint"], linewidths=0.9, zorder=3)
    _ring_best(record, trials, axes, *points.T, size=360)
    lost = [[trial.values[x], trial.values[y]] for trial, _ in record.verdict.ranking.excluded]
    if lost:
        axes.scatter(
            *np.array(lost, dtype=float).T, s=60, marker="x", color=LIGHT["rejected"], linewidths=1.8, zorder=3
        )
    axes.margins(0.14, 0.18)
    everything = np.array([[trial.values[x], trial.values[y]] for trial in record.trials], dtype=float)
    _scale(axes, "x", everything[:, 0])
    _scale(axes, "y", everything[:, 1])
    if len(trials) <= MAX_LABELS:
        _label_points(axes, points, same_decimals(*(_metric(record, trial) for trial in trials)))
    label_x(axes, x)
    _color_bar(record, axes, figure)


def _scale(axes: Axes, which: str, values: np.ndarray) -> None:
    """A logarithmic axis where the values span a range, with ticks at the values if they are few."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    unique = np.unique(values)
    logarithmic = _is_logarithmic(unique)
    if logarithmic:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if unique[-1] / unique[0] < 30 else (1.0,), numticks=6))
    if len(unique) <= 6 and _well_apart(unique, logarithmic):
        axis.set_major_locator(FixedLocator(unique.tolist()))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(format_tick))
    axis.set_minor_formatter(NullFormatter())


def _is_logarithmic(unique: np.ndarray) -> bool:
    return bool(len(unique) and unique[0] > 0 and unique[-1] / unique[0] >= LOG_RATIO)


def _well_apart(unique: np.ndarray, logarithmic: bool) -> bool:
    """True if labels at all values have room: none is closer to the next than a twelfth of the range."""
    places = np.log(unique) if logarithmic else unique
    return len(unique) == 1 or bool(np.diff(places).min() >= np.ptp(places) / 12)


def _label_points(axes: Axes, points: np.ndarray, texts: Sequence[str]) -> None:
    """Values above or below their points, the first points first; a value without room is left out."""
    places = axes.transAxes.inverted().transform(axes.transData.transform(points))
    taken: list[np.ndarray] = []
    for i, (place, point, text) in enumerate(zip(places, points, texts, strict=True)):
        spots = [np.array([place[0], place[1] + side * LABEL_GAP[1]]) for side in (1, -1)]
        free = [spot for spot in spots if _has_room(spot, taken, places)] or spots[: i == 0]
        if not free:
            continue
        taken.append(free[0])
        distance = 13 if i == 0 else 9  # outside of the ring
        above = free[0][1] > place[1]
        axes.annotate(
            text, tuple(point), xytext=(0, distance if above else -distance), textcoords="offset points", ha="center",
            va="bottom" if above else "top", fontsize=TEXT_PT - 2, color=LIGHT["ink"], zorder=6,
        )  # fmt: skip


def _has_room(spot: np.ndarray, taken: Sequence[np.ndarray], points: np.ndarray) -> bool:
    width, height = LABEL_GAP
    from_texts = [np.abs(spot - other) for other in taken]
    from_points = np.abs(points - spot)
    return not any((gap < (2 * width, height)).all() for gap in from_texts) and not (
        (from_points < (width, 0.7 * height)).all(1).any()
    )


def _color_bar(record: SweepRecord, axes: Axes, figure: Figure | SubFigure) -> None:
    values = [_metric(record, trial) for trial in record.ranked]
    if min(values) == max(values):
        return
    colors = COLORS if record.objective.mode == "max" else COLORS.reversed()
    mappable = matplotlib.cm.ScalarMappable(Normalize(min(values), max(values)), colors)
    bar = figure.colorbar(mappable, ax=axes, aspect=26, pad=0.03, fraction=0.05)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0, labelsize=TEXT_PT - 1, labelcolor=LIGHT["faint"])
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(format_tick))


def _frontier(record: SweepRecord) -> Drawing | None:
    distance = record.distance
    if distance is None:
        return None
    measured = [trial for trial in record.trials if _has(trial, record.objective.metric) and _has(trial, distance)]
    if len(measured) < 2:
        return None
    legend = [Swatch("frontier", "chosen", "line"), Swatch("trials", "policy", "dot")]
    legend.append(Swatch("best trial", "rejected", "ring"))
    constraint = record.objective.constraint
    if constraint and constraint.metric == distance:
        legend.append(Swatch(f"{distance} ≤ {constraint.max:g}", "faint", "dashed"))
    caption = (
        f"{record.objective.metric} against the distance from the reference ({distance}, nats per completion). No "
        "trial does better than one on the frontier without moving further away."
    )
    return Drawing("Result against distance", partial(_draw_frontier, record, distance, measured), caption, legend)


def _has(trial: Trial, metric: str) -> bool:
    return trial.status != "failed" and finite_float(trial.metrics.get(metric)) is not None


def _draw_frontier(record: SweepRecord, distance: str, trials: Sequence[Trial], figure: Figure | SubFigure) -> None:
    axes = figure.subplots()
    style_axes(axes, record.objective.metric)
    cost = np.array([trial.metrics[distance] for trial in trials], dtype=float)
    value = np.array([_metric(record, trial) for trial in trials])
    edge = frontier(cost, value if record.objective.mode == "max" else -value)
    axes.plot(cost[edge], value[edge], color=LIGHT["chosen"], linewidth=2, zorder=2)
    axes.scatter(cost, value, s=60, color=LIGHT["policy"], zorder=3)
    _ring_best(record, trials, axes, cost, value)
    axes.margins(0.08, 0.18)
    if np.ptp(cost) and cost.min() > 0 and cost.max() / cost.min() > 30:
        _scale(axes, "x", cost)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    constraint = record.objective.constraint
    if constraint and constraint.metric == distance:
        axes.axvline(constraint.max, color=LIGHT["faint"], linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
    label_x(axes, f"{distance} (nats per completion)")


def _over_key(record: SweepRecord, key: str) -> Drawing | None:
    if not record.ranked:
        return None
    caption = f"Each dot is a trial; the best one has {key} = {format_number(record.ranked[0].values[key])}."
    title, legend = f"{record.objective.metric} over {key}", [Swatch("best trial", "rejected", "ring")]
    return Drawing(title, partial(_draw_over_key, record, key), caption, legend)


def _draw_over_key(record: SweepRecord, key: str, figure: Figure | SubFigure) -> None:
    axes = figure.subplots()
    style_axes(axes, record.objective.metric)
    x = np.array([trial.values[key] for trial in record.ranked], dtype=float)
    y = np.array([_metric(record, trial) for trial in record.ranked])
    axes.scatter(x, y, s=60, color=LIGHT["policy"])
    _ring_best(record, record.ranked, axes, x, y)
    axes.margins(0.12, 0.2)
    _scale(axes, "x", x)
    label_x(axes, key)


def _parallel(record: SweepRecord, keys: Sequence[str]) -> Drawing | None:
    if len(keys) < 2 or len(record.ranked) < 2:
        return None
    caption = (
        f"One line per trial through its values, colored by {record.objective.metric}: the lighter, the better; the "
        "best one is thick."
    )
    drawn = keys[: MAX_AXES - 1][::-1]  # the most important one beside the result
    return Drawing("Parallel coordinates", partial(_draw_parallel, record, drawn), caption, (), 1.45 * PANEL_IN)


def _draw_parallel(record: SweepRecord, keys: Sequence[str], figure: Figure | SubFigure) -> None:
    axes = figure.subplots()
    axes.set_axis_off()
    trials = record.ranked[::-1]  # the best on top
    columns = [[trial.values.get(key) for trial in trials] for key in keys]
    scales = [_unit_scale(column) for column in columns] + [_unit_scale([_metric(record, trial) for trial in trials])]
    heights = np.array([places for places, _ in scales])  # (axes, trials)
    behind = {"facecolor": LIGHT["paper"], "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    tick_style: dict[str, Any] = {"fontsize": TEXT_PT - 2, "color": LIGHT["ink"], "zorder": 6, "bbox": behind}
    for place, (name, (_, ticks)) in enumerate(zip([*short_names(keys), "result"], scales, strict=True)):
        axes.plot([place, place], [0, 1], color=LIGHT["stone"], linewidth=1.2, zorder=3)
        style: dict[str, Any] = {"ha": "center", "fontsize": TEXT_PT, "color": LIGHT["ink"], "parse_math": False}
        raised = 0.09 * (place % 2) if len(scales) > 5 else 0.0
        axes.text(place, 1.08 + raised, name, va="bottom", **style)
        for height, text in ticks:
            axes.text(place - 0.04, height, text, ha="right", va="center", **tick_style)
    for i, color in enumerate(_colors(record, trials)):
        is_best = trials[i] is record.verdict.pick
        width, zorder = (3.0, 5) if is_best else (1.5, 2)
        axes.plot(range(len(scales)), heights[:, i], color=color, linewidth=width, zorder=zorder)
    axes.set_xlim(-0.35 * (len(scales) - 1) / 3, len(scales) - 0.9)
    axes.set_ylim(-0.04, 1.2 + 0.1 * (len(scales) > 5))


def _unit_scale(column: Sequence[Any]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights from 0 to 1 of the values of an axis, and its ticks; logarithmic where the values span a range."""
    if not all(is_number(value) for value in column):
        names = list(dict.fromkeys(sorted(map(format_number, column))))
        heights = np.linspace(0, 1, len(names)) if len(names) > 1 else np.array([0.5])
        of_name = dict(zip(names, heights.tolist(), strict=True))
        return np.array([of_name[format_number(value)] for value in column]), [(h, n) for n, h in of_name.items()]
    values = np.array(column, dtype=float)
    unique = np.unique(values)
    logarithmic = _is_logarithmic(unique)
    transform = np.log if logarithmic else np.asarray
    low, span = transform(unique[0]), np.ptp(transform(unique)) or 1.0
    few = len(unique) <= 5 and _well_apart(unique, logarithmic)
    middle = np.exp(low + span / 2) if logarithmic else unique.mean()
    marks = unique.tolist() if few else [float(unique[0]), float(middle), float(unique[-1])]
    ticks = [(float((transform(mark) - low) / span), format_number(mark, 2 if not few else 4)) for mark in marks]
    return (transform(values) - low) / span, ticks


def _shares(record: SweepRecord, shares: dict[str, Importance] | None) -> Drawing | None:
    if not shares or len(shares) < 2:
        return None
    caption = (
        f"Share of the differences in {record.objective.metric} that each key explains by itself: the adjusted R² of "
        f"the means of up to {MAX_GROUPS} groups of trials by its value. A share below its mark may be chance: 95 % of "
        "random assignments stay below."
    )
    legend = [Swatch("exceeds chance", "policy", "box"), Swatch("within chance", "stone", "box")]
    height = 0.55 + 0.42 * len(shares)
    return Drawing("Importance of each key", partial(_draw_shares, shares), caption, legend, height)


def _draw_shares(shares: dict[str, Importance], figure: Figure | SubFigure) -> None:
    axes = figure.subplots()
    style_axes(axes, "")
    axes.grid(visible=False)
    ordered = sorted(shares.items(), key=lambda item: item[1].share)
    for place, (_, found) in enumerate(ordered):
        color = LIGHT["policy" if found.exceeds_chance else "stone"]
        axes.barh(place, found.share, height=0.6, color=color)
        axes.plot([found.chance] * 2, [place - 0.38, place + 0.38], color=LIGHT["ink"], linewidth=1.6)
        right = max(found.share, found.chance)
        axes.text(right + 0.015, place, f"{found.share:.0%}", va="center", fontsize=TEXT_PT, color=LIGHT["ink"])
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(ordered)))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda place, _: ordered[int(place)][0]))
    axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1.0]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.set_xlim(0, 1.12)
