"""Numbers as a person reads them."""

import math


def indistinguishable(*values: float, digits: int = 3) -> list[str]:
    """Figures to be compared, all with the decimals that give the largest of them ``digits`` digits."""
    largest = max((abs(value) for value in values), default=0.0)
    decimals = max(0, digits - 1 - math.floor(math.log10(largest))) if largest > 0 else 0
    return [f"{round(value, decimals) + 0.0:,.{decimals}f}" for value in values]


def count_noun(number: int, noun: str) -> str:
    """``3 steps``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
