"""The live view of a run: one updating block on a terminal, plain lines elsewhere."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from dpo_ray.launch.status import Status

PHASES = {
    "starting": "starting workers",
    "tokenising": "tokenising the data",
    "loading": "loading the model",
    "scoring": "scoring the reference",
    "generating": "generating candidates",
    "judging": "judging candidates",
    "training": "training",
    "syncing": "sending weights to the engines",
    "evaluating": "evaluating on held-out data",
    "exporting": "exporting the policy",
}
POLL_S = 0.5
PLAIN_EVERY_S = 15.0
"""Without a terminal, the longest silence within one phase."""

FIGURES = (
    ("judge score", "judge/mean_score", "{:+.3f}"),
    ("held-out score", "heldout/score", "{:+.3f}"),
    ("accuracy", "rewards/accuracies", "{:.2f}"),
    ("margin", "rewards/margins", "{:+.3f}"),
    ("held-out accuracy", "eval/rewards/accuracies", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("kl", "kl", "{:.1f} nats"),
    ("pairs/s", "perf/pairs_per_s", "{:.2f}"),
)


@contextlib.contextmanager
def live_display(read: Callable[[], Status], *, title: str, rounds: int | None, console: Console) -> Iterator[None]:
    """Show the status until the block ends.

    Args:
        read: the current Status; may raise when it cannot be had for the moment.
        rounds: rounds of the run; None offline, where the phases count steps.
    """
    stop = threading.Event()
    view = _Terminal(title, rounds, console) if console.is_terminal else _Plain(title, rounds, console)

    def watch() -> None:
        told = 0
        with view:
            while not stop.wait(POLL_S):
                try:
                    status = read()
                except Exception:
                    # The board's process may be restarting or already gone; the run itself reports what went wrong.
                    continue
                for note in status.notes[told:]:
                    console.print(note, highlight=False, markup=False, soft_wrap=True)
                told = len(status.notes)
                view.show(status)

    thread = threading.Thread(target=watch, name="display", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


class _Clock:
    """Time left, from the pace of what has been counted since this process first saw it move."""

    def __init__(self, rounds: int | None) -> None:
        self.rounds, self.started = rounds, time.monotonic()
        self.first: tuple[float, float] | None = None

    def share(self, status: Status) -> float | None:
        if self.rounds:
            return None if status.round is None else status.round / self.rounds
        return status.done / status.total if status.phase == "training" and status.total else None

    def left(self, share: float | None) -> str:
        now = time.monotonic()
        if share is None:
            return ""
        if self.first is None:
            self.first = (now, share)
        begun, at = self.first
        if share <= at or share >= 1:
            return ""
        return _span((now - begun) / (share - at) * (1 - share))

    def elapsed(self) -> str:
        return _span(time.monotonic() - self.started)


class _Terminal:
    def __init__(self, title: str, rounds: int | None, console: Console) -> None:
        self.title, self.rounds, self.clock = title, rounds, _Clock(rounds)
        self.spinner = Spinner("dots")
        self.share, self.left_at = 0.0, ("", 0.0)
        self.live = Live(Text("starting"), console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> "_Terminal":
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def show(self, status: Status) -> None:
        share = self.clock.share(status)
        self.share = self.share if share is None else share
        left = self.clock.left(share)
        head = Table.grid(padding=(0, 1))
        self.spinner.update(text=_what(status, self.rounds))
        head.add_row(self.spinner)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=1.0, completed=self.share, width=40),
            Text(f"{self.share:4.0%}  {self.clock.elapsed()} so far" + (f", about {left} left" if left else "")),
        )
        figures = Text("  ".join(_figures(status)), style="dim")
        self.live.update(Group(Text(self.title, style="bold"), head, bar, figures))


class _Plain:
    def __init__(self, title: str, rounds: int | None, console: Console) -> None:
        self.title, self.rounds, self.console, self.clock = title, rounds, console, _Clock(rounds)
        self.live_display: tuple[str, int | None] | None = None
        self.at = 0.0

    def __enter__(self) -> "_Plain":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, status: Status) -> None:
        left = self.clock.left(self.clock.share(status))
        news = self.live_display != (status.phase, status.round)
        if not news and time.monotonic() - self.at < PLAIN_EVERY_S:
            return
        self.live_display, self.at = (status.phase, status.round), time.monotonic()
        figures = _figures(status)
        parts = [
            f"[{self.clock.elapsed()}]",
            _what(status, self.rounds),
            *(["|", "  ".join(figures)] if figures else []),
        ]
        self.console.print(
            " ".join(parts) + (f"  (about {left} left)" if left else ""), highlight=False, markup=False, soft_wrap=True
        )


def _what(status: Status, rounds: int | None) -> str:
    counted = f" {status.done}/{status.total}" if status.total else ""
    where = f"round {min((status.round or 0) + 1, rounds)}/{rounds}: " if rounds else ""
    return where + PHASES.get(status.phase, status.phase) + counted


def _figures(status: Status) -> list[str]:
    return [
        f"{name} {form.format(status.metrics[key])}"
        for name, key, form in FIGURES
        if status.metrics.get(key) is not None
    ]


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
