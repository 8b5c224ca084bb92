"""Loading the configuration: YAML, dotted overrides, and errors that name the key.

Three layers, in ascending order of precedence: the defaults of the schema, the YAML file, ``key=value`` arguments.
Values on the command line are parsed as YAML, for example ``optim.lr=1e-6``, ``data.eval=[a.jsonl,b.jsonl]`` and
``loss.args={label_smoothing: 0.1}``.
"""

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dpo_ray.config.commands import Command, validate_command
from dpo_ray.config.paths import validate_paths
from dpo_ray.config.schema import TRACKERS
from dpo_ray.config.section import explain
from dpo_ray.config.tree import Config
from dpo_ray.storage import StorageFailed, folder_at, storage_errors, write_atomically

_TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "object": "mapping", "null": "null"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


class ConfigError(ValueError):
    """Invalid configuration; the message names each key, the value found and the values accepted."""


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration in a YAML file, with dotted overrides applied.

    Raises:
        ConfigError: the file is missing or not valid YAML, or a key or value is not accepted.
    """
    path = folder_at(path) if isinstance(path, str) else path
    try:
        with storage_errors(path):
            text = path.read_text(encoding="utf-8")
    except StorageFailed as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        tree = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__}; a configuration is a mapping of sections")
    return _validate(_merge(tree, overrides or {}), source=str(path), overrides=overrides or {})


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """``config`` with dotted overrides applied, validated again in full."""
    return _validate(_merge(config.model_dump(mode="json"), overrides), source="override")


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse ``["optim.lr=1e-6"]`` to a mapping of dotted keys to values.

    Raises:
        ConfigError: an argument has no ``=``, or its value is not YAML.
    """
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not an override; write key=value, for example optim.lr=1e-6")
        try:
            overrides[key] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {text!r} is not valid YAML: {error}") from None
    return overrides


def write_config(config: Config, path: Path) -> None:
    """Save the resolved configuration as YAML; ``load_config`` returns an equal one."""
    text = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_atomically(path, text)


def validate_extras(config: Config) -> None:
    """Raise a ValueError for a setting whose optional package is not installed."""
    quantize = config.model.lora.quantize if config.model.lora else None
    for setting, is_set, package, extra in (
        (f"model.lora.quantize: {quantize}", quantize is not None, "bitsandbytes", "qlora"),
        ("optim.use: adamw_8bit", config.optim.use == "adamw_8bit", "torchao", "low_bit"),
        ("model.fp8", config.model.fp8, "torchao", "low_bit"),
        ("sweep.search.use: optuna", config.sweep.search.use == "optuna", "optuna", "optuna"),
    ):
        if is_set and find_spec(package) is None:
            raise ValueError(f"{setting} needs {package}, which is not installed: pip install 'dpo-ray[{extra}]'")
    for name in config.run.trackers:
        # A folder of this name, such as ./wandb, can be imported too but has no origin.
        if name in TRACKERS and ((spec := find_spec(name)) is None or spec.origin is None):
            raise ValueError(f"run.trackers: {name} is not installed: pip install 'dpo-ray[{name}]'")


def config_from_argv(usage: str, command: Command | Callable[[Config], Command], arguments: Sequence[str]) -> Config:
    """The configuration of a command line: ``CONFIG.yaml [key=value ...]``.

    ``--help`` prints ``usage`` and every key. An invalid configuration or a missing file exits with code 2 and a
    message.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{usage.strip()}\n\nKeys (key: type = default):\n\n{help_text()}")
        raise SystemExit(0 if arguments else 2)
    try:
        config = load_config(arguments[0], parse_overrides(arguments[1:]))
        validate_extras(config)
        validate_command(config, command)
        validate_paths(config)
        return config
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def help_text() -> str:
    """All dotted keys with type, default and meaning."""
    lines = []
    for key, field in config_fields().items():
        default = field.get("default")
        value = (
            f"= {default if isinstance(default, str) else json.dumps(default)}" if "default" in field else "(required)"
        )
        lines.append(f"{key}: {_type_name(field)} {value}")
        lines.append("    " + " ".join(field.get("description", "").split()))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Parses 1e-6 as a number. YAML 1.1 requires 1.0e-6, and component arguments have no schema to convert a string."""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that ``_Loader`` would parse as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


# ---------------------------------------------------------------------------------------------- merging and messages


def _merge(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = _copy(tree)
    for dotted, value in overrides.items():
        node = merged
        *parents, leaf = dotted.split(".")
        for depth, part in enumerate(parents):
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                parent = ".".join(parents[: depth + 1])
                raise ConfigError(f"{dotted}: {parent} is {child!r} and has no keys{_suggestion(dotted)}")
            node = child
        node[leaf] = _copy(value)
    return merged


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _validate(tree: Mapping[str, Any], *, source: str, overrides: Collection[str] = ()) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [
            f"{'override' if _is_overridden(overrides, e) else source}: "
            + explain(e, lambda key: f"no such key{_suggestion(key)}")
            for e in error.errors()
        ]
        raise ConfigError("\n       ".join(problems)) from None


def _is_overridden(overrides: Collection[str], error: Any) -> bool:
    """True if an override set the invalid key."""
    invalid = ".".join(map(str, error["loc"]))
    unknown = error["type"] == "extra_forbidden"  # an unknown section is reported for overrides of keys below it
    return any(f"{invalid}.".startswith(f"{key}.") or (unknown and key.startswith(f"{invalid}.")) for key in overrides)


def _suggestion(dotted: str) -> str:
    keys = list(config_fields())
    keys += sorted({key.rpartition(".")[0] for key in keys if "." in key})
    keys = [key for key in keys if not dotted.startswith(f"{key}.")]
    section, _, leaf = dotted.rpartition(".")
    close = get_close_matches(dotted, keys, n=1, cutoff=0.7)
    close += [key for key in keys if key.rpartition(".")[2] == leaf]
    if close:
        return f"; did you mean {close[0]}?"
    siblings = [key.rpartition(".")[2] for key in keys if section and key.rpartition(".")[0] == section]
    return f"; {section} has the keys {', '.join(siblings)}" if siblings else "; --help lists every key"


def config_fields() -> dict[str, dict[str, Any]]:
    """JSON schema of each dotted key."""
    schema = Config.model_json_schema()

    def walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, field in section["properties"].items():
            references = [option["$ref"] for option in (field, *field.get("anyOf", ())) if "$ref" in option]
            if references:
                yield from walk(schema["$defs"][references[0].rpartition("/")[2]], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field

    return dict(walk(schema, ""))


def _type_name(field: Mapping[str, Any]) -> str:
    """The type of a JSON schema in Python's words, with its bounds."""
    if "anyOf" in field:
        return " | ".join(map(_type_name, field["anyOf"]))
    if "enum" in field or "const" in field:
        return " | ".join(field.get("enum") or [field["const"]])
    if field["type"] == "array":
        return "list of " + _type_name(field.get("items") or field["prefixItems"][0])
    bounds = ", ".join(f"{sign} {field[bound]:g}" for bound, sign in _BOUNDS.items() if bound in field)
    return _TYPES[field["type"]] + (f" ({bounds})" if bounds else "")
