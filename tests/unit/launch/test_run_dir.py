"""The lock of a run directory."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_ray.config.schema import RunConfig
from dpo_ray.launch.run_dir import LOCK, exclusive_run_dir

HOLD = """
import sys, time
from dpo_ray.config.schema import RunConfig
from dpo_ray.launch.run_dir import exclusive_run_dir
with exclusive_run_dir(RunConfig(dir=sys.argv[1], name="r")):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_commands_of_one_run_directory_exclude_each_other_until_one_dies(tmp_path: Path) -> None:
    run = RunConfig(dir=str(tmp_path), name="r")
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(ValueError, match=rf"r is in use by another command \(pid {other.pid} on "),
            exclusive_run_dir(run),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with exclusive_run_dir(run):
            assert (tmp_path / "r" / LOCK).read_text().startswith("pid ")
    finally:
        other.kill()


def test_a_finished_command_leaves_its_directory_free(tmp_path: Path) -> None:
    run = RunConfig(dir=str(tmp_path), name="r")
    for _ in range(2):
        with exclusive_run_dir(run):
            pass


def test_a_file_system_without_locks_costs_a_warning_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("dpo_ray.launch.run_dir.fcntl.flock", refuse)
    with exclusive_run_dir(RunConfig(dir=str(tmp_path), name="r")):
        assert "cannot be locked" in caplog.text
