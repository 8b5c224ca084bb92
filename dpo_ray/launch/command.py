"""How a command begins and ends: on a cluster, with an exit code and one clear message, whatever happened."""

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
    """The run cannot go on: its workers failed for good, or more often than ``cluster.max_restarts`` allows."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did, where it can go on from."""


def run_command(command: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Call ``command``; bad input exits with 2, a failed run with 1, an interrupted one with 130.

    Ray Train turns Ctrl-C into ``sys.exit(0)``, which must not pass for success.
    """
    try:
        command(*arguments, **named)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except (TrainingFailed, StorageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from None
    except Stopped as error:
        print(f"{error}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (KeyboardInterrupt, SystemExit):
        print("interrupted; what was finished is kept, and the same run.name goes on from there", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(FAILED) from None


def run_on_cluster(command: str, config: Config, *arguments: Any, engines: int = 0, local_runs: int = 1) -> None:
    """Call a function of (config, cluster, ...) on the cluster that the run joins or starts.

    Args:
        command: import path. It is imported while the cluster starts, since either takes seconds.
        engines, local_runs: see ``ray_cluster``.
    """
    set_environment(config.cluster)
    with ThreadPoolExecutor(1, "import") as beside:
        module, _, name = command.partition(":")
        imported = beside.submit(importlib.import_module, module)
        with ray_cluster(config.cluster, engines=engines, local_runs=local_runs) as cluster:
            getattr(imported.result(), name)(config, cluster, *arguments)
