"""Judges that check completions against a column of the prompt's record: 1 for a correct completion, else 0.

A record without the column has no score (NaN).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from dpo_ray.rollout.judges.columns import Column
from dpo_ray.rollout.judges.math_client import MathClient
from dpo_ray.types import CompletionGroup, is_finite


class Verifier:
    """Scores each completion against the value of its record's column.

    Args:
        use: name of the judge, for messages.
        column: name of the column, see ``Column``; None for a check that needs none.
    """

    def __init__(self, use: str, column: str | None) -> None:
        self._column = None if column is None else Column(column, use)

    @classmethod
    def validate_arguments(cls, **args: Any) -> None:
        cls(**args)

    @classmethod
    def required_columns(cls, **args: Any) -> list[Column]:
        """The columns that the judge needs: one, or none."""
        column = cls(**args)._column
        return [] if column is None else [column]

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        prompts = [group.prompt for group in groups]
        values = [True] * len(groups) if self._column is None else self._column.lookup(prompts)
        return [
            [math.nan if value in (None, []) else self.score(c.text, value) for c in group.completions]
            for group, value in zip(groups, values, strict=True)
        ]

    def score(self, text: str, value: Any) -> float:
        """Score of one completion; ``value`` is not None."""
        raise NotImplementedError


class Exact(Verifier):
    """1 for a completion that equals the column, or one of its values if it is a list.

    Args:
        column: the answer.
        pattern: regular expression that finds the final answer in the completion: its last match, or the first group
            of that; a completion without a match scores 0. None compares the whole completion.
        ignore_case: ignore the difference of upper and lower case.
        strip: ignore white space at both ends.

    Raises:
        ValueError: ``pattern`` is not a regular expression.
    """

    def __init__(
        self, column: str = "answer", *, pattern: str | None = None, ignore_case: bool = False, strip: bool = True
    ) -> None:
        super().__init__("exact", column)
        self._pattern = None if pattern is None else _compiled("exact", pattern)
        self._ignore_case, self._strip = ignore_case, strip

    def score(self, text: str, value: Any) -> float:
        answer = text if self._pattern is None else _last_match(self._pattern, text)
        return float(answer is not None and self._plain(answer) in map(self._plain, _texts(value)))

    def _plain(self, text: str) -> str:
        text = text.strip() if self._strip else text
        return text.casefold() if self._ignore_case else text


class Regex(Verifier):
    """1 for a completion whose match of a regular expression equals the column; without a column, for any match.

    Args:
        pattern: regular expression; the answer is its last match, or the first group of that.
        column: the answer, one or a list; None checks for a match only, as a reward for format does.
        ignore_case: ignore the difference of upper and lower case, in the match and in the comparison.

    Raises:
        ValueError: ``pattern`` is not a regular expression.
    """

    def __init__(self, pattern: str, column: str | None = "answer", *, ignore_case: bool = False) -> None:
        super().__init__("regex", column)
        self._pattern = _compiled("regex", pattern, re.IGNORECASE if ignore_case else 0)
        self._compare = None if column is None else Exact(column, ignore_case=ignore_case)

    def score(self, text: str, value: Any) -> float:
        answer = _last_match(self._pattern, text)
        if answer is None or self._compare is None:
            return float(answer is not None)
        return self._compare.score(answer, value)


class JsonSchema(Verifier):
    """1 for a completion that is JSON and satisfies a JSON schema; a Markdown code fence around it is ignored.

    Args:
        schema: the schema of all completions; None takes that of the column.
        column: the schema, as an object or as JSON text.

    Raises:
        ValueError: both arguments are given, or a schema is not valid.
    """

    def __init__(self, schema: Mapping[str, Any] | None = None, column: str | None = None) -> None:
        if schema is not None and column is not None:
            raise ValueError("judge 'json_schema': args have schema and column; accepted is one of them")
        super().__init__("json_schema", (column or "schema") if schema is None else None)
        self._validator = None if schema is None else _validator(schema)

    def score(self, text: str, value: Any) -> float:
        try:
            document = json.loads(_without_fence(text), parse_constant=_not_json)
        except (ValueError, RecursionError):
            return 0.0
        return float((self._validator or _validator(value)).is_valid(document))


class Math(Verifier):
    """1 for a completion whose final expression equals that of the column, as math-verify compares them.

    LaTeX and plain numbers are read; a boxed expression counts before others. Each comparison runs in a process of its
    own, since some expressions take for ever or all memory: such a completion has no score (NaN). Neither has one
    whose record's answer is no expression.

    Args:
        column: the answer.
        timeout_s: longest processor time of one comparison.

    Raises:
        ValueError: the package math-verify is not installed, or ``timeout_s`` is not positive.
    """

    def __init__(self, column: str = "answer", *, timeout_s: float = 5.0) -> None:
        if not (is_finite(timeout_s) and timeout_s > 0):
            raise ValueError(f"judge 'math': timeout_s is {timeout_s!r}; it must be a number of seconds above 0")
        if find_spec("math_verify") is None:
            raise ValueError(
                "judge 'math' needs the package math-verify, which is not installed; "
                "install the extra math (pip install 'dpo-ray[math]')"
            )
        super().__init__("math", column)
        self._client = MathClient(timeout_s)

    def score(self, text: str, value: Any) -> float:
        scores = [self._client.compare(answer, text) for answer in _texts(value)]
        return 1.0 if 1.0 in scores else sum(scores)  # NaN if one of them is


def _compiled(use: str, pattern: Any, flags: int = 0) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except (re.error, TypeError) as error:
        raise ValueError(f"judge {use!r}: pattern {pattern!r} is not a regular expression: {error}") from None


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    return matches[-1][1] or "" if pattern.groups else matches[-1][0]


def _texts(value: Any) -> list[str]:
    """The accepted answers as text; whole numbers without a decimal point, as Parquet may have made them floats."""
    values = value if isinstance(value, list | tuple) else [value]
    return [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values]


def _validator(schema: Any) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        validator = validator_for(schema)
        validator.check_schema(schema)
    except (json.JSONDecodeError, SchemaError) as error:
        reason = getattr(error, "message", None) or error
        raise ValueError(f"judge 'json_schema': {schema!r} is not a JSON schema: {reason}") from None
    return validator(schema)


def _without_fence(text: str) -> str:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", text, re.DOTALL)
    return fenced[1] if fenced else text


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
