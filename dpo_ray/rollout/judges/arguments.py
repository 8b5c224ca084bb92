"""Validation of the arguments and keys of judges."""

import os
from typing import Any

from dpo_ray.types import is_finite


def check_argument(judge: str, name: str, value: Any, accepted: bool, what: str) -> None:
    """Raise a ValueError that names the argument, its value and ``what`` is accepted, unless ``accepted``."""
    if not accepted:
        raise ValueError(f"judge {judge!r}: {name} is {value!r}; accepted is {what} (online.judge.args.{name})")


def is_count(value: Any, least: int = 1) -> bool:
    """True for an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_duration(value: Any) -> bool:
    """True for a positive finite number."""
    return is_finite(value) and value > 0


def is_text(value: Any) -> bool:
    """True for a text that is not empty."""
    return isinstance(value, str) and bool(value.strip())


def key_of(judge: str, variable: str) -> str:
    """The key in an environment variable of the judge's process; empty if it is not set.

    Raises:
        ValueError: no header can have the key.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"judge {judge!r}: the environment variable {variable} holds characters that no header can have "
            "(online.judge.args.api_key_env)"
        )
    return key
