"""metrics.jsonl, the live view, and how trials are ranked; without a cluster."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dpo_ray.launch.display import live_display
from dpo_ray.launch.status import RunReporter, Status, StatusActor
from dpo_ray.launch.sweep import Sweep, Trial, load_sweep, rank


class HereInProcess:
    """Stands for an actor handle: ``handle.method.remote(...)`` calls at once."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.actor, name)
        return type("Method", (), {"remote": staticmethod(method)})


def reporter(folder: Path, rank: int = 0) -> tuple[RunReporter, StatusActor]:
    board = StatusActor()
    return RunReporter(folder, HereInProcess(board), rank, to_train=False), board


def test_rank_0_writes_each_step_once_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    for rank_ in (0, 1):
        reporter(tmp_path, rank_)[0].step({"step": 1, "loss": 0.5})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 0.5}
    ]


def test_resuming_drops_the_lines_of_lost_work_and_a_line_that_a_kill_cut_off(tmp_path: Path) -> None:
    told, board = reporter(tmp_path)
    for step in (1, 2, 3):
        told.step({"step": step, "loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    told.start(2)
    told.step({"step": 3, "loss": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.25}]
    assert board.read().metrics["loss"] == 0.25


def test_the_board_counts_finished_rounds_and_keeps_the_latest_figures() -> None:
    board = StatusActor()
    board.metrics({"step": 4, "round": 1, "judge/mean_score": 0.5})
    board.metrics({"step": 5, "loss": 0.6})
    status = board.read()
    assert (status.round, status.step) == (2, 5)
    assert status.metrics["judge/mean_score"] == 0.5


def test_a_run_asked_to_stop_has_something_to_save_once_it_has_taken_a_step(tmp_path: Path) -> None:
    told, board = reporter(tmp_path)
    told.start(0)
    assert not board.request_stop()
    told.step({"step": 1, "loss": 0.5})
    assert board.request_stop()
    told.start(1)
    assert board.read().step == 1
    assert not board.request_stop(), "workers that were started again have not gone beyond what is saved"
    assert board.stop_requested()


def test_the_first_fatal_error_counts() -> None:
    board = StatusActor()
    assert board.fatal_error() is None
    board.report_fatal("ValueError: the cause")
    board.report_fatal("RuntimeError: a consequence")
    assert board.fatal_error() == "ValueError: the cause"


def test_without_a_terminal_the_view_is_plain_lines_that_name_phase_round_and_scores() -> None:
    output = io.StringIO()
    status = Status(phase="judging", round=2, metrics={"judge/mean_score": 0.41234, "loss": 0.5})
    with live_display(lambda: status, title="demo", rounds=6, console=Console(file=output, width=60)):
        import time

        time.sleep(1.2)
    (line,) = output.getvalue().splitlines()
    assert "round 3/6: judging candidates" in line
    assert "judge score +0.412" in line
    assert "\x1b" not in line


def test_a_board_that_cannot_be_read_does_not_end_the_view() -> None:
    def read() -> Status:
        raise ConnectionError("the board is gone")

    with live_display(read, title="demo", rounds=None, console=Console(file=io.StringIO())):
        pass


def test_trials_are_ranked_by_the_metric_then_by_the_held_out_loss() -> None:
    def trial(name: str, accuracy: float | None, loss: float) -> Trial:
        return Trial(name, {}, {"accuracy": accuracy, "eval/loss": loss})

    trials = [trial("a", 0.5, 0.9), trial("b", 0.75, 0.7), trial("c", 0.75, 0.6), trial("failed", None, 0.0)]
    assert [t.name for t in rank(trials, Sweep({}, metric="accuracy"))] == ["c", "b", "a"]
    assert [t.name for t in rank(trials, Sweep({}, metric="accuracy", mode="min"))] == ["a", "c", "b"]


def test_every_space_loads_and_an_unknown_one_is_refused_with_what_there_is() -> None:
    assert "loss.beta" in load_sweep("beta_lr").space
    with pytest.raises(ValueError, match=r"beta_rl.*beta_lr"):
        load_sweep("beta_rl")
