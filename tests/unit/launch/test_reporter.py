"""metrics.jsonl and the status of a run; without a cluster."""

import json
from pathlib import Path
from typing import Any

from dpo_ray.launch.reporter import RunReporter, TrialReporter
from dpo_ray.launch.status import StatusActor


class InProcess:
    """Stands for an actor handle: ``handle.method.remote(...)`` calls at once."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.actor, name)
        return type("Method", (), {"remote": staticmethod(method)})


def reporter_and_status(folder: Path, rank: int = 0) -> tuple[RunReporter, StatusActor]:
    status = StatusActor()
    return RunReporter(folder, InProcess(status), rank), status


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rank_0_writes_each_step_once_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    for rank in (0, 1):
        reporter_and_status(tmp_path, rank)[0].step({"step": 1, "loss": 0.5})
    assert metrics_lines(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_resuming_drops_the_lines_of_lost_work_and_an_incomplete_line(tmp_path: Path) -> None:
    reporter, status = reporter_and_status(tmp_path)
    for step in (1, 2, 3):
        reporter.step({"step": step, "loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    reporter.start(2)
    reporter.step({"step": 3, "loss": 0.25})
    assert metrics_lines(tmp_path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.25}]
    assert status.read().metrics["loss"] == 0.25


def test_the_metrics_of_a_round_stand_on_the_line_of_its_last_step(tmp_path: Path) -> None:
    status = StatusActor()
    reporter = RunReporter(tmp_path, InProcess(status), 0, online=True)
    for step in (1, 2):
        reporter.step({"step": step, "loss": step / 10})
    assert status.read().metrics["loss"] == 0.2, "the display does not wait for the end of the round"
    reporter.round({"step": 2, "round": 0, "kl": 0.5})
    reporter.round({"step": 2, "round": 1, "kl": 0.6})
    assert metrics_lines(tmp_path) == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2, "round": 0, "kl": 0.5},
        {"step": 2, "round": 1, "kl": 0.6},
    ]


def test_the_status_counts_finished_rounds_and_keeps_the_latest_metrics() -> None:
    actor = StatusActor()
    actor.metrics({"step": 4, "round": 1, "judge/mean_score": 0.5})
    actor.metrics({"step": 5, "loss": 0.6})
    status = actor.read()
    assert (status.round, status.metrics["step"]) == (2, 5)
    assert status.metrics["judge/mean_score"] == 0.5


def test_the_status_leaves_out_the_accuracy_of_tied_pairs_before_the_first_step(tmp_path: Path) -> None:
    reporter, status = reporter_and_status(tmp_path)
    reporter.evaluation({"step": 0, "eval/loss": 0.6931, "eval/rewards/accuracies": 0.0})
    assert metrics_lines(tmp_path)[0]["eval/rewards/accuracies"] == 0.0
    assert status.read().metrics == {"step": 0, "eval/loss": 0.6931}
    reporter.evaluation({"step": 2, "eval/loss": 0.7, "eval/rewards/accuracies": 0.0})
    assert status.read().metrics["eval/rewards/accuracies"] == 0.0


def test_a_stopping_run_has_something_to_save_once_it_has_taken_a_step(tmp_path: Path) -> None:
    reporter, status = reporter_and_status(tmp_path)
    reporter.start(0)
    assert not status.request_stop()
    reporter.step({"step": 1, "loss": 0.5})
    assert status.request_stop()
    reporter.start(1)
    assert status.read().metrics["step"] == 1
    assert not status.request_stop(), "restarted workers have not gone beyond the checkpoint"
    assert status.stop_requested()


def test_the_first_fatal_error_is_kept() -> None:
    status = StatusActor()
    assert status.fatal_error() is None
    status.report_fatal("ValueError: the cause")
    status.report_fatal("RuntimeError: a consequence")
    assert status.fatal_error() == "ValueError: the cause"


class Questions:
    """Stands for the channel of a trial: keeps its reports."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def ask(self, kind: str, trial: str) -> None: ...

    def report(self, trial: str, metrics: dict[str, Any], *, final: bool) -> str:
        self.reports.append(metrics)
        return "continue"


def test_an_evaluation_of_a_resumed_trial_before_its_next_step_has_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    channel = Questions()
    reporter = TrialReporter(tmp_path, channel, "00000", 0, rounds=4)  # type: ignore[arg-type]
    reporter.start(6, 3)
    reporter.round_evaluation(3, {"heldout/score": 0.5})
    reporter.step({"step": 7})
    reporter.round_evaluation(4, {"heldout/score": 0.6})
    assert channel.reports == [
        {"step": 6, "round": 3, "heldout/score": 0.5},
        {"step": 7, "round": 4, "heldout/score": 0.6},
    ]
