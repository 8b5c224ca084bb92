"""The report of a run that is still training."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from dpo_ray.report import sweep_summary as summary
from dpo_ray.report.live.follower import LiveReport
from dpo_ray.report.page import write_report
from dpo_ray.report.record import read_run
from dpo_ray.sweep.trials import Objective, Trial


def running_run(path: Path, *, steps: int, incomplete: str = "") -> Path:
    lines = [json.dumps({"step": step, "loss": 0.6, "rewards/margins": 0.1}) + "\n" for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(lines) + incomplete, encoding="utf-8")
    return path


def write_running_report(path: Path) -> Path:
    return write_report(read_run(path, running=True), running=True)


def test_a_running_report_shows_the_last_complete_step_and_reloads(tmp_path):
    html = write_running_report(running_run(tmp_path, steps=3, incomplete='{"step": 4, "lo')).read_text()
    assert "Running: step 3 at 20" in html
    assert '<meta http-equiv="refresh" content="60">' in html


def test_the_final_report_neither_shows_running_nor_reloads(tmp_path):
    html = write_report(read_run(running_run(tmp_path, steps=3))).read_text()
    assert "Running" not in html
    assert "http-equiv" not in html


def test_a_run_without_any_file_yet_has_a_running_report(tmp_path):
    assert "Running: no step yet" in write_running_report(tmp_path).read_text()


def test_a_live_report_is_written_at_most_once_per_minute(tmp_path):
    live = LiveReport(partial(write_running_report, running_run(tmp_path, steps=1)))
    assert [live.maybe_write(now) for now in (1000.0, 1059.0, 1030.0)] == [True, False, False]
    assert live.maybe_write(2000.0)


def test_a_live_report_that_fails_warns_once_and_tries_again(tmp_path, caplog):
    live = LiveReport(partial(write_running_report, tmp_path / "run"))
    assert not live.maybe_write(1000.0)
    assert not live.maybe_write(2000.0)
    assert len(caplog.records) == 1
    (tmp_path / "run").mkdir()
    assert live.maybe_write(3000.0)


def test_importing_the_live_report_leaves_matplotlib_out():
    code = "import sys, dpo_ray.report.live.follower; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_report_of_a_running_sweep_is_written_once_a_trial_has_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "POLL_S", 0.01)
    trials = [Trial("a", {"loss.beta": 0.1}, "running")]
    page, deadline = tmp_path / "report.html", time.monotonic() + 60
    with summary.live_sweep_report(lambda: trials, tmp_path, Objective("eval/loss", "min")):
        time.sleep(0.1)
        assert not page.exists()
        trials = [Trial("a", {"loss.beta": 0.1}, "running", {"step": 4, "eval/loss": 0.6})]
        while not page.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "So far: Pick loss.beta = 0.1: its eval/loss is 0.6." in page.read_text()
