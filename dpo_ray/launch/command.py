"""Runs a command: on a cluster, with an exit code, and with one clear message if it fails."""

import importlib
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dpo_ray.config import Config
from dpo_ray.launch.cluster import ray_cluster, set_environment
from dpo_ray.storage import StorageFailed

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class TrainingFailed(RuntimeError):
    """The workers failed with a non-retryable error, or more often than ``cluster.max_restarts``."""


class Stopped(KeyboardInterrupt):
    """The run stopped on request, at a checkpoint from which it can be resumed."""


def run_command(command: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Calls ``command``; exits with 2 on bad input, 1 if the run failed and 130 if it was interrupted.

    Ray Train turns Ctrl-C into ``sys.exit(0)``, which would look like success.
    """
    try:
        command(*arguments, **named)
    except (ValueError, TrainingFailed, StorageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT if isinstance(error, ValueError) else FAILED) from None
    except Stopped as error:
        print(f"{error}; rerun the same command to resume", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (KeyboardInterrupt, SystemExit):
        print("interrupted; rerun the same command to resume from the last checkpoint or round", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(FAILED) from None


def run_on_cluster(command: str, config: Config, *arguments: Any, engines: int = 0, local_runs: int = 1) -> None:
    """Calls a function of (config, cluster, ...) on the cluster that the run joins or starts.

    Args:
        command: import path; imported while the cluster starts, since each takes seconds.
        engines, local_runs: see ``ray_cluster``.
    """
    set_environment(config.cluster)
    judges = config.online.started_judges if config.online is not None else {}
    with ThreadPoolExecutor(1, "import") as executor:
        module, _, name = command.partition(":")
        imported = executor.submit(importlib.import_module, module)
        with ray_cluster(config.cluster, engines=engines, judges=judges, local_runs=local_runs) as cluster:
            getattr(imported.result(), name)(config, cluster, *arguments)
