"""Formatting of numbers and texts for people."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.types import finite_or_none, is_finite, is_number


def same_decimals(*values: float | None, digits: int = 3) -> list[str]:
    """Format values with one number of decimals, so that the largest has ``digits`` significant digits.

    "-" for None and NaN.
    """
    finite = [value for value in values if is_finite(value)]
    largest = max(map(abs, finite), default=0.0)
    decimals = max(0, digits - 1 - math.floor(math.log10(largest))) if largest > 0 else 0
    return [f"{round(value, decimals) + 0.0:,.{decimals}f}" if is_finite(value) else "-" for value in values]


def format_number(value: Any, digits: int = 4) -> str:
    """Up to ``digits`` significant digits: ``0.5813``, ``12,346``, ``5e-6``; "-" for None and NaN, text as it is."""
    if finite_or_none(value) is None:
        return "-"
    if not is_number(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10**digits else re.sub(r"e-0+", "e-", f"{value:.{digits}g}")


def format_tick(value: float, position: int | None = None) -> str:
    """A number on an axis, as short as it can be: ``12k``, ``1e-6``."""
    text = f"{value / 1000:.4g}k" if abs(value) >= 10_000 else format_number(value)
    return "0" if text == "-0" else re.sub("^-", "−", text)  # noqa: RUF001


def format_duration(seconds: float) -> str:
    """``4.2 s``, ``45 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def short_names(names: Sequence[str]) -> list[str]:
    """Keys and metrics by their last parts, as many as make them different: ``lr``, ``accuracies``, ``loss.use``."""
    parts = [re.split("(?<=[./])", name) for name in names]
    return [_short_name(number, parts) for number in range(len(parts))]


def _short_name(number: int, parts: Sequence[Sequence[str]]) -> str:
    own = parts[number]
    for count in range(1, len(own)):
        tail = own[-count:]
        if tail != ["use"] and not any(other[-count:] == tail for i, other in enumerate(parts) if i != number):
            return "".join(tail)
    return "".join(own)


def count_noun(number: int, noun: str) -> str:
    """``1 step``, ``3 steps``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shorten(text: str, characters: int = 4000) -> str:
    """At most ``characters`` of a text, and the number of those left out."""
    return text if len(text) <= characters else f"{text[:characters]} … ({len(text) - characters:,} more characters)"


def prompt_text(prompt: Sequence[Mapping[str, str]]) -> str:
    """A conversation as plain text: a single user turn alone, several turns with their roles."""
    if len(prompt) == 1 and prompt[0].get("role", "user") == "user":
        return prompt[0].get("content", "")
    return "\n".join(f"{message.get('role', 'user')}: {message.get('content', '')}" for message in prompt)
