"""The live display of a run: one updating block on a terminal, plain lines elsewhere."""

import contextlib
import threading
import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TimeElapsedColumn
from rich.text import Text

from dpo_ray.report.formatting import format_duration
from dpo_ray.report.live.status import Status
from dpo_ray.threads import in_background

PHASES = {
    "starting": "starting workers",
    "tokenizing": "tokenizing the data",
    "loading": "loading the model",
    "scoring": "computing reference log-probabilities",
    "waiting": "waiting for engines and candidates",
    "generating": "generating candidates",
    "judging": "judging candidates",
    "syncing": "sending weights to the engines",
    "evaluating": "evaluating on held-out data",
    "exporting": "exporting the policy",
}
METRICS = (
    ("judge score", "judge/mean_score", "{:+.3f}"),
    ("held-out score", "heldout/score", "{:+.3f}"),
    ("held-out win rate", "heldout/win_rate", "{:.2f}"),
    ("accuracy", "rewards/accuracies", "{:.2f}"),
    ("margin", "rewards/margins", "{:+.3f}"),
    ("held-out accuracy", "eval/rewards/accuracies", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("kl", "kl", "{:.1f} nats"),
    ("pairs/s", "perf/pairs_per_s", "{:.2f}"),
)
POLL_S = 0.5
CLOSE_TIMEOUT_S = 10.0
"""Longest wait for the last output at the end."""
PLAIN_EVERY_S = 15.0
"""Without a terminal, longest time between two lines."""


def live_display(
    read: Callable[[], Status], *, title: str, rounds: int | None, console: Console
) -> contextlib.AbstractContextManager[None]:
    """Displays the status until the block ends.

    Args:
        read: returns the current Status; may raise while it is unavailable.
        rounds: rounds of the run; None offline, where progress is counted in steps.
    """
    display = _Display(title, rounds, console)

    def watch(stop: threading.Event) -> None:
        with display.live if console.is_terminal else contextlib.nullcontext():
            while not stop.wait(POLL_S):
                try:
                    status = read()
                except Exception:
                    continue  # the status actor is restarting or gone; the run itself reports its failure
                display.show(status)

    return in_background(watch, "display", close_timeout_s=CLOSE_TIMEOUT_S)


def text_console() -> Console:
    """A console that prints texts unchanged: completions and paths may look like rich's markup."""
    return Console(markup=False, highlight=False)


class _Display:
    def __init__(self, title: str, rounds: int | None, console: Console) -> None:
        self.rounds, self.console = rounds, console
        columns = (SpinnerColumn(), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, "elapsed{task.fields[left]}", console=console)
        self.task = self.progress.add_task("", total=None, left="")
        self.first: tuple[float, int] | None = None
        """Time and finished units of the first counted status."""
        self.phase, self.metrics = Text("starting"), Text(style="dim")
        block = Group(Text(title, style="bold"), self.phase, self.progress, self.metrics)
        self.live = Live(block, console=console, refresh_per_second=8, transient=True)
        self.notes = 0
        self.printed: tuple[str, int | None] | None = None
        self.printed_at = 0.0

    def show(self, status: Status) -> None:
        for note in status.notes[self.notes :]:
            self.console.print(note, soft_wrap=True)
        self.notes = len(status.notes)
        self._count(status)
        self.phase.plain, self.metrics.plain = _phase(status, self.rounds), _metrics(status)
        if not self.console.is_terminal:
            self._show_plain(status)

    def _count(self, status: Status) -> None:
        done, total = status.round, self.rounds
        if not total and status.phase == "training":
            done, total = status.done, status.total
        if done is None or not total:
            return
        now = time.monotonic()
        began, first = self.first = self.first or (now, done)
        left = (now - began) / (done - first) * (total - done) if first < done < total else 0.0
        # Never completed, so that the clock also counts the export that follows.
        completed = min(done, total - 1e-6)
        text = f", about {format_duration(left)} left" if left else ""
        self.progress.update(self.task, completed=completed, total=total, left=text)

    def _show_plain(self, status: Status) -> None:
        phase = (status.phase, status.round)
        if phase == self.printed and time.monotonic() - self.printed_at < PLAIN_EVERY_S:
            return
        self.printed, self.printed_at = phase, time.monotonic()
        (task,) = self.progress.tasks
        line = f"[{format_duration(task.elapsed or 0.0)}{task.fields['left']}] {self.phase.plain}"
        line += f" | {self.metrics.plain}" if self.metrics.plain else ""
        self.console.print(line, soft_wrap=True)


def _phase(status: Status, rounds: int | None) -> str:
    progress = f" {status.done}/{status.total}" if status.total else ""
    round = f"round {min((status.round or 0) + 1, rounds)}/{rounds}: " if rounds else ""
    return round + PHASES.get(status.phase, status.phase) + progress


def _metrics(status: Status) -> str:
    values = ((name, form, status.metrics.get(key)) for name, key, form in METRICS)
    return "  ".join(f"{name} {form.format(value)}" for name, form, value in values if value is not None)
