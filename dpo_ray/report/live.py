"""Rewrites the report of a run that is still training. Imports matplotlib only when it writes."""

import logging
import time
from pathlib import Path

logger = logging.getLogger(__name__)

MIN_INTERVAL_S = 60.0
MAX_LOAD = 0.05
"""Share of the driver's time that writing may take: a report that takes longer is written less often."""


class LiveReport:
    """Keeps ``report.html`` of a running run up to date; call ``maybe_write`` after each evaluation or round."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.next_write_s = 0.0
        self.failed = False

    def maybe_write(self, now: float | None = None) -> bool:
        """Write the report unless the last attempt is too recent; returns True if it was written.

        Never raises: the first failure is logged, and later calls try again.

        Args:
            now: seconds on a monotonic clock.
        """
        started = time.monotonic()
        now = started if now is None else now
        if now < self.next_write_s:
            return False
        try:
            from dpo_ray.report.page import write_report

            write_report(self.run_dir, running=True)
            return True
        except Exception as error:
            if not self.failed:
                logger.warning("report.html is not up to date: %s: %s", type(error).__name__, error)
            self.failed = True
            return False
        finally:
            self.next_write_s = now + max(MIN_INTERVAL_S, (time.monotonic() - started) / MAX_LOAD)
