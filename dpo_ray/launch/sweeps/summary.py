"""The end of a sweep: writes the report; prints the trials, the verdict, and where the files are."""

import logging

from rich.console import Console
from rich.table import Table

from dpo_ray.report.formatting import format_duration, format_number
from dpo_ray.report.sweep_record import SweepRecord
from dpo_ray.report.sweep_text import verdict_text
from dpo_ray.sweep.trials import Trial

logger = logging.getLogger(__name__)


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
    best, report = record.path / "best.yaml", record.path / "report.html"
    console.print(f"best: {best}   train it: dpo-ray {command} {best}", soft_wrap=True)
    try:
        from dpo_ray.report.sweep_page import write_sweep_report  # takes seconds to import, for matplotlib

        write_sweep_report(record)
    except Exception:
        logger.exception("the sweep has finished, but its report failed")
        console.print(f"all:  {record.path / 'sweep.csv'}", soft_wrap=True)
    else:
        console.print(f"all:  {record.path / 'sweep.csv'}   plots: {report}", soft_wrap=True)


def _table(record: SweepRecord, trials: list[Trial]) -> Table:
    title = f"Trials by {record.objective.metric}, best first"
    table = Table("trial", "status", title=title, title_justify="left")
    for name in (*record.keys, *record.metrics, "time"):
        table.add_column(name, justify="right")
    for trial in trials:
        cells = [format_number(trial.values.get(key)) for key in record.keys]
        cells += [format_number(trial.metrics.get(metric)) for metric in record.metrics]
        table.add_row(trial.name, trial.status, *cells, format_duration(trial.seconds))
    return table
