"""Judges: what scores the candidates of a round. How to build one, and the check of what it returns.

A judge sees text-level groups only. It runs beside the engines, never in a training worker.
"""

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol, SupportsFloat

from dpo_ray.config import Component
from dpo_ray.plugins import build, check_arguments, resolve
from dpo_ray.rollout.judges.length import Length
from dpo_ray.rollout.judges.sentiment import Sentiment
from dpo_ray.types import CompletionGroup


class Judge(Protocol):
    """Scores completions; higher is better. Only order and gaps within one group matter.

    A judge that compares two completions at a time has this shape too: it returns how often each one won.
    """

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        """One list a group, one score a completion, both in the order given; NaN where no score could be found."""
        ...


def build_judge(component: Component) -> Judge:
    """The judge that ``online.judge`` names.

    An import path may name either of two things, told apart by their signature:

    - a function (or other callable) with a required parameter called ``groups`` is the judge itself; ``args`` are bound
      to its other parameters;
    - anything else, and every class, is a factory: it is called with ``args`` and returns the judge.

    Raises:
        ValueError: the name is unknown, an argument is not taken or is missing, or the factory returned no callable.
    """
    part = resolve(component.use, JUDGES, "judge")
    if _is_judge(part):
        if "groups" in component.args:
            raise ValueError(f"judge {component.use!r}: groups cannot be set in args; each call passes it")
        check_arguments(part, component.args, component.use, "judge")
        return partial(part, **component.args)
    judge = build(component.use, component.args, JUDGES, "judge")
    if not callable(judge):
        raise ValueError(
            f"judge {component.use!r} returned {_described(judge)}; a judge factory must return a callable that takes "
            "groups, and a plain judge function must call its first parameter groups"
        )
    return judge


def check_scores(groups: Sequence[CompletionGroup], scores: Any) -> list[list[float]]:
    """What a judge returned, as plain floats of the right shape.

    A score that is NaN or infinite becomes NaN: selectors leave that candidate out, and the round counts it in
    ``bad_scores``.

    Raises:
        ValueError: not one list a group, not one score a completion, or a score is not a number.
    """
    if not isinstance(scores, Collection) or len(scores) != len(groups):
        raise ValueError(
            f"the judge returned {_described(scores)} for {len(groups)} groups; "
            "it must return one list of scores for each group"
        )
    return [_check_group(number, group, row) for number, (group, row) in enumerate(zip(groups, scores, strict=True))]


def _check_group(number: int, group: CompletionGroup, row: Any) -> list[float]:
    if not isinstance(row, Collection) or len(row) != len(group.completions):
        raise ValueError(
            f"the judge returned {_described(row)} for the {len(group.completions)} completions of group {number} "
            f"(prompt {group.prompt.index}); it must return one score for each completion"
        )
    for score in row:
        if not isinstance(score, SupportsFloat):
            raise ValueError(
                f"the judge returned {score!r} as a score in group {number} (prompt {group.prompt.index}); "
                "a score is a number, or NaN where there is none"
            )
    numbers = [float(score) for score in row]
    return [number if math.isfinite(number) else math.nan for number in numbers]


def _is_judge(part: Any) -> bool:
    if isinstance(part, type) or not callable(part):
        return False
    groups = inspect.signature(part).parameters.get("groups")
    return groups is not None and groups.default is inspect.Parameter.empty


def _described(value: Any) -> str:
    if isinstance(value, Collection) and not isinstance(value, str):
        return f"a {type(value).__name__} of length {len(value)}"
    return repr(value)


JUDGES: dict[str, Callable[..., Judge]] = {"length": Length, "sentiment": Sentiment}
"""Built-in factories. Building one may import a package; naming it does not."""
