"""Log files of a run's processes."""

import logging
import os
import sys
import time
from pathlib import Path

from dpo_ray.storage import open_appendable


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
    logging.getLogger(__name__).info("pid %d, started %s", os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
