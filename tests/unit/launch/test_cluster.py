"""Errors of the connection to a cluster and of a run directory that would be lost; without a cluster."""

import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from dpo_ray.config.schema import ClusterConfig, RunConfig
from dpo_ray.launch.cluster import _sigterm_as_interrupt, ray_cluster
from dpo_ray.launch.run_dir import validate_run_dir_permanent

REJECTED = "RPC error: InvalidAuthToken: Authentication token is missing or incorrect"
UNREACHABLE = "RPC error: Timed out while waiting for GCS to become available"


@pytest.mark.parametrize(
    ("cause", "mode", "message"),
    [
        (REJECTED, None, r"10\.0\.0\.1:6379: it requires a token .* RAY_AUTH_MODE=token .* `ray job submit`"),
        (REJECTED, "token", r"rejects the token of this machine; copy ~/\.ray/auth_token"),
        (UNREACHABLE, None, r"10\.0\.0\.1:6379: check RAY_ADDRESS, or unset it to start a cluster on this machine"),
    ],
)
def test_a_failed_connection_names_the_setting_to_change(
    monkeypatch: pytest.MonkeyPatch, cause: str, mode: str | None, message: str
) -> None:
    def init(num_cpus: int | None = None, **options: Any) -> None:
        if num_cpus is not None:
            raise ValueError("When connecting to an existing cluster, num_cpus must not be provided.")
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from RuntimeError(cause)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(ValueError, match=message), ray_cluster(ClusterConfig(), engines=0):
        pass


def test_a_run_directory_in_the_package_of_a_submitted_job_is_rejected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_a65758aab709b7f4"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(ValueError, match=r"run\.dir: runs lies in the temporary folder .* absolute path"):
        validate_run_dir_permanent(RunConfig(dir="runs", name="demo"))
    validate_run_dir_permanent(RunConfig(dir=str(tmp_path / "runs"), name="demo"))
    validate_run_dir_permanent(RunConfig(dir="s3://bucket/runs", name="demo"))


def test_sigterm_interrupts_a_run_as_ctrl_c_does_and_the_earlier_handler_returns() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
