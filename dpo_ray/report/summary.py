"""The end of a run: writes the report; prints a table of results, completions side by side, and where the files are."""

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_ray.config import Config
from dpo_ray.report.figures import KeyFigure, comparisons, key_figures
from dpo_ray.report.formatting import format_duration
from dpo_ray.report.health import diagnose
from dpo_ray.report.record import Comparison, read_run
from dpo_ray.storage import is_remote

logger = logging.getLogger(__name__)


def print_summary(config: Config, console: Console, *, seconds: float) -> None:
    """Writes report.html and prints the results; an error here does not fail the run."""
    try:
        from dpo_ray.report.page import write_report  # takes seconds to import, for matplotlib

        record = read_run(config.run.path)
        report = write_report(record)
        _print_figures(console, key_figures(record), seconds)
        _print_comparisons(console, comparisons(record, n=3))
        for finding in diagnose(record):
            if finding.level != "ok":
                console.print(f"{finding.level}: {finding.title}. {finding.text}")
        _print_paths(console, config, report)
        _print_suggestions(console, config)
    except Exception:
        logger.exception("the run has finished, but its report or summary failed")
        console.print(f"run directory: {config.run.path}", soft_wrap=True)


def _print_figures(console: Console, figures: Sequence[KeyFigure], seconds: float) -> None:
    table = Table(title="Result", title_justify="left", show_header=False, box=None, padding=(0, 2))
    for label, value, detail, before in figures:
        table.add_row(label, f"{before} -> {value}" if before else value, detail)
    table.add_row("Wall time", format_duration(seconds))
    console.print(table)


def _print_comparisons(console: Console, rows: Sequence[Comparison]) -> None:
    if not rows:
        return
    table = Table(title="Held-out prompts, before and after", title_justify="left", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    for prompt, before, score_before, after, score_after in rows:
        table.add_row(prompt, f"({score_before:+.2f}) {before.strip()}", f"({score_after:+.2f}) {after.strip()}")
    console.print(table)


def _print_paths(console: Console, config: Config, report: Path) -> None:
    run_dir = config.run.path
    paths = [
        (report, "plots, samples and findings: open it in a browser"),
        (run_dir / "policy", "the trained policy, a Hugging Face directory"),
        (run_dir / "adapter", "the trained adapters, a PEFT directory"),
        (run_dir / "metrics.jsonl", "one line per step"),
        (run_dir / "rounds", "every candidate, score and pair, by round"),
        (run_dir / "logs", "full logs of every process"),
    ]
    existing = [(_relative(path), meaning) for path, meaning in paths if path.exists()]
    width = max(len(path) for path, _ in existing)
    console.print("Files", style="italic")
    for path, meaning in existing:
        console.print(f"  {path:<{width}}  {meaning}", soft_wrap=True)


def _print_suggestions(console: Console, config: Config) -> None:
    """Commands to copy, each on one line."""
    online = config.online
    command = f"dpo-ray {'online' if online else 'offline'} {_relative(config.run.path / 'config.yaml')}"
    name = f"run.name={config.run.name}"
    longer = f"online.rounds={2 * online.rounds}" if online else f"run.epochs={2 * config.run.epochs:g}"
    own_data = (
        "online.prompts=my_prompts.jsonl online.judge.use=my_module:my_judge" if online else "data.train=my_pairs.jsonl"
    )
    console.print("What to try next", style="italic")
    for purpose, keys in (
        ("train longer", f"{name}-longer {longer}"),
        ("stay closer to the reference", f"{name}-closer loss.beta={5 * config.loss.beta:g}"),
        ("use your own data", f"{name}-mine {own_data}"),
    ):
        console.print(f"  {purpose}:\n    {command} {keys}", soft_wrap=True)


def _relative(path: Path) -> str:
    """``path`` relative to the working directory if it is below it."""
    below = not is_remote(path) and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd()) if below else path)
