"""The live table of a sweep: its rows, its estimate, and its lines without a terminal."""

import io
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dpo_ray.report.live import trial_table as module
from dpo_ray.report.live.trial_table import Scope, latest_step, live_trials, progress_text, seconds_left, trial_table
from dpo_ray.sweep.trials import Objective, Trial

SCOPE = Scope(Objective("eval/loss", "min"), samples=6, slots=2, length=8)


def trial(number: int, status: str, *, seconds: float = 0.0, loss: float | None = None, step: int = 8) -> Trial:
    metrics = {} if loss is None else {"step": step, "eval/loss": loss}
    return Trial(f"{number:05d}", {"loss.beta": number / 10}, status, metrics, seconds)  # type: ignore[arg-type]


TRIALS = [
    trial(1, "done", seconds=100, loss=0.62),
    trial(2, "stopped", seconds=60, loss=0.66, step=4),
    replace(trial(3, "failed", seconds=5), error="out of memory"),
    trial(4, "running", seconds=30, loss=0.5, step=4),
    trial(5, "running", seconds=70),
]


def test_the_time_left_follows_from_ended_trials_and_slots() -> None:
    # 80 s per trial: 50 + 10 s of the running ones and 80 s of the sixth, by two slots, are less than 80 s.
    assert seconds_left(TRIALS, SCOPE) == 80
    # Three more to begin: (50 + 10 + 3 * 80) / 2.
    assert seconds_left(TRIALS, replace(SCOPE, samples=8)) == 150
    assert seconds_left(TRIALS, replace(SCOPE, samples=5)) == 50


def test_a_trial_that_outlives_the_others_takes_as_long_as_its_steps() -> None:
    """Two of three were stopped after 10 s; the third has taken 20 s for 4 of 12 steps."""
    paused = trial(3, "waiting", seconds=20, loss=0.5, step=4)
    trials = [trial(1, "stopped", seconds=10), trial(2, "stopped", seconds=10), paused]
    assert seconds_left(trials, replace(SCOPE, samples=3, length=12)) == pytest.approx(40)


def test_the_estimate_counts_down_between_the_evaluations_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "time", lambda: 1000.0)
    trials = [trial(1, "done", seconds=100), replace(trial(2, "running", seconds=40, loss=0.5, step=4), since=985.0)]
    scope = replace(SCOPE, samples=2)
    assert seconds_left(trials, scope) == 45
    monkeypatch.setattr(module.time, "time", lambda: 1020.0)
    assert seconds_left(trials, scope) == 25
    slow = replace(trials[1], seconds=120.0)
    assert seconds_left([trials[0], slow], scope) == 85, "120 s for half of its steps, the latest 35 s ago"
    monkeypatch.setattr(module.time, "time", lambda: 2000.0)
    assert seconds_left(trials, scope) == 0


def test_paused_trials_count_with_their_chance_to_continue() -> None:
    paused = [trial(number, "waiting", seconds=25, loss=0.5, step=2) for number in range(3)]
    trials = [*paused, trial(3, "running", seconds=50, loss=0.5, step=4), trial(4, "waiting")]
    # 100 s per whole trial: three times 75 s, of which a third, 50 s, and 100 s of the one that has not begun.
    assert seconds_left(trials, replace(SCOPE, samples=5, slots=1, continues=1 / 3)) == pytest.approx(75 + 50 + 100)
    assert seconds_left(trials, replace(SCOPE, samples=5, slots=1)) == pytest.approx(225 + 50 + 100)


def test_before_a_trial_has_ended_the_rate_of_the_running_ones_counts() -> None:
    running = [trial(1, "running", seconds=30, loss=0.5, step=4), trial(2, "running")]
    assert seconds_left(running, SCOPE) == pytest.approx((30 + 60 + 4 * 60) / 2)
    assert seconds_left(running, replace(SCOPE, length=None)) is None
    assert seconds_left([trial(1, "failed", seconds=5)], SCOPE) is None


def test_the_table_has_values_step_metric_status_and_the_best_so_far() -> None:
    output = io.StringIO()
    Console(file=output, width=120).print(trial_table(TRIALS, SCOPE))
    lines = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert lines == [
        "trial beta step loss status",
        "00001 0.1 8 0.62 done, best so far",
        "00002 0.2 4 0.66 stopped",
        "00003 0.3 - - failed",
        "00004 0.4 4 0.5 running",
        "00005 0.5 - - running",
        "3 of 6 trials ended (1 stopped, 1 failed), 2 running, about 1 min 20 s left",
    ]


def test_running_trials_have_the_steps_taken_since_their_evaluation() -> None:
    output = io.StringIO()
    steps = {"00004": 6, "00005": 1}
    Console(file=output, width=120).print(trial_table(TRIALS, SCOPE, steps))
    Console(file=output, width=120).print(trial_table(TRIALS, replace(SCOPE, unit="round"), steps))
    lines = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert "00004 0.4 4 0.5 running, step 6 of 8" in lines
    assert "00005 0.5 - - running, step 1 of 8" in lines
    assert "00005 0.5 - - running, step 1" in lines, "the length of an online trial is in rounds"


@pytest.mark.parametrize(
    ("content", "step"),
    [
        (None, None),
        ("", None),
        ('{"step": 3, "loss": 0.5}', None),
        ('{"step": 3, "loss": 0.5}\n', 3),
        ('{"step": 3, "loss": 0.5}\n{"step": 4, "lo', 3),
        ('{"step": 3, "loss": 0.5, "note": "' + "x" * 20_000 + '"}\n', None),
        ('{"step": 3, "note": "' + "x" * 20_000 + '"}\n{"step": 12, "loss": null}\n', 12),
    ],
)
def test_the_latest_step_is_that_of_the_last_complete_line(
    content: str | None, step: int | None, tmp_path: Path
) -> None:
    file = tmp_path / "metrics.jsonl"
    if content is not None:
        file.write_text(content)
    assert latest_step(file) == step


def test_of_many_trials_the_best_the_running_and_the_latest_are_shown() -> None:
    ended = [trial(number, "done", seconds=9, loss=1 / number) for number in range(1, 31)]
    trials = [*ended, trial(31, "running"), *(trial(number, "waiting") for number in range(32, 40))]
    output = io.StringIO()
    Console(file=output, width=120).print(trial_table(trials, SCOPE, max_rows=6))
    names = [line.split()[0] for line in output.getvalue().splitlines()[1:-2]]
    assert names == ["00026", "00027", "00028", "00029", "00030", "00031"]
    assert "and 33 more" in output.getvalue()


def test_without_a_terminal_each_ended_trial_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    output, seen = io.StringIO(), threading.Event()
    snapshots = [TRIALS[:1], TRIALS[:3]]

    def read() -> list[Trial]:
        if len(snapshots) == 1:
            seen.set()
        return snapshots.pop(0) if len(snapshots) > 1 else snapshots[0]

    with live_trials(read, SCOPE, title="demo", console=Console(file=output, width=200), folder=tmp_path):
        assert seen.wait(30)
    lines = [line.partition("] ")[2] for line in output.getvalue().splitlines()]
    assert lines == [
        f"trial 00002, loss.beta = 0.2, stopped: eval/loss 0.66 at step 4 | {progress_text(TRIALS[:3], SCOPE)}",
        f"trial 00003, loss.beta = 0.3, failed: out of memory | {progress_text(TRIALS[:3], SCOPE)}",
    ]


def test_a_terminal_shows_the_table(tmp_path: Path) -> None:
    output, read_twice = io.StringIO(), threading.Event()
    count = iter(range(3))

    def read() -> list[Trial]:
        if next(count, None) is None:
            read_twice.set()
        return TRIALS

    console = Console(file=output, width=120, force_terminal=True)
    (tmp_path / "00005").mkdir()
    (tmp_path / "00005/metrics.jsonl").write_text('{"step": 2}\n')
    with live_trials(read, SCOPE, title="demo: sweep", console=console, folder=tmp_path):
        assert read_twice.wait(30)
    assert "demo: sweep" in output.getvalue()
    assert "best so far" in output.getvalue()
    assert "running, step 2 of 8" in output.getvalue()
