"""The main plots of a run or a sweep as one PNG.

python -m jobs.picture runs/demo docs/report.png
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dpo_ray.report.figures import verdict
from dpo_ray.report.plots import LIGHT, WIDTH_IN, Drawing, Plot, legend, run_plots
from dpo_ray.report.plots import draw as draw_plot
from dpo_ray.report.record import read_run
from dpo_ray.report.sweep_plots import sweep_plots
from dpo_ray.report.sweep_record import read_sweep
from dpo_ray.report.sweep_text import verdict_text
from dpo_ray.sweep.trials import read_definition, read_trials

MAIN = ("Judge score by round", "KL to the reference", "Reward margin and accuracy", "Time by phase")
"""Titles of the plots that come first."""
LINE_CHARACTERS = 105
MARKS: dict[str, dict[str, Any]] = {
    "point": {"linestyle": "", "marker": "D"},
    "box": {"linestyle": "", "marker": "s"},
    "dashed": {"linestyle": "--"},
    "dot": {"linestyle": "", "marker": "o"},
    "ring": {"linestyle": "", "marker": "o", "markerfacecolor": "none", "markersize": 10},
    "cross": {"linestyle": "", "marker": "x"},
}
"""Style of legend entries; others are a line."""


def write_picture(run_dir: str, png: Path) -> None:
    """Draw up to four plots in two columns, each with its title and legend."""
    text, plots = (_sweep if (Path(run_dir) / "sweep.json").exists() else _run)(run_dir)
    lines = textwrap.wrap(text, LINE_CHARACTERS)
    figure = Figure(figsize=(2 * WIDTH_IN, 8.4 + 0.2 * len(lines)), layout="constrained")
    figure.suptitle("\n".join([*lines, ""]), fontsize=14, color=LIGHT["ink"], parse_math=False)
    grid = figure.add_gridspec(2, 2, wspace=0.08, hspace=0.06)
    for i, plot in enumerate(plots):
        cell = figure.add_subfigure(grid[i])
        draw_plot(plot, cell)
        cell.suptitle(plot.title, fontsize=13, fontweight="bold", color=LIGHT["ink"])
        handles = [
            Line2D([], [], color=LIGHT[swatch.color], label=swatch.label, **MARKS.get(swatch.mark, {}))
            for swatch in legend(plot)
        ]
        cell.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, columnspacing=1.1)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=75)


def _run(run_dir: str) -> tuple[str, Sequence[Plot | Drawing]]:
    """The outcome of a run in a sentence, and its main plots."""
    record = read_run(run_dir)
    return verdict(record, []), sorted(run_plots(record), key=lambda plot: plot.title not in MAIN)[:4]


def _sweep(run_dir: str) -> tuple[str, Sequence[Plot | Drawing]]:
    """The verdict on a sweep, and its first plots."""
    folder = Path(run_dir)
    objective = read_definition(folder / "sweep.json").objective
    record = read_sweep(folder, read_trials(folder / "sweep.csv"), objective)
    return verdict_text(record.verdict), sweep_plots(record)[:4]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="the directory of a run or a sweep")
    parser.add_argument("png", type=Path, help="the file to write")
    arguments = parser.parse_args()
    write_picture(arguments.run_dir, arguments.png)
    print(f"{arguments.png}: {arguments.png.stat().st_size // 1024} KiB")
