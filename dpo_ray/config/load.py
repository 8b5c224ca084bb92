"""Loading the configuration: YAML, dotted overrides, and errors that name the key.

Three layers, in ascending order of precedence: the defaults of the schema, the YAML file, ``key=value`` arguments.
Values on the command line are parsed as YAML, for example ``optim.lr=1e-6``, ``data.eval=[a.jsonl,b.jsonl]`` and
``loss.args={label_smoothing: 0.1}``.
"""

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from dpo_ray.config.commands import Command, validate_command
from dpo_ray.config.paths import validate_paths
from dpo_ray.config.schema import TRACKERS, Section
from dpo_ray.config.tree import Config
from dpo_ray.storage import StorageFailed, folder_at, storage_errors


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
    path.write_text(text, encoding="utf-8")


def validate_extras(config: Config) -> None:
    """Raise a ValueError for a setting whose optional package is not installed."""
    lora = config.model.lora
    if lora is not None and lora.quantize is not None and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model.lora.quantize: {lora.quantize} needs bitsandbytes, which is not installed: "
            "pip install 'dpo-ray[qlora]'"
        )
    low_bit = "optim.use: adamw_8bit" if config.optim.use == "adamw_8bit" else "model.fp8" if config.model.fp8 else None
    if low_bit is not None and find_spec("torchao") is None:
        raise ValueError(f"{low_bit} needs torchao, which is not installed: pip install 'dpo-ray[low_bit]'")
    for name in config.run.trackers:
        # A folder of this name, such as ./wandb, can be imported too but has no origin.
        if name in TRACKERS and ((spec := find_spec(name)) is None or spec.origin is None):
            raise ValueError(f"run.trackers: {name} is not installed: pip install 'dpo-ray[{name}]'")


def config_from_argv(usage: str, command: Command, argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line: ``CONFIG.yaml [key=value ...]``.

    ``--help`` prints every key. An invalid configuration or a missing file exits with code 2 and a message.

    Args:
        usage: description of the command, printed above the keys.
        command: required and ignored keys.
        argv: arguments; None for ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or any(a in ("-h", "--help") for a in arguments):
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
    for key, kind, default, meaning in _leaves(Config, ""):
        lines.append(f"{key}: {kind}{default}")
        lines.append("    " + " ".join(meaning.split()))
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
        problems = [f"{'override' if _is_overridden(overrides, e) else source}: {_explain(e)}" for e in error.errors()]
        raise ConfigError("\n       ".join(problems)) from None


def _is_overridden(overrides: Collection[str], error: Any) -> bool:
    """True if an override set the invalid key."""
    invalid = ".".join(map(str, error["loc"]))
    unknown = error["type"] == "extra_forbidden"  # an unknown section is reported for overrides of keys below it
    return any(f"{invalid}.".startswith(f"{key}.") or (unknown and key.startswith(f"{invalid}.")) for key in overrides)


def _explain(error: Any) -> str:
    dotted = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"{dotted}: no such key{_suggestion(dotted)}"
        case "missing":
            return f"{dotted}: is required and has no default"
        case "model_type" | "dict_type":
            return f"{dotted}: found {error['input']!r}; it must be a mapping of keys to values"
        case "unknown_component":
            return f"{dotted}: {error['msg']}"
        case "value_error":
            return str(error["ctx"]["error"])  # validators of several keys name them in their message
        case _:
            accepted = (error["msg"][0].lower() + error["msg"][1:]).replace("None", "null")
            return f"{dotted}: found {error['input']!r}; {accepted}"


def _suggestion(dotted: str) -> str:
    keys = [key for key, *_ in _leaves(Config, "")]
    keys += sorted({key.rpartition(".")[0] for key in keys if "." in key})
    keys = [key for key in keys if not dotted.startswith(f"{key}.")]
    section, _, leaf = dotted.rpartition(".")
    close = get_close_matches(dotted, keys, n=1, cutoff=0.7)
    close += [key for key in keys if key.rpartition(".")[2] == leaf]
    if close:
        return f"; did you mean {close[0]}?"
    siblings = [key.rpartition(".")[2] for key in keys if section and key.rpartition(".")[0] == section]
    return f"; {section} has the keys {', '.join(siblings)}" if siblings else "; --help lists every key"


def _leaves(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        subsection = _section_of(field.annotation)
        if subsection is not None:
            yield from _leaves(subsection, f"{prefix}{name}.")
            continue
        default = " (required)" if field.is_required() else f" = {_format(field.default)}"
        yield f"{prefix}{name}", _type_name(field.annotation, field.metadata), default, field.description or ""


def _section_of(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in (None, NoneType):
        name = "null"
    elif origin is Literal:
        name = " | ".join(str(a) for a in args)
    elif origin in (Union, UnionType):
        name = " | ".join(_type_name(a, a.__metadata__ if hasattr(a, "__metadata__") else ()) for a in args)
    elif origin is tuple:
        name = "list of " + _type_name(args[0])
    elif origin is dict:
        name = "mapping"
    else:
        name = getattr(annotation, "__name__", str(annotation))
    bounds = [
        f"{sign} {bound:g}"
        for item in metadata
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if (bound := getattr(item, attribute, None)) is not None
    ]
    return f"{name} ({', '.join(bounds)})" if bounds else name


def _format(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)
