"""``report.html`` of a sweep: the verdict in a sentence, plots, and a table of all trials."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_ray.report.formatting import count_noun, format_duration, format_number, same_decimals, shorten
from dpo_ray.report.page import write_page
from dpo_ray.report.plots import render
from dpo_ray.report.sweep_plots import key_importance, sweep_plots
from dpo_ray.report.sweep_record import SweepRecord
from dpo_ray.report.sweep_text import verdict_text
from dpo_ray.sweep.importance import MIN_TRIALS
from dpo_ray.sweep.trials import Trial
from dpo_ray.sweep.verdict import Lead
from dpo_ray.types import finite_float

ERROR_CHARACTERS = 100


def write_sweep_report(record: SweepRecord, *, running: bool = False) -> Path:
    """Writes ``report.html`` of a sweep.

    Args:
        running: the sweep is not complete; the page shows that and reloads every minute.
    """
    columns = _columns(record)
    return write_page(
        record.path,
        kind="Sweep",
        title=record.path.resolve().name,
        running=f"Running: {_progress(record.trials)}" if running else "",
        verdict=f"{'So far: ' if running else ''}{verdict_text(record.verdict)}",
        facts=_facts(record),
        pictures=render(sweep_plots(record)),
        columns=list(columns),
        rows=list(zip(*columns.values(), strict=True)),
        has_best=bool(record.ranked),
    )


def _progress(trials: Sequence[Trial]) -> str:
    ended = sum(trial.status in ("done", "stopped", "failed") for trial in trials)
    return f"{ended} of {count_noun(len(trials), 'trial')} ended"


def _facts(record: SweepRecord) -> list[str]:
    objective, trials = record.objective, record.trials
    facts = [f"{objective.mode} of {objective.metric}"]
    if objective.constraint:
        facts.append(f"{objective.constraint.metric} ≤ {objective.constraint.max:g}")
    facts.append(count_noun(len(trials), "trial"))
    facts += [f"{n} {status}" for status in ("stopped", "failed") if (n := sum(t.status == status for t in trials))]
    facts.append(f"{format_duration(sum(trial.seconds for trial in trials))} over all trials")
    if len(record.keys) > 1 and key_importance(record) is None:
        facts.append(f"importance of keys: needs {MIN_TRIALS} trials with different results")
    return facts


def _columns(record: SweepRecord) -> dict[str, Sequence[str]]:
    """Cells of the table of trials, by column, best trial first."""
    trials = [*record.ranked, *(trial for trial, _ in record.verdict.ranking.excluded)]
    reasons = {trial.name: reason for trial, reason in record.verdict.ranking.excluded}
    leads = {trial.name: lead for lead in record.verdict.leads for trial in lead.other.trials}
    columns: dict[str, Sequence[str]] = {
        "trial": [trial.name for trial in trials],
        "status": [trial.status for trial in trials],
    }
    columns |= {key: [_cell(trial.values, key) for trial in trials] for key in record.keys}
    columns |= {
        metric: same_decimals(*(finite_float(trial.metrics.get(metric)) for trial in trials), digits=4)
        for metric in record.metrics
    }
    if leads:
        columns["behind the best (95 %)"] = [_behind(leads.get(trial.name)) for trial in trials]
    columns[record.unit] = [format_number(trial.metrics.get(record.unit.rpartition(" ")[2])) for trial in trials]
    columns["time"] = [format_duration(trial.seconds) for trial in trials]
    if any(trial.origin for trial in trials):
        columns["cloned from"] = [trial.origin or "" for trial in trials]
    if reasons:
        columns["excluded"] = [_reason(trial, reasons.get(trial.name, "")) for trial in trials]
    return columns


def _cell(values: Mapping[str, Any], key: str) -> str:
    return format_number(values[key]) if key in values else ""


def _behind(lead: Lead | None) -> str:
    """The lead of the best configuration over a trial's, with its interval."""
    if lead is None:
        return ""
    if lead.low is None:
        return same_decimals(lead.difference)[0]
    difference, low, high = same_decimals(lead.difference, lead.low, lead.high)
    return f"{difference} ({low} to {high})"


def _reason(trial: Trial, reason: str) -> str:
    return shorten(f"failed: {trial.error}", ERROR_CHARACTERS) if reason == "failed" and trial.error else reason
