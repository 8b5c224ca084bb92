"""Ranges of the built-in selectors' arguments, checked before anything starts."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dpo_ray.types import is_finite, is_number


def _from_zero(value: Any) -> bool:
    return is_finite(value) and value >= 0


ACCEPTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("pairs", "k"), (lambda value: type(value) is int and value >= 1, "a whole number from 1")),
    **dict.fromkeys(("min_gap", "penalty", "min_length_ratio"), (_from_zero, "a finite number from 0")),
    **dict.fromkeys(
        ("max_gap", "max_length_ratio"), (lambda value: is_number(value) and value > 0, "a number above 0")
    ),
    "choose_truncated": (lambda value: isinstance(value, bool), "true or false"),
}
"""For each argument the test of a value, and a description of the values that pass."""


def validate_arguments(args: Mapping[str, Any]) -> None:
    """Raise a ValueError if an argument of a built-in selector is out of range."""
    for name, value in args.items():
        is_accepted, accepted = ACCEPTED[name]
        if not is_accepted(value):
            raise ValueError(f"online.select.args.{name} is {value!r}; accepted: {accepted}")
    for name in ("gap", "length_ratio"):
        low, high = args.get(f"min_{name}", 0.0), args.get(f"max_{name}", math.inf)
        if low > high:
            raise ValueError(
                f"online.select.args: min_{name} is {low!r} and max_{name} is {high!r}, so that no pair would be left; "
                f"give min_{name} up to max_{name}"
            )
