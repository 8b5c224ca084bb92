"""Validation of the arguments and keys of judges."""

import os
import re
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from dpo_ray.config.section import Section, explain

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
        problems = [explain(problem, partial(_unknown, model), "online.judge.args.") for problem in error.errors()]
    raise ValueError(f"judge {judge!r}: {'; '.join(problems)}")


def _unknown(model: type[Section], name: str) -> str:
    if "key" in name.lower() and "api_key_env" in model.model_fields:
        return "keys are not read from the configuration; api_key_env names an environment variable"
    return f"no such argument; accepted are {', '.join(model.model_fields)}"


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
