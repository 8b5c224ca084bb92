"""The keys that each training command requires, and the keys that it would silently ignore."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

from dpo_ray.config.section import Section
from dpo_ray.config.tree import Config


class Command(NamedTuple):
    """Key requirements of a command."""

    required: Mapping[str, str]
    """Keys that must not be empty, each with advice for the error message."""
    ignored: Mapping[str, str]
    """Keys that must keep their default, each with the reason."""


_PAIRS = {"data.train": "give files of preference pairs, or a hub dataset"}
_NO_ROUNDS = {"online": "this command trains on a fixed preference set; dpo-ray online runs rounds"}
_ROUNDS_INSTEAD = "an online run trains on pairs from its engines, for online.rounds"

OFFLINE = Command(required=_PAIRS, ignored=_NO_ROUNDS)
OFFLINE_SWEEP = Command(
    required=_PAIRS | {"data.eval": "a sweep compares trials on held-out pairs"}, ignored=_NO_ROUNDS
)
INSPECT = Command(required={}, ignored={})
ONLINE = Command(
    required={"online": "this command needs an online section (prompts, rounds, judge, ...)"},
    ignored={
        "data.eval": "an online run is evaluated on online.eval_prompts",
        "run.steps": _ROUNDS_INSTEAD,
        "run.epochs": f"{_ROUNDS_INSTEAD}, each online.epochs_per_round times",
    },
)
ONLINE_SWEEP = Command(
    required={**ONLINE.required, "online.eval_prompts": "a sweep compares trials on held-out prompts"},
    ignored=ONLINE.ignored,
)


def sweep_command(config: Config) -> Command:
    """The keys that a sweep requires: those of its trials, and held-out data to compare them by."""
    return ONLINE_SWEEP if config.online is not None else OFFLINE_SWEEP


def validate_command(config: Config, command: Command | Callable[[Config], Command]) -> None:
    """Raise a ValueError for the first required key that is empty or ignored key that is set."""
    command = command if isinstance(command, Command) else command(config)
    for key, advice in command.required.items():
        if not _value(config, key):
            raise ValueError(f"{key} is empty: {advice}")
    if (
        config.online is not None
        and config.data.train
        and not config.online.source.mix
        and "online" in command.required
    ):
        raise ValueError(
            f"data.train: found {list(config.data.train)}, which would be ignored: {_ROUNDS_INSTEAD}; set "
            "online.source.mix to the fraction of a round that data.train gives, or leave data.train out"
        )
    for key, reason in command.ignored.items():
        value = _value(config, key)
        section, _, name = key.rpartition(".")
        parent = _value(config, section) if section else config
        if value != type(parent).model_fields[name].default:
            found = "a section" if isinstance(value, Section) else repr(value)
            raise ValueError(f"{key}: found {found}, which would be ignored: {reason}; leave {key} out")


def _value(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
