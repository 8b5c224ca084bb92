"""The run directory: created by the driver, protected from runs that cannot resume its work, with a log per process."""

import contextlib
import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from dpo_ray.config import Config, first_difference, write_config
from dpo_ray.config.resume import has_work
from dpo_ray.config.schema import RunConfig
from dpo_ray.storage import open_appendable, storage_errors

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""File that the command of a run locks as long as it runs."""
JOB_PACKAGES = "runtime_resources/working_dir_files"
"""Part of the path where Ray unpacks the working directory of a submitted job, and deletes it when the job ends."""


def validate_run_dir_permanent(run: RunConfig) -> None:
    """Raises a ValueError if the run directory lies in the temporary working directory of a submitted job."""
    if not run.remote and JOB_PACKAGES in run.path.absolute().as_posix():
        raise ValueError(
            f"run.dir: {run.dir} lies in the temporary folder of the submitted job, which Ray deletes; set run.dir to "
            "an absolute path that all nodes mount, or to an object store such as s3://bucket/runs"
        )


def make_run_dir(config: Config) -> Path:
    """Creates the run directory and writes the resolved configuration to it.

    Raises:
        ValueError: the directory holds the work of a run with another model, reference, data or judge.
    """
    run_dir = config.run.path
    file = run_dir / "config.yaml"
    with storage_errors(run_dir):
        if file.exists() and has_work(run_dir):
            written = yaml.safe_load(file.read_text(encoding="utf-8"))
            if difference := first_difference(written, config):
                raise ValueError(f"{run_dir} was started with {difference}")
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(config, file)
    return run_dir


@contextlib.contextmanager
def exclusive_run_dir(run: RunConfig) -> Iterator[None]:
    """Keeps other commands out of the run directory; the lock ends with the process, however that ends.

    Without effect in an object store, and in file systems that cannot lock.

    Raises:
        ValueError: another command runs in the directory.
    """
    if run.remote:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((run.path / LOCK).open("a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        except BlockingIOError:
            holder = (run.path / LOCK).read_text(encoding="utf-8").strip()
            raise ValueError(
                f"{run.path} is in use by another command ({holder or 'just started'}); wait for its end, stop it, or "
                "set another run.name"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see to it that no other command runs in it", run.path, error)
        yield


def log_to_run(run_dir: Path, name: str) -> None:
    """Sends everything that this process prints and logs to ``logs/NAME.log`` in the run directory.

    Redirects the file descriptors, which includes child processes and C++ libraries.
    """
    file = os.open(open_appendable(run_dir / "logs" / f"{name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logger.info("pid %d, started %s", os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
