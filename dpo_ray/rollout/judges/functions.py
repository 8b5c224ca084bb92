"""Reward functions of other libraries as judges: TRL's, OpenRLHF's and verl's, recognized by their parameters.

Each gets what its own library passes for the same records, and its return value becomes judgements.
"""

import asyncio
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dpo_ray.rollout.judges.calls import is_async
from dpo_ray.rollout.judges.columns import Column, label_column
from dpo_ray.rollout.judges.rewards import each, number, numbers, split
from dpo_ray.types import CompletionGroup, Judgement, Prompt

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]
Groups = Sequence[CompletionGroup]
Finish = Callable[[list[Any]], list[Judgement]]
"""Converts the return values of a function's calls to judgements."""
Prepare = Callable[[Groups], tuple[list[dict[str, Any]], Finish]]
"""Keyword arguments of every call of the function for some groups, and the conversion of the results."""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A function of another library, with arguments bound.

    Attributes:
        call: the function.
        args: arguments from the configuration.
        use: name for messages.
        decode: text of token ids, special tokens included, by the policy's tokenizer; None outside a run.
        columns: of the prompts' records, see ``columns_of``; None if they are not known.
    """

    call: Callable[..., Any]
    args: Mapping[str, Any]
    use: str
    decode: Decode | None = None
    columns: Collection[str] | None = None

    def asks_for(self, name: str) -> bool:
        """True if a call may pass ``name``."""
        return name not in self.args and (name in self.parameters or self.any_keyword)

    def requires(self, name: str) -> bool:
        """True if a call must pass ``name``."""
        return name not in self.args and name in self.parameters and _is_required(self.parameters[name])

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Named parameters of the function."""
        return {n: p for n, p in _signature(self.call).items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

    @property
    def any_keyword(self) -> bool:
        """True if the function takes any keyword argument."""
        return any(p.kind is p.VAR_KEYWORD for p in _signature(self.call).values())


@dataclass(frozen=True, slots=True)
class Format:
    """A signature that reward functions have.

    Attributes:
        library: for messages.
        passed: parameters with the texts to judge, which arguments from the configuration cannot replace.
        other: parameters that the library passes besides; None if it passes every column of the records.
        prepare: builds the calls.
        optional: required parameters that may be without a value in all records.
    """

    library: str
    passed: tuple[str, ...]
    other: tuple[str, ...] | None
    prepare: Callable[[RewardFunction], Prepare]
    optional: tuple[str, ...] = ()


def reward_format(part: Any) -> Format | None:
    """The format whose required parameters the function has, or None. A class is a factory and has none."""
    if inspect.isclass(part) or not callable(part):
        return None
    required = {name for name, parameter in _signature(part).items() if _is_required(parameter)}
    return next((known for mark, known in FORMATS.items() if mark in required), None)


def check_function(function: RewardFunction, known: Format) -> None:
    """Reject arguments that each call passes, parameters that nothing fills, and columns that no record has.

    Raises:
        ValueError: naming the argument or the column.
    """
    for name in known.passed:
        if name in function.args:
            raise ValueError(f"judge {function.use!r}: {name} cannot be set in args; each call passes it")
    for name in function.parameters:
        absent = name in NOT_HERE if known.other is None else name not in (*known.passed, *known.other)
        if absent and function.requires(name):
            raise ValueError(
                f"judge {function.use!r} is a reward function of {known.library} and needs {name!r}, which a judge "
                f"does not have; set it in online.judge.args"
            )
    for name in function.parameters:
        if function.requires(name) and name not in (*known.passed, *known.optional):
            Column(name, function.use).require(function.columns)


def adapt(function: RewardFunction, known: Format) -> Callable[[Groups], Any]:
    """The judge that calls the function; async if the function is.

    Raises:
        ValueError: the function needs the policy's tokenizer, and there is none.
    """
    prepare, call = known.prepare(function), partial(function.call, **function.args)

    def judge(groups: Groups) -> list[Judgement]:
        calls, finish = prepare(groups)
        return finish([call(**arguments) for arguments in calls])

    async def async_judge(groups: Groups) -> list[Judgement]:
        calls, finish = prepare(groups)
        return finish(await asyncio.gather(*(call(**arguments) for arguments in calls)))

    return async_judge if is_async(function.call) else judge


# ----------------------------------------------------------------------------------------------------------------- TRL

NOT_HERE = ("trainer_state", "environments")
"""Objects of TRL's trainer, which a judge's process does not have."""
_TRL = ("prompts", "completions", "completion_ids", "log_metric", "log_extra")


def _trl(function: RewardFunction) -> Prepare:
    """``f(prompts, completions, completion_ids, **columns)``, called once with all completions of all groups."""
    required = [Column(n, function.use) for n in function.parameters if n not in _TRL and function.requires(n)]

    def prepare(groups: Groups) -> tuple[list[dict[str, Any]], Finish]:
        prompts = [group.prompt for group in groups for _ in group.completions]
        metrics, extras = defaultdict[str, list[float]](list), defaultdict[str, list[Any]](list)
        values = {column.name: column.lookup(prompts) for column in required}
        values |= _optional_columns(function, prompts, {*values, *_TRL})
        values |= {
            "prompts": [_trl_prompt(prompt) for prompt in prompts],
            "completions": [_trl_completion(group.prompt, c.text) for group in groups for c in group.completions],
            "completion_ids": [list(c.token_ids) for group in groups for c in group.completions],
            "log_metric": lambda name, value: metrics[name].append(float(value)),
            "log_extra": lambda column, values: extras[column].extend(values),
        }

        def finish(results: list[Any]) -> list[Judgement]:
            parts = {name: numbers(extra, function.use, len(prompts)) for name, extra in extras.items()}
            means = {name: sum(seen) / len(seen) for name, seen in metrics.items()}
            return split(groups, each(results[0], function.use, len(prompts)), parts, means)

        return [{name: value for name, value in values.items() if function.asks_for(name)}], finish

    return prepare


def _optional_columns(
    function: RewardFunction, prompts: Sequence[Prompt], known: Iterable[str]
) -> dict[str, list[Any]]:
    """Columns that some record has and the function takes without requiring them."""
    names = dict.fromkeys(function.parameters)
    if function.any_keyword:
        names |= dict.fromkeys(name for prompt in prompts for name in prompt.fields)
    columns = {n: Column(n, function.use).lookup(prompts) for n in names if n not in (*known, *NOT_HERE)}
    return {name: column for name, column in columns.items() if any(value is not None for value in column)}


def _trl_prompt(prompt: Prompt) -> str | list[dict[str, Any]]:
    return [dict(message) for message in prompt.messages] if prompt.text is None else prompt.text


def _trl_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    return [{"role": "assistant", "content": text}] if prompt.text is None else text


# ------------------------------------------------------------------------------------------------------------ OpenRLHF


def _openrlhf(function: RewardFunction) -> Prepare:
    """``reward_func(queries, prompts, labels)``, called once with all completions of all groups."""
    if function.decode is None:
        raise ValueError(
            f"judge {function.use!r} is a reward function of OpenRLHF, whose queries and prompts are decoded by the "
            "policy's tokenizer; build it with a JudgeContext that has decode"
        )
    decode, labels = function.decode, label_column(function.use, function.columns)

    def prepare(groups: Groups) -> tuple[list[dict[str, Any]], Finish]:
        prompts = [group.prompt for group in groups for _ in group.completions]
        golds = labels.lookup(prompts)
        values = {
            "queries": [decode((*g.prompt.token_ids, *c.token_ids)) for g in groups for c in g.completions],
            "prompts": [decode(prompt.token_ids) for prompt in prompts],
            "labels": ["" if value is None else value for value in golds],
        }

        def finish(results: list[Any]) -> list[Judgement]:
            return _openrlhf_judgements(groups, results[0], function.use)

        return [{name: value for name, value in values.items() if function.asks_for(name)}], finish

    return prepare


def _openrlhf_judgements(groups: Groups, result: Any, use: str) -> list[Judgement]:
    count = sum(len(group.completions) for group in groups)
    if not isinstance(result, Mapping):
        return split(groups, each(result, use, count))
    rewards = result.get("rewards", result.get("scores"))
    if rewards is None:
        raise ValueError(f"judge {use!r} returned the keys {', '.join(result)}; rewards or scores must be one of them")
    scores = each(rewards, use, count)
    logs = dict(result.get("extra_logs") or {})
    if result.get("scores") is not None and each(result["scores"], use, count) != scores:
        logs["scores"] = result["scores"]
    means = {name: value for name, log in logs.items() if (value := number(log)) is not None}
    parts = {name: numbers(log, use, count) for name, log in logs.items() if name not in means}
    return split(groups, scores, parts, means)


# ---------------------------------------------------------------------------------------------------------------- verl


def _verl(function: RewardFunction) -> Prepare:
    """``compute_score(data_source, solution_str, ground_truth, extra_info)``, called for each completion."""
    columns = {name: Column(name, function.use) for name in ("data_source", "ground_truth") if function.asks_for(name)}

    def prepare(groups: Groups) -> tuple[list[dict[str, Any]], Finish]:
        prompts = [group.prompt for group in groups for _ in group.completions]
        texts = [completion.text for group in groups for completion in group.completions]
        values = {name: column.lookup(prompts) for name, column in columns.items()}
        values |= {"solution_str": texts, "extra_info": list(map(_extra_info, prompts))}
        asked = {name: column for name, column in values.items() if function.asks_for(name)}
        calls = [{name: column[i] for name, column in asked.items()} for i in range(len(texts))]
        return calls, partial(_verl_judgements, groups, function.use)

    return prepare


def _extra_info(prompt: Prompt) -> Any:
    """The field of the record: {} without one; a mapping is copied, since functions write into it."""
    value = prompt.fields.get("extra_info")
    return dict(value) if isinstance(value, Mapping) else {} if value is None else value


def _verl_judgements(groups: Groups, use: str, results: list[Any]) -> list[Judgement]:
    rows = [result if isinstance(result, Mapping) else {"score": result} for result in results]
    for row in rows:
        if "score" not in row:
            raise ValueError(f"judge {use!r} returned the keys {', '.join(row)}; score must be one of them")
    names = {n: None for row in rows for n, value in row.items() if n != "score" and number(value) is not None}
    parts = {name: numbers([row.get(name) for row in rows], use, len(rows)) for name in names}
    return split(groups, each([row["score"] for row in rows], use, len(rows)), parts)


FORMATS = {
    "solution_str": Format(
        "verl", ("solution_str",), ("data_source", "ground_truth", "extra_info"), _verl, ("extra_info",)
    ),
    "queries": Format("OpenRLHF", ("queries", "prompts", "labels"), (), _openrlhf),
    "completions": Format("TRL", _TRL, None, _trl),
    "completion_ids": Format("TRL", _TRL, None, _trl),
}
"""Formats by the required parameter that distinguishes them; the first match counts."""


def _signature(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # a built-in function
        return {}


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind in (
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.KEYWORD_ONLY,
    )
