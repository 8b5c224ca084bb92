"""Validation of the arguments and keys of judges."""

import os
import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from dpo_ray.config.section import Section

Args = TypeVar("Args", bound=Section)


class StrictArgs(Section):
    """Arguments without conversions, so that true is no number."""

    model_config = ConfigDict(strict=True)


def _variable(name: Any) -> str:
    if not (isinstance(name, str) and re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name)):
        # Not shown: it may be the key itself.
        raise ValueError("api_key_env: must be the name of an environment variable, not the key itself")
    return name


def _text(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty", "it must be a text that is not empty")
    return value


EnvironmentVariable = Annotated[str, BeforeValidator(_variable)]
"""Name of the environment variable with the key of a judge, its argument api_key_env."""
Text = Annotated[str, AfterValidator(_text)]
"""A text that is not empty."""


def parse_args(judge: str, model: type[Args], args: dict[str, Any]) -> Args:
    """The checked arguments of a judge.

    Raises:
        ValueError: an argument is unknown, missing or not accepted; values of unknown ones, which may be secrets, are
            not in the message.
    """
    try:
        return model(**args)
    except ValidationError as error:
        problems = [_explain(problem, model) for problem in error.errors()]
    raise ValueError(f"judge {judge!r}: " + "; ".join(f"online.judge.args.{problem}" for problem in problems))


def _explain(problem: Any, model: type[Section]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden" if "key" in name.lower():
            return f"{name}: keys are not read from the configuration; api_key_env names an environment variable"
        case "extra_forbidden":
            return f"{name}: no such argument; accepted are {', '.join(model.model_fields)}"
        case "missing":
            return f"{name}: is required"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            accepted = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{name}: found {problem['input']!r}; {accepted.replace('None', 'null')}"


def key_of(judge: str, variable: str) -> str:
    """The key in an environment variable of the judge's process; empty if it is not set.

    Raises:
        ValueError: no header can have the key.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"judge {judge!r}: the environment variable {variable} holds characters that no header can have "
            "(online.judge.args.api_key_env)"
        )
    return key
