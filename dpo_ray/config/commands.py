"""What each command that trains cannot do without, and what it would ignore without a word."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic_core import PydanticUndefined

from dpo_ray.config.schema import Config, Section


class Command(NamedTuple):
    """The keys that a command treats unlike others."""

    needs: Mapping[str, str]
    """Keys that must be given, and what to do where one is not."""
    ignores: Mapping[str, str]
    """Keys that must be left as they are, and why they would mean nothing."""


_PAIRS = {"data.train": "give files of preference pairs, or a hub dataset"}
_NO_ROUNDS = {"online": "this command trains on a fixed preference set; dpo-ray online runs rounds"}
_ROUNDS_INSTEAD = "an online run trains on what its engines write, for online.rounds"

OFFLINE = Command(needs=_PAIRS, ignores=_NO_ROUNDS)
SWEEP = Command(needs=_PAIRS | {"data.eval": "a sweep compares trials on held-out pairs"}, ignores=_NO_ROUNDS)
ONLINE = Command(
    needs={"online": "this command needs an online section (prompts, rounds, judge, ...)"},
    ignores={
        "data.train": _ROUNDS_INSTEAD,
        "data.eval": "an online run is evaluated on online.eval_prompts",
        "run.steps": _ROUNDS_INSTEAD,
        "run.epochs": f"{_ROUNDS_INSTEAD}, each online.epochs_per_round times",
    },
)


def validate_command(config: Config, command: Command) -> None:
    """Raise a ValueError for the first key that the command needs and has not, or has and would ignore."""
    for key, advice in command.needs.items():
        if not _value(config, key):
            raise ValueError(f"{key} is empty: {advice}")
    for key, why in command.ignores.items():
        found = _value(config, key)
        if found != _default(config, key):
            what = "a section" if isinstance(found, Section) else repr(found)
            raise ValueError(f"{key}: found {what}, which would be ignored: {why}; leave {key} out")


def _value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _default(config: Config, key: str) -> Any:
    section, _, name = key.rpartition(".")
    holder = _value(config, section) if section else config
    default = type(holder).model_fields[name].default
    assert default is not PydanticUndefined, key
    return default
