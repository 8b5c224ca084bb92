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


def format_duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s`` or ``2 h 5 min``; tenths below ten seconds."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
