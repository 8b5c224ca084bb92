"""How a command ends: with an exit code and one clear message, whatever happened."""

import sys
import traceback
from collections.abc import Callable
from typing import Any

from dpo_ray.launch.workers import Stopped, TrainingFailed
from dpo_ray.storage import StorageFailed

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def run_command(command: Callable[..., Any], *arguments: Any) -> None:
    """Call ``command``; bad input exits with 2, a failed run with 1, an interrupted one with 130.

    Ray Train turns Ctrl-C into ``sys.exit(0)``, which must not pass for success.
    """
    try:
        command(*arguments)
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
