"""Judges score the candidates of a round. This module builds them and validates what they return.

A judge gets groups of texts. It runs beside the engines, never in a training worker.
"""

import inspect
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from dpo_ray.config import Component
from dpo_ray.config.rounds import JudgeConfig, OnlineConfig, SamplingConfig
from dpo_ray.plugins import bind, bind_factory, check_arguments, resolve
from dpo_ray.rollout.judges.calls import capacity_of as capacity_of
from dpo_ray.rollout.judges.calls import is_async as is_async
from dpo_ray.rollout.judges.columns import columns_of
from dpo_ray.rollout.judges.functions import RewardFunction, adapt, check_function, reward_format
from dpo_ray.rollout.judges.http import Http
from dpo_ray.rollout.judges.implicit import Implicit
from dpo_ray.rollout.judges.length import Length
from dpo_ray.rollout.judges.llm import Llm, Policy
from dpo_ray.rollout.judges.reward_model import RewardModel
from dpo_ray.rollout.judges.sentiment import Sentiment
from dpo_ray.rollout.judges.verifiable import Exact, JsonSchema, Math, Regex
from dpo_ray.rollout.judges.weighted import Weighted
from dpo_ray.rollout.tally import SCORE_METRICS, SCORES
from dpo_ray.types import CompletionGroup, Judgement, Messages, Prompt

Scores = Sequence[Sequence[float] | Judgement]


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """Services of a run for a judge: a factory with a parameter ``context`` gets it."""

    run_dir: Path
    """The run directory, for a cache."""
    complete: Callable[[Messages, SamplingConfig], Awaitable[str]]
    """Complete a conversation by the run's engines with their present policy.

    Raises:
        ValueError: the conversation is too long for the engines.
        RequestTimedOut, EngineError: see ``Dispatcher.generate``.
    """
    decode: Callable[[Sequence[int]], str]
    """Text of token ids by the policy's tokenizer, with special tokens; for judges that get rendered prompts."""
    columns: Collection[str] | None = None
    """Columns of the prompts' records, see ``columns_of``; None if they are not known."""


class Judge(Protocol):
    """Scores completions; higher is better. Only order and gaps within one group matter.

    A judge that compares completions pairwise returns how often each one won. An async function is a judge, too; its
    calls overlap. A judge may limit them by an attribute ``concurrency``, see ``capacity_of``.
    """

    def __call__(self, groups: Sequence[CompletionGroup]) -> Scores | Awaitable[Scores]:
        """Judge groups.

        Returns:
            Per group one score per completion, in order, NaN for a completion without a score; or a ``Judgement``.
        """
        ...


def bind_judge(
    component: Component, context: JudgeContext | None = None, columns: Collection[str] | None = None
) -> Callable[[], Judge]:
    """A function that builds the judge of ``online.judge``; checked here, so that wrong arguments fail at once.

    An import path names a judge function or a reward function of another library (see ``functions``), to which ``args``
    are bound, or a factory that is called with ``args`` and returns one.

    Args:
        context: None where the judge is checked and not built.
        columns: of the prompts' records, see ``columns_of``; None takes those of ``context``, if there are any.

    Raises:
        ValueError: the name or an argument is unknown, an argument is missing, or no record has a column that the judge
            needs; for a reward function that a factory makes, the judge that is built raises this.
    """
    use, args = component.use, component.args
    columns = context.columns if columns is None and context is not None else columns
    part = resolve(use, JUDGES, "judge")
    if is_judge_function(part):
        if "groups" in args:
            raise ValueError(f"judge {use!r}: groups cannot be set in args; each call passes it")
        judge = bind(use, args, JUDGES, "judge")
        return lambda: judge
    if reward_format(part):
        check_arguments(part, args, use, "judge")
        return _bind_reward_function(part, args, use, context, columns)
    components = {"bind_component": partial(bind_judge, context=context, columns=columns), "check_scores": check_scores}
    factory = bind_factory(use, args, JUDGES, "judge", context=context, **components)
    if use in JUDGES and (validate := getattr(part, "validate_arguments", None)):
        validate(**{name: value for name, value in factory.keywords.items() if name in args or name in components})
    if use in JUDGES and (required := getattr(part, "required_columns", None)):
        for column in required(**args):
            column.require(columns)
    if isinstance(component, JudgeConfig):
        _validate_timeouts(component)
    return partial(_call_factory, factory, use, context, columns)


def validate_columns(online: OnlineConfig, columns: Mapping[str, Collection[str]]) -> None:
    """Raise a ValueError if no prompt has a column that a judge of the run needs; see ``bind_judge``.

    Args:
        columns: see ``columns_by_judge``.
    """
    sources = {"judge": "online.prompts", "eval_judge": "online.eval_prompts"}
    for key, judge in online.judges.items():
        try:
            bind_judge(judge, columns=columns[key])
        except ValueError as error:
            raise ValueError(f"{sources[key]}: {error}") from None


def columns_by_judge(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> dict[str, set[str]]:
    """The columns of the prompts that each judge gets, by its key in ``OnlineConfig.judges``."""
    return {"judge": columns_of(prompts), "eval_judge": columns_of(held_out)}


def _validate_timeouts(judge: JudgeConfig) -> None:
    """Raise a ValueError if a call would end before a request that it waits for has been tried as often as it may."""
    for part in judge.parts():
        longest = getattr(JUDGES.get(part.use), "longest_request_s", None)
        if longest is not None and (seconds := longest(**part.args)) > judge.timeout_s:
            place = f" (online.judge{part.key})" if part.key else ""
            raise ValueError(
                f"judge {part.use!r}{place}: a request may take {seconds:g} s (args.timeout_s of each attempt, "
                f"args.retries + 1 attempts), longer than timeout_s={judge.timeout_s:g} of a whole call; "
                "raise the latter or lower one of the others"
            )


def _bind_reward_function(
    function: Callable[..., Any],
    args: Mapping[str, Any],
    use: str,
    context: JudgeContext | None,
    columns: Collection[str] | None,
) -> Callable[[], Any]:
    known = reward_format(function)
    assert known is not None
    reward = RewardFunction(function, args, use, context.decode if context else None, columns)
    check_function(reward, known)
    return partial(adapt, reward, known)


def _call_factory(
    factory: Callable[[], Any], use: str, context: JudgeContext | None, columns: Collection[str] | None
) -> Judge:
    judge = factory()
    if reward_format(judge):
        return _bind_reward_function(judge, {}, use, context, columns)()
    if not callable(judge):
        raise ValueError(
            f"judge {use!r} returned {_described(judge)}; a judge factory must return a callable that takes "
            "groups, and a plain judge function must call its first parameter groups, or have the parameters of a "
            "reward function of TRL, OpenRLHF or verl"
        )
    return judge


def is_judge_function(part: Any) -> bool:
    """True for a function that is itself a judge: one with a required parameter ``groups``. A class is a factory."""
    if inspect.isclass(part) or not callable(part):
        return False
    groups = inspect.signature(part).parameters.get("groups")
    return groups is not None and groups.default is groups.empty


def check_scores(groups: Sequence[CompletionGroup], scores: Any) -> list[Judgement]:
    """Validate a judge's return value and convert it to judgements.

    A score that is not finite becomes NaN: selectors skip that candidate, and the round counts it in ``bad_scores``.

    Raises:
        ValueError: not one list per group, not one score per completion, or a score is not a number.
    """
    if not isinstance(scores, Collection) or len(scores) != len(groups):
        raise ValueError(
            f"the judge returned {_described(scores)} for {len(groups)} groups; "
            "it must return one list of scores for each group"
        )
    return [_judgement(number, group, row) for number, (group, row) in enumerate(zip(groups, scores, strict=True))]


def _judgement(number: int, group: CompletionGroup, row: Any) -> Judgement:
    if not isinstance(row, Judgement):
        return Judgement(_check_group(number, group, row))
    parts = {_own(name, SCORES): _check_group(number, group, part) for name, part in row.parts.items()}
    means, totals = (_check_metrics(number, group, metrics) for metrics in (row.means, row.totals))
    totals = {name: value for name, value in totals.items() if math.isfinite(value)}
    return replace(row, scores=_check_group(number, group, row.scores), parts=parts, means=means, totals=totals)


def _own(name: str, taken: Collection[str]) -> str:
    """Name under which a judge's metric is stored: prefixed if every round has a metric of that name."""
    return f"own_{name}" if name in taken else name


def _check_metrics(number: int, group: CompletionGroup, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats: a round's files hold no other numbers."""
    for name, value in metrics.items():
        if not isinstance(value, SupportsFloat):
            raise ValueError(
                f"the judge returned {value!r} as {name} of group {number} (prompt {group.prompt.index}); it must be a "
                "number"
            )
    return {_own(name, SCORE_METRICS): float(value) for name, value in metrics.items()}


def _check_group(number: int, group: CompletionGroup, row: Any) -> tuple[float, ...]:
    if not isinstance(row, Collection) or len(row) != len(group.completions):
        raise ValueError(
            f"the judge returned {_described(row)} for the {len(group.completions)} completions of group {number} "
            f"(prompt {group.prompt.index}); it must return one score for each completion"
        )
    for score in row:
        if not isinstance(score, SupportsFloat):
            raise ValueError(
                f"the judge returned {score!r} as a score in group {number} (prompt {group.prompt.index}); "
                "a score must be a number, or NaN for no score"
            )
    numbers = [float(score) for score in row]
    return tuple(number if math.isfinite(number) else math.nan for number in numbers)


def _described(value: Any) -> str:
    if isinstance(value, Collection) and not isinstance(value, str):
        return f"a {type(value).__name__} of length {len(value)}"
    return repr(value)


JUDGES: dict[str, Callable[..., Judge]] = {
    "exact": Exact,
    "http": Http,
    "implicit": Implicit,
    "json_schema": JsonSchema,
    "length": Length,
    "llm": Llm,
    "math": Math,
    "policy": Policy,
    "regex": Regex,
    "reward_model": RewardModel,
    "sentiment": Sentiment,
    "weighted": Weighted,
}
"""Built-in factories. A judge's packages are imported when it is built. ``bind_judge`` checks the arguments of one with
a static method ``validate_arguments``, its time-outs by ``longest_request_s``, and its columns by
``required_columns``."""
