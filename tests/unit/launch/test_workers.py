"""Errors after which the training workers are restarted, and errors that end the run."""

import errno

import pytest
import torch

from dpo_ray.launch.workers import is_retryable


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (ValueError("bad data"), False),
        (torch.OutOfMemoryError("no memory left"), False),
        (OSError(errno.ENOSPC, "no space left"), False),
        (ConnectionError("connection reset by peer"), True),
        (RuntimeError("gloo: connection closed by peer"), True),
    ],
)
def test_broken_connections_are_retried_and_errors_that_would_repeat_are_not(
    monkeypatch: pytest.MonkeyPatch, error: Exception, retryable: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert is_retryable(error) is retryable


def test_an_error_after_ray_tore_down_the_process_group_is_retried() -> None:
    assert not torch.distributed.is_initialized()
    assert is_retryable(ValueError("Default process group has not been initialized"))
