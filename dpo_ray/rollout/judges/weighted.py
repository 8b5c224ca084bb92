"""A judge that adds the weighted scores of others."""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_ray.config import Component
from dpo_ray.config.rounds import IMPLICIT
from dpo_ray.rollout.judges.calls import Capacity, capacity_of, is_async, least_capacity, wait_for_all
from dpo_ray.storage import error_summary
from dpo_ray.types import CompletionGroup, Judgement, JudgeUnavailable, is_finite

BindComponent = Callable[[Component], Callable[[], Any]]
CheckScores = Callable[[Sequence[CompletionGroup], Any], list[Judgement]]
KEYS = ("use", "args", "weight", "name")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """One judge of the sum.

    Attributes:
        name: its name in ``Judgement.parts``.
        weight: factor of its scores.
        build: builds it.
    """

    name: str
    weight: float
    build: Callable[[], Any]


class Weighted:
    """The sum of weight times score over several judges, which run concurrently.

    With ``on_failure: skip``, a judge that raises over a group, or has no score for one of its completions, is left out
    of the whole group, so that its completions remain comparable; the sum of the others is scaled by the absolute
    weights, all / used. If no judge scores all completions, those that did not raise are added, and a completion
    without one of their scores has none. A judge that raises is asked once more, for each group alone. If all raise
    over a group, the call fails.

    The number of overlapping calls is the smallest of the components' own limits: 1 with a component that is not async,
    because further calls would wait for it while their time-outs run.

    With ``on_failure: fail``, an exception is that of the call, and a completion without one of the scores has none.

    Args:
        judges: objects with ``use`` and optionally ``args``, ``weight`` (default 1) and ``name`` (default: ``use``
            without its module).
        on_failure: ``skip`` or ``fail``.
        bind_component: ``bind_judge`` for components.
        check_scores: see there.

    Raises:
        ValueError: an argument, or one of a component, is wrong.
    """

    def __init__(
        self,
        judges: Sequence[Mapping[str, Any]],
        on_failure: Literal["skip", "fail"] = "skip",
        *,
        bind_component: BindComponent,
        check_scores: CheckScores,
    ) -> None:
        self._parts = bind_parts(judges, on_failure, bind_component)
        self._skip, self._check_scores = on_failure == "skip", check_scores
        self._judges = [part.build() for part in self._parts]
        # Calls of this judge overlap; those of a component that is not async need not be thread-safe.
        self._locks = [asyncio.Lock() for _ in self._parts]

    @staticmethod
    def validate_arguments(
        judges: Sequence[Mapping[str, Any]], on_failure: str = "skip", *, bind_component: BindComponent, **_: Any
    ) -> None:
        bind_parts(judges, on_failure, bind_component)

    def request_capacity(self, completions: int) -> Capacity:
        """See ``capacity_of``."""
        return least_capacity([capacity_of(judge, completions) for judge in self._judges], completions)

    async def __call__(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        columns = zip(*await wait_for_all(self._answers(i, groups) for i in range(len(self._parts))), strict=True)
        return [
            combine(self._parts, column, len(group.completions), skip=self._skip)
            for group, column in zip(groups, columns, strict=True)
        ]

    async def _answers(self, i: int, groups: Sequence[CompletionGroup]) -> list[Judgement | Exception]:
        """The judgement of each group by one component, or why there is none."""
        try:
            return [*await self._call(i, groups)]
        except JudgeUnavailable:
            raise  # it would be left out of every group from here on
        except Exception as error:
            if not self._skip:
                raise
            logger.warning("judge 'weighted': %s raised %s", self._parts[i].name, error_summary(error))
            return list(await asyncio.gather(*(self._alone(i, group) for group in groups)))

    async def _alone(self, i: int, group: CompletionGroup) -> Judgement | Exception:
        try:
            return (await self._call(i, [group]))[0]
        except JudgeUnavailable:
            raise
        except Exception as error:
            return error

    async def _call(self, i: int, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        judge = self._judges[i]
        if is_async(judge):
            return self._check_scores(groups, await judge(groups))
        async with self._locks[i]:
            return self._check_scores(groups, await asyncio.to_thread(judge, groups))


def bind_parts(judges: Any, on_failure: str, bind_component: BindComponent) -> list[Part]:
    """The components, with their arguments bound and not built.

    Raises:
        ValueError: naming the argument of the judge.
    """
    if on_failure not in ("skip", "fail"):
        raise ValueError(f"judge 'weighted': on_failure is {on_failure!r}; accepted are skip and fail")
    if not isinstance(judges, list | tuple) or not judges:
        raise ValueError(
            f"judge 'weighted': judges is {judges!r}; it must be a list of objects with use, args and weight"
        )
    parts = [_bind_part(f"judges[{i}]", judge, bind_component) for i, judge in enumerate(judges)]
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"judge 'weighted': two judges are called {name!r}; give each a name of its own")
    if not any(part.weight for part in parts):
        raise ValueError("judge 'weighted': all weights are 0; one must differ from 0")
    return parts


def _bind_part(key: str, judge: Any, bind_component: BindComponent) -> Part:
    if not isinstance(judge, Mapping) or not isinstance(judge.get("use"), str):
        raise ValueError(f"judge 'weighted': {key} is {judge!r}; it must be an object with use, args, weight and name")
    if unknown := [name for name in judge if name not in KEYS]:
        raise ValueError(f"judge 'weighted': {key} has the key {unknown[0]!r}; accepted are {', '.join(KEYS)}")
    if judge["use"] == IMPLICIT:
        raise ValueError(
            f"judge 'weighted': {key} is implicit, which the training workers compute for online.judge only"
        )
    weight, args = judge.get("weight", 1.0), judge.get("args") or {}
    if not is_finite(weight):
        raise ValueError(f"judge 'weighted': {key}.weight is {weight!r}; it must be a finite number")
    if not isinstance(args, Mapping):
        raise ValueError(f"judge 'weighted': {key}.args is {args!r}; it must be an object")
    name = judge.get("name") or judge["use"].rpartition(":")[2]
    try:
        return Part(str(name), float(weight), bind_component(Component(use=judge["use"], args=dict(args))))
    except ValueError as error:
        raise ValueError(f"judge 'weighted': {key}: {error}") from None


def combine(
    parts: Sequence[Part], answers: Sequence[Judgement | Exception], completions: int, *, skip: bool
) -> Judgement:
    """The weighted sum over the components that scored a group, with what each of them returned.

    Args:
        answers: by component.
        skip: leave out components with a missing score, see ``Weighted``.

    Raises:
        Exception: that of the first component, if all with a weight raised.
    """
    weighted = {p: a for p, a in zip(parts, answers, strict=True) if isinstance(a, Judgement) and p.weight}
    if not weighted:
        raise next(answer for answer in answers if isinstance(answer, Exception))
    complete = {part: a for part, a in weighted.items() if not any(map(math.isnan, a.scores))}
    used = (complete or weighted) if skip else weighted
    scale = sum(abs(part.weight) for part in parts) / sum(abs(part.weight) for part in used)
    scores = (scale * sum(part.weight * a.scores[i] for part, a in used.items()) for i in range(completions))
    return _merge(parts, answers, tuple(scores), {part.name for part in used})


def _merge(
    parts: Sequence[Part], answers: Sequence[Judgement | Exception], scores: tuple[float, ...], used: set[str]
) -> Judgement:
    rows, means, totals = dict[str, tuple[float, ...]](), dict[str, float](), dict[str, float]()
    for part, answer in zip(parts, answers, strict=True):
        if part.weight and part.name not in used:
            totals[f"{part.name}_skipped"] = 1.0
        if isinstance(answer, Exception):
            rows[part.name] = (math.nan,) * len(scores)
            continue
        rows[part.name] = answer.scores
        rows |= {f"{part.name}_{name}": row for name, row in answer.parts.items()}
        means |= {f"{part.name}_{name}": value for name, value in answer.means.items()}
        totals |= {f"{part.name}_{name}": value for name, value in answer.totals.items()}
    return Judgement(scores, rows, means, totals)
