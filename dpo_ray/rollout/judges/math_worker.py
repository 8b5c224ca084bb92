"""A process that compares mathematical expressions by math-verify; a script that imports nothing of dpo_ray."""

import logging
import math
import resource
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

MEMORY = 4 << 30
"""Address space in bytes: an expression such as a tower of powers fails instead of filling the machine's memory."""
DELIMITERS = ("$", "\\(", "\\[", "\\boxed", "\\begin")


def main(descriptor: int, timeout_s: float) -> None:
    """Answer pairs of answer and completion until the other end closes the connection.

    Args:
        timeout_s: longest processor time of one comparison.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # math-verify's own time-outs look like a text without an expression; without them, it warns.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    compare(r"\frac{1}{2}", r"\boxed{\frac{2}{4}}")  # loads the parser of LaTeX
    with Connection(descriptor) as connection:
        connection.send(True)
        while True:
            try:
                answer, completion = connection.recv()
            except EOFError:
                return
            # The kernel ends this process when the time is up, whatever it does, and also if the caller is gone.
            signal.setitimer(signal.ITIMER_PROF, timeout_s)
            score = compare(answer, completion)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(score)


def compare(answer: str, completion: str) -> float:
    """1 if the completion's expression equals the answer's, 0 if not, NaN if it is unknown."""
    from math_verify import verify

    try:
        gold = answer_expressions(answer)
        if not gold:
            return math.nan
        return float(verify(gold, parsed_expressions(completion), timeout_seconds=None, raise_on_error=True))
    except (MemoryError, RecursionError):
        return math.nan
    except Exception:  # expressions that cannot be compared are not equal, as in math-verify
        return 0.0


@lru_cache(maxsize=64)
def answer_expressions(answer: str) -> list[Any]:
    """The expressions of a reference answer, which may be LaTeX without delimiters."""
    bare = not any(delimiter in answer for delimiter in DELIMITERS)
    if bare and "\\" in answer:
        return parsed_expressions(f"${answer}$")
    return parsed_expressions(answer) or (parsed_expressions(f"${answer}$") if bare else [])


def parsed_expressions(text: str) -> list[Any]:
    """The expressions that math-verify finds in a text."""
    from math_verify import parse

    return parse(text, parsing_timeout=None)  # pyrefly: ignore[bad-argument-type]


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
