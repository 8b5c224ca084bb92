"""The live display, on a terminal and elsewhere."""

import io
import threading
from collections.abc import Callable

import pytest
from rich.console import Console

from dpo_ray.report.live import display
from dpo_ray.report.live.display import live_display
from dpo_ray.report.live.status import Status

TIMEOUT_S = 30


@pytest.fixture(autouse=True)
def _polling_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "POLL_S", 0.01)


def show_all(read: Callable[[], Status], polls: int, *, rounds: int | None, console: Console) -> None:
    """Display until ``read`` has been called ``polls`` times and the status of each call but the last is shown."""
    calls, enough = iter(range(1, polls)), threading.Event()

    def counted() -> Status:
        if next(calls, None) is None:
            enough.set()
        return read()

    with live_display(counted, title="demo", rounds=rounds, console=console):
        assert enough.wait(TIMEOUT_S)


def displayed(statuses: list[Status], rounds: int | None, *, terminal: bool = False) -> str:
    """The output while ``statuses`` are read one after another; the last one stays."""
    output = io.StringIO()

    def read() -> Status:
        return statuses.pop(0) if len(statuses) > 1 else statuses[0]

    console = Console(file=output, width=100, force_terminal=terminal)
    show_all(read, len(statuses) + 1, rounds=rounds, console=console)
    return output.getvalue()


def test_without_a_terminal_a_line_names_phase_round_and_metrics() -> None:
    status = Status(phase="judging", round=2, metrics={"judge/mean_score": 0.41234, "loss": 0.5})
    (line,) = displayed([status], rounds=6).splitlines()
    assert "round 3/6: judging candidates | judge score +0.412  loss 0.5000" in line
    assert "\x1b" not in line


def test_the_time_left_is_estimated_from_the_first_finished_round_on() -> None:
    statuses = [Status(), Status(round=0), Status(round=0), Status(round=0), Status(round=1)]
    lines = displayed(statuses, rounds=10).splitlines()
    assert [("round 1/10" in line, "left]" in line) for line in lines] == [(True, False), (True, False), (False, True)]


def test_notes_are_printed_once() -> None:
    status = Status(phase="loading", notes=("resuming after step 3 of 9",))
    assert displayed([status, status], rounds=None).count("resuming after step 3 of 9") == 1


def test_a_terminal_shows_title_phase_progress_and_metrics() -> None:
    status = Status(phase="training", done=5, total=10, metrics={"loss": 0.5})
    output = displayed([status], rounds=None, terminal=True)
    assert all(part in output for part in ("demo", "training 5/10", "50%", "elapsed", "loss 0.5000"))


def test_an_unreadable_status_does_not_end_the_display() -> None:
    def read() -> Status:
        raise ConnectionError("the status actor is gone")

    show_all(read, 2, rounds=None, console=Console(file=io.StringIO()))
