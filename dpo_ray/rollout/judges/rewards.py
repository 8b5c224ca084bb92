"""Numbers that reward functions return, as judgements of groups."""

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, SupportsFloat

from dpo_ray.types import CompletionGroup, Judgement

Parts = Mapping[str, Sequence[float] | None]


def each(values: Any, use: str, count: int) -> list[Any]:
    """The values of a list, an array or a tensor, one per completion; None, which is no score, becomes NaN.

    Raises:
        ValueError: not ``count`` values.
    """
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable) or not _is_sized(values):
        raise ValueError(
            f"judge {use!r} returned {values!r} for {count} completions; it must return one value for each"
        )
    listed = [math.nan if value is None else value for value in values]
    if len(listed) != count:
        raise ValueError(f"judge {use!r} returned {len(listed)} values for {count} completions")
    return listed


def numbers(values: Any, use: str, count: int) -> tuple[float, ...] | None:
    """Values of a logged column, NaN for None; None if some are not numbers.

    Raises:
        ValueError: not ``count`` values.
    """
    converted = [number(value) for value in each(values, use, count)]
    return None if None in converted else tuple(value for value in converted if value is not None)


def number(value: Any) -> float | None:
    """The value as a float, None if it is not a number."""
    if isinstance(value, SupportsFloat) and not _is_sized(value):
        return float(value)
    return None


def split(
    groups: Sequence[CompletionGroup],
    scores: Sequence[Any],
    parts: Parts | None = None,
    means: Mapping[str, float] | None = None,
) -> list[Judgement]:
    """Judgements of the groups from values per completion, in order. Parts that are None are left out."""
    judgements, start = [], 0
    for group in groups:
        end = start + len(group.completions)
        of_group = {name: tuple(part[start:end]) for name, part in (parts or {}).items() if part is not None}
        judgements.append(Judgement(tuple(scores[start:end]), of_group, means or {}))
        start = end
    return judgements


def _is_sized(value: Any) -> bool:
    """True for a list, an array or a tensor with dimensions; also 0-dimensional ones have a length method."""
    try:
        return isinstance(value, Sized) and len(value) >= 0
    except TypeError:
        return False
