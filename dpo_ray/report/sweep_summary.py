"""The report of a sweep while it runs; at its end the trials, the verdict, and where the files are."""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_ray.report.formatting import format_duration, format_number, short_names
from dpo_ray.report.live.follower import LiveReport
from dpo_ray.report.sweep_record import SweepRecord, read_sweep
from dpo_ray.report.sweep_text import verdict_text
from dpo_ray.sweep.trials import Objective, Trial
from dpo_ray.threads import in_background

logger = logging.getLogger(__name__)

POLL_S = 5.0
CLOSE_TIMEOUT_S = 60.0


def live_sweep_report(
    read: Callable[[], Sequence[Trial]], run_dir: Path, objective: Objective
) -> contextlib.AbstractContextManager[None]:
    """Rewrites report.html when the trials have changed, at most once a minute, until the block ends.

    Args:
        read: returns the current state of the trials; called in another thread.
    """
    written: list[Trial] = []

    def write() -> None:
        from dpo_ray.report.sweep_page import write_sweep_report  # takes seconds to import, for matplotlib

        trials = list(read())
        write_sweep_report(read_sweep(run_dir, trials, objective), running=True)
        written[:] = trials

    def watch(ended: threading.Event) -> None:
        report = LiveReport(write)
        while not ended.wait(POLL_S):
            if any(trial.metrics for trial in read()) and list(read()) != written:
                report.maybe_write()

    return in_background(watch, "report", close_timeout_s=CLOSE_TIMEOUT_S)


def print_sweep(record: SweepRecord, command: str, console: Console) -> None:
    """Writes report.html and prints the result; an error in the report does not fail the sweep.

    Args:
        command: trains a configuration of the sweep: ``offline`` or ``online``.
    """
    excluded = record.verdict.ranking.excluded
    console.print(_table(record, [*record.ranked, *(trial for trial, _ in excluded)]))
    for trial, reason in excluded:
        console.print(f"{trial.name}: {f'failed: {trial.error}' if trial.error else reason}", soft_wrap=True)
    console.print(verdict_text(record.verdict), soft_wrap=True)
    if record.verdict.best is not None:
        best = record.path / "best.yaml"
        console.print(f"best: {best}   train it: dpo-ray {command} {best}", soft_wrap=True)
    try:
        from dpo_ray.report.sweep_page import write_sweep_report  # takes seconds to import, for matplotlib

        write_sweep_report(record)
    except Exception:
        logger.exception("the sweep has finished, but its report failed")
        console.print(f"all:  {record.path / 'sweep.csv'}", soft_wrap=True)
    else:
        console.print(f"all:  {record.path / 'sweep.csv'}   plots: {record.path / 'report.html'}", soft_wrap=True)


def _table(record: SweepRecord, trials: list[Trial]) -> Table:
    title = f"Trials by {record.objective.metric}, best first"
    table = Table("trial", "status", title=title, title_justify="left")
    for name in (*short_names([*record.keys, *record.metrics]), "time"):
        table.add_column(name, justify="right")
    for trial in trials:
        cells = [format_number(trial.values.get(key), 3) for key in record.keys]
        cells += [format_number(trial.metrics.get(metric)) for metric in record.metrics]
        table.add_row(trial.name, trial.status, *cells, format_duration(trial.seconds))
    return table
