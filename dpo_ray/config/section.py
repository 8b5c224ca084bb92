"""Base, component and shared value types of the sections of the configuration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from dpo_ray.plugins import validate_name
from dpo_ray.storage import folder_at


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def as_tuple(value: Any) -> Any:
    """A single text or mapping as a tuple of one."""
    return (value,) if isinstance(value, str | dict) else value


def folder_of(location: str, key: str) -> Path:
    """The folder at a path or URI; a ValueError names ``key``."""
    try:
        return folder_at(location)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


Paths = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
"""One path or a list of paths."""


def one_of(kind: str, names: tuple[str, ...]) -> Any:
    """Accepts built-in names of a kind of component, and import paths."""

    def validate(use: str | tuple[str, ...]) -> str | tuple[str, ...]:
        try:
            for name in (use,) if isinstance(use, str) else use:
                validate_name(name, names, kind)
        except ValueError as error:
            raise PydanticCustomError("unknown_component", "{problem}", {"problem": str(error)}) from None
        return use

    return AfterValidator(validate)


class Component(Section):
    """A replaceable component."""

    use: str
    """Built-in name, or import path package.module:attribute."""
    args: dict[str, Any] = Field({})
    """Keyword arguments of the component."""


def explain(error: Any, unknown: Callable[[str], str], prefix: str = "") -> str:
    """A sentence with the key, the value found and the values accepted.

    Args:
        error: one of ``ValidationError.errors``.
        unknown: the sentence about a key that does not exist.
        prefix: of all keys.
    """
    key = prefix + ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: {unknown(key)}"
        case "missing":
            return f"{key}: is required and has no default"
        case "model_type" | "dict_type":
            return f"{key}: found {_shown(error['input'])}; it must be a mapping of keys to values"
        case "tuple_type" | "list_type":
            none = "; [] is none" if error["input"] is None else ""
            return f"{key}: found {_shown(error['input'])}; it must be a list, such as [a, b]{none}"
        case "unknown_component":
            return f"{key}: {error['msg']}"
        case "value_error":
            return f"{prefix}{error['ctx']['error']}"  # validators of several keys name them in their message
        case _:
            accepted = (error["msg"][0].lower() + error["msg"][1:]).replace("None", "null")
            return f"{key}: found {_shown(error['input'])}; {accepted}"


def _shown(value: Any) -> str:
    """A value as YAML writes it where Python differs."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
