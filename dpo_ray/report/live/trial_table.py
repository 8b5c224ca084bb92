"""The live display of a sweep: a table of its trials on a terminal, a line per ended trial elsewhere."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpo_ray.report.formatting import count_noun, format_duration, format_number, short_names
from dpo_ray.report.live.display import CLOSE_TIMEOUT_S
from dpo_ray.report.sweep_text import settings_text
from dpo_ray.sweep.ranking import rank
from dpo_ray.sweep.trials import ENDED, Objective, Trial
from dpo_ray.sweep.verdict import varying_keys
from dpo_ray.threads import in_background

MAX_ROWS = 16
TAIL_BYTES = 16384
"""Longer than any line of metrics.jsonl."""
NO_STEPS: Mapping[str, int] = {}
POLL_S = 0.5
PLAIN_EVERY_S = 60.0
"""Without a terminal, longest time between two lines."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The size of a sweep."""

    objective: Objective
    samples: int
    """Trials in all, also those that do not exist yet."""
    slots: int
    """Trials that run at once."""
    length: int | None = None
    """Steps (rounds online) of a whole trial; None if it is not known."""
    unit: str = "step"
    continues: float = 1.0
    """Share of the trials that pause at a rung which the scheduler lets continue."""


def seconds_left(trials: Sequence[Trial], scope: Scope) -> float | None:
    """Estimated time to the end of a sweep; None before there is anything to estimate it from.

    A trial that has not ended takes as long as the mean of the trials that ended without an error; or before the first
    one, and where it took longer, as long as its steps at their rate up to its latest evaluation. The time since then
    is subtracted. A trial that was evaluated and waits counts with its chance to continue. The slots share the work;
    the end waits for the longest trial.
    """
    whole = _trial_seconds(trials, scope)
    if whole is None:
        return None
    running = [_left(trial, whole, scope) for trial in trials if trial.status == "running"]
    ended = sum(trial.status in ENDED for trial in trials)
    begun = [
        _left(trial, whole, scope) * (scope.continues if trial.metrics else 1.0)
        for trial in trials
        if trial.status == "waiting"
    ]
    not_begun = max(0, scope.samples - ended - len(running) - len(begun))
    work = sum(running) + sum(begun) + whole * not_begun
    longest = max([*running, *begun, whole * (not_begun > 0)], default=0.0)
    return max(work / max(1, scope.slots), longest)


def _left(trial: Trial, whole: float, scope: Scope) -> float:
    """Seconds to the end of a trial, if one takes ``whole`` seconds."""
    steps = trial.metrics.get(scope.unit)
    at_evaluation = whole - trial.seconds
    if trial.seconds >= whole and scope.length and steps:
        at_evaluation = trial.seconds * (scope.length / steps - 1)
    since = 0.0 if trial.since is None else time.time() - trial.since
    return max(0.0, at_evaluation - since)


def _trial_seconds(trials: Sequence[Trial], scope: Scope) -> float | None:
    ended = [trial.seconds for trial in trials if trial.status in ("done", "stopped")]
    if ended:
        return sum(ended) / len(ended)
    rates = [
        trial.seconds / steps * scope.length
        for trial in trials
        if scope.length and trial.status == "running" and (steps := trial.metrics.get(scope.unit))
    ]
    return sum(rates) / len(rates) if rates else None


def trial_table(
    trials: Sequence[Trial], scope: Scope, steps: Mapping[str, int] = NO_STEPS, *, max_rows: int = MAX_ROWS
) -> RenderableType:
    """The trials that matter at the moment: the best so far, those that run, and the ones that ended last.

    Args:
        steps: optimizer steps that the running trials have taken, by name; metrics are those of the latest evaluation.
    """
    ranked, keys = rank(trials, scope.objective).ranked, varying_keys([trial.values for trial in trials])
    best = ranked[0] if ranked else None
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("trial")
    *short_keys, metric = short_names([*keys, scope.objective.metric])
    for name in (*short_keys, scope.unit, metric):
        table.add_column(name, justify="right")
    table.add_column("status")
    shown = _shown(trials, ranked, max_rows)
    for trial in shown:
        cells = [format_number(trial.values.get(key), 3) for key in keys]
        cells += [format_number(trial.metrics.get(name)) for name in (scope.unit, scope.objective.metric)]
        status = f"{trial.status}, best so far" if trial is best else trial.status
        if trial.name in steps:
            of_length = f" of {scope.length}" if scope.length and scope.unit == "step" else ""
            status += f", step {steps[trial.name]}{of_length}"
        style = "bold" if trial is best else {"running": "", "failed": "red"}.get(trial.status, "dim")
        table.add_row(*(Text(cell) for cell in (trial.name, *cells, status)), style=style)
    hidden = [Text(f"and {len(trials) - len(shown)} more", style="dim")] if len(shown) < len(trials) else []
    return Group(table, *hidden, Text(progress_text(trials, scope)))


def _shown(trials: Sequence[Trial], ranked: Sequence[Trial], rows: int) -> list[Trial]:
    running = [trial for trial in trials if trial.status == "running"]
    latest = [trial for trial in reversed(trials) if trial.status in ENDED]
    waiting = [trial for trial in trials if trial.status == "waiting"]
    names = [trial.name for trial in (*ranked[:3], *running, *latest, *waiting)]
    chosen = set(list(dict.fromkeys(names))[:rows])
    return [trial for trial in trials if trial.name in chosen]


def progress_text(trials: Sequence[Trial], scope: Scope) -> str:
    """``5 of 16 trials ended (1 failed), 2 running, about 12 min 0 s left``."""
    counts = {status: sum(trial.status == status for trial in trials) for status in (*ENDED, "running")}
    kinds = [f"{counts[status]} {status}" for status in ("stopped", "failed") if counts[status]]
    ended = sum(counts[status] for status in ENDED)
    text = f"{ended} of {count_noun(scope.samples, 'trial')} ended" + (f" ({', '.join(kinds)})" if kinds else "")
    left = seconds_left(trials, scope)
    estimate = f", about {format_duration(left)} left" if left else ""
    return f"{text}, {counts['running']} running{estimate}"


def live_trials(
    read: Callable[[], Sequence[Trial]], scope: Scope, *, title: str, console: Console, folder: Path
) -> contextlib.AbstractContextManager[None]:
    """Displays the trials until the block ends.

    Args:
        read: returns the current state of the trials; called in another thread.
        folder: ``trials/`` of the sweep, with the metrics.jsonl of each.
    """

    def watch(stop: threading.Event) -> None:
        if console.is_terminal:
            with Live(console=console, refresh_per_second=4, transient=True) as live:
                while not stop.wait(POLL_S):
                    live.update(_block(read(), scope, title, folder))
        else:
            lines = _Lines(scope, console)
            while not stop.wait(POLL_S):
                lines.show(read())
            lines.show(read())

    return in_background(watch, "display", close_timeout_s=CLOSE_TIMEOUT_S)


def _block(trials: Sequence[Trial], scope: Scope, title: str, folder: Path) -> RenderableType:
    running = [trial.name for trial in trials if trial.status == "running"]
    found = {name: latest_step(folder / name / "metrics.jsonl") for name in running}
    steps = {name: step for name, step in found.items() if step is not None}
    content = trial_table(trials, scope, steps) if trials else Text("starting workers")
    return Group(Text(title, style="bold"), content)


def latest_step(file: Path) -> int | None:
    """The optimizer step of the last complete line of a metrics.jsonl; None if there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - TAIL_BYTES))
            complete, newline, _ = stream.read().rpartition(b"\n")
        return json.loads(complete.splitlines()[-1])["step"] if newline else None
    except (OSError, ValueError, LookupError):
        return None


class _Lines:
    """Prints a line per ended trial, and the progress if nothing has ended for a while."""

    def __init__(self, scope: Scope, console: Console) -> None:
        self.scope, self.console = scope, console
        self.started = self.printed_at = time.monotonic()
        self.ended: set[str] | None = None
        """Trials that were printed; None before the first snapshot, whose ended trials are of an earlier session."""

    def show(self, trials: Sequence[Trial]) -> None:
        ended = {trial.name for trial in trials if trial.status in ENDED}
        fresh = ended - (ended if self.ended is None else self.ended)
        self.ended = ended
        for trial in trials:
            if trial.name in fresh:
                self._print(f"{_ended(trial, trials, self.scope)} | {progress_text(trials, self.scope)}")
        if time.monotonic() - self.printed_at > PLAIN_EVERY_S:
            self._print(progress_text(trials, self.scope))

    def _print(self, text: str) -> None:
        self.printed_at = time.monotonic()
        elapsed = format_duration(self.printed_at - self.started)
        self.console.print(f"[{elapsed}] {text}", soft_wrap=True)


def _ended(trial: Trial, trials: Sequence[Trial], scope: Scope) -> str:
    """``trial 00003 done: loss.beta = 0.1: eval/loss 0.62 at step 8 (best so far)``."""
    metric = scope.objective.metric
    settings = settings_text(trial.values, varying_keys([other.values for other in trials]))
    if trial.status == "failed":
        outcome = f"failed: {trial.error}"
    else:
        value = format_number(trial.metrics.get(metric))
        outcome = f"{trial.status}: {metric} {value} at {scope.unit} {trial.metrics.get(scope.unit, '-')}"
    ranked = rank(trials, scope.objective).ranked
    best = " (best so far)" if ranked and ranked[0].name == trial.name else ""
    return f"trial {trial.name}, {settings}, {outcome}{best}"
