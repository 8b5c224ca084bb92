"""Which values count as numbers."""

import math
from typing import Any

import pytest

from dpo_ray.types import finite_float, finite_or_none


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (-0.5, -0.5),
        (10**300, 1e300),
        (10**400, None),
        (-(10**400), None),
        (math.nan, None),
        (math.inf, None),
        (True, None),
        ("3", None),
        (None, None),
    ],
)
def test_a_number_within_the_range_of_floats_is_finite(value: Any, number: float | None) -> None:
    assert finite_float(value) == number


def test_json_gets_null_for_numbers_that_it_does_not_have() -> None:
    tree = {"loss": math.nan, "of_pairs": [1.5, math.inf, (2, -math.inf)], "name": "nan"}
    assert finite_or_none(tree) == {"loss": None, "of_pairs": [1.5, None, [2, None]], "name": "nan"}
