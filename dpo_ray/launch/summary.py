"""The end of a run: its report, a short table, completions side by side, and where everything lies."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dpo_ray.config import Config
from dpo_ray.storage import is_remote

if TYPE_CHECKING:
    from dpo_ray.report.figures import Comparison, Summary

logger = logging.getLogger(__name__)


def print_summary(config: Config, console: Console, *, seconds: float) -> None:
    """Write report.html and print what a person wants to know first; failing at it does not make the run fail."""
    try:
        _tell(config, console, seconds)
    except Exception:
        logger.exception("the run is done, but not all could be told of it")
        console.print(f"run directory: {config.run.path}", highlight=False, markup=False, soft_wrap=True)


def _tell(config: Config, console: Console, seconds: float) -> None:
    # Imported late: matplotlib has no place in the workers, which import this package's siblings.
    from dpo_ray.report.figures import comparisons, summary
    from dpo_ray.report.health import diagnose
    from dpo_ray.report.page import write_report
    from dpo_ray.report.record import read_run

    run_dir = config.run.path
    report = write_report(run_dir)
    record = read_run(run_dir)
    _print_figures(console, summary(record), seconds)
    _print_comparisons(console, comparisons(record, n=3))
    for finding in diagnose(record):
        if finding.level != "ok":
            console.print(f"{finding.level}: {finding.title}. {finding.text}", highlight=False, markup=False)
    _print_places(console, config, report)
    _print_next(console, config)


def _print_figures(console: Console, figures: "Summary", seconds: float) -> None:
    def show(name: str, form: str = "{:.3f}") -> str:
        value = getattr(figures, name)
        return "-" if value is None else form.format(value)

    table = Table(title="Result", title_justify="left", show_header=False, box=None, padding=(0, 2))
    if figures.score_after is not None:
        table.add_row(
            "judge score, held-out prompts", f"{show('score_before', '{:+.3f}')} -> {show('score_after', '{:+.3f}')}"
        )
        table.add_row(
            "completion length, tokens", f"{show('tokens_before', '{:.1f}')} -> {show('tokens_after', '{:.1f}')}"
        )
    if figures.kl is not None:
        table.add_row("KL to the reference", f"{show('kl', '{:.1f}')} nats a sequence")
    table.add_row("training", f"{show('pairs_per_s', '{:.2f}')} pairs/s, {show('tokens_per_s', '{:.0f}')} tokens/s")
    minutes, rest = divmod(int(seconds), 60)
    table.add_row("wall time", f"{minutes} min {rest} s")
    console.print(table)


def _print_comparisons(console: Console, rows: "Sequence[Comparison]") -> None:
    if not rows:
        return
    table = Table(title="Held-out prompts, before and after", title_justify="left", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    for prompt, before, score_before, after, score_after in rows:
        table.add_row(prompt, f"({score_before:+.2f}) {before.strip()}", f"({score_after:+.2f}) {after.strip()}")
    console.print(table)


def _print_places(console: Console, config: Config, report: Path) -> None:
    run_dir = config.run.path
    places = [
        (report, "pictures, samples and findings: open it in a browser"),
        (run_dir / "policy", "the trained policy, a Hugging Face directory"),
        (run_dir / "adapter", "the trained adapters, a peft directory"),
        (run_dir / "metrics.jsonl", "one line a step"),
        (run_dir / "rounds", "every candidate, score and pair, by round"),
        (run_dir / "logs", "full logs of every process"),
    ]
    there = [(_near(path), meaning) for path, meaning in places if path.exists()]
    width = max(len(path) for path, _ in there)
    console.print("Where everything lies", style="italic")
    for path, meaning in there:
        console.print(f"  {path:<{width}}  {meaning}", highlight=False, markup=False, soft_wrap=True)


def _print_next(console: Console, config: Config) -> None:
    """Commands to copy, each on one line."""
    online = config.online
    command = f"dpo-ray {'online' if online else 'offline'} {_near(config.run.path / 'config.yaml')}"
    name = f"run.name={config.run.name}"
    longer = f"online.rounds={2 * online.rounds}" if online else f"run.epochs={2 * config.run.epochs:g}"
    own = (
        "online.prompts=my_prompts.jsonl online.judge.use=my_module:my_judge" if online else "data.train=my_pairs.jsonl"
    )
    console.print("What to try next", style="italic")
    for what, keys in (
        ("train longer", f"{name}-longer {longer}"),
        ("stay closer to the reference", f"{name}-closer loss.beta={5 * config.loss.beta:g}"),
        ("use your own data", f"{name}-mine {own}"),
    ):
        console.print(f"  {what}:\n    {command} {keys}", highlight=False, markup=False, soft_wrap=True)


def _near(path: Path) -> str:
    """A path as a person in this folder would type it."""
    here = not is_remote(path) and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd()) if here else path)
