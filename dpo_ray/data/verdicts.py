"""Verdicts on two completions, by the fields of public preference sets."""

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from dpo_ray.data.fields import Fields
from dpo_ray.types import is_finite


def finite_number(value: Any) -> float | None:
    """A finite number, or None; CSV files hold numbers as text, and tables may hold decimal ones."""
    if isinstance(value, str | Decimal):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_finite(value) else None


class Verdict(NamedTuple):
    """The fields of two completions and of the verdict on them."""

    first: str
    second: str
    field: str
    """Holds the verdict."""
    second_is_better: Callable[[Any], float | None]
    """Above 0 if the second completion is better, below 0 if the first is, 0 for a tie, None if unknown."""
    graded: bool = False
    """True if a larger value is a stronger preference."""


def _by_value(values: Mapping[Any, float]) -> Callable[[Any], float | None]:
    def second_is_better(value: Any) -> float | None:
        number = finite_number(value)
        key = value.strip().lower() if isinstance(value, str) and number is None else number
        return values.get(key)

    return second_is_better


_VERDICTS = (
    Verdict("response_1", "response_2", "preference_strength", finite_number, graded=True),
    Verdict("response1", "response2", "overall_preference", finite_number, graded=True),
    Verdict("response_0", "response_1", "better_response_id", _by_value({0: -1, 1: 1})),
    Verdict("human_ref_A", "human_ref_B", "labels", _by_value({1: -1, 0: 1})),
    Verdict(
        "conversation_a", "conversation_b", "winner",
        _by_value({"model_a": -1, "model_b": 1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}),
    ),
)  # fmt: skip
"""HelpSteer 2, HelpSteer 3, PKU-SafeRLHF, Stanford Human Preferences, arena battles."""


def verdict_of(fields: Fields) -> Verdict | None:
    """The verdict that a record has; None for other layouts."""
    return next((v for v in _VERDICTS if all(map(fields.has, (v.first, v.second, v.field)))), None)
