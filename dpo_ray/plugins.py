"""Replaceable parts: a built-in name or an import path, and keyword arguments.

Losses, judges, selectors and weight transports are all found and built here. A wrong name or argument is an error
that lists what is accepted, raised when the run is described and before anything is loaded.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any


def resolve(use: str, registry: Mapping[str, Any], kind: str) -> Any:
    """The object that a component's ``use`` names.

    Args:
        use: a key of ``registry``, or ``package.module:attribute``. An import path runs that module's code.
        registry: the built-in names of this kind of component.
        kind: what is looked for, for messages: ``judge``, ``loss``, ...

    Raises:
        ValueError: the name is unknown, or the module or attribute cannot be imported.
    """
    if use in registry:
        return registry[use]
    validate_name(use, registry, kind)
    module_name, _, attribute = use.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{kind} {use!r}: module {module_name!r} cannot be imported: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ValueError(f"{kind} {use!r}: module {module_name!r} has no attribute {attribute!r}") from None


def validate_name(use: str, names: Iterable[str], kind: str) -> None:
    """Raise a ValueError when ``use`` is neither one of ``names`` nor an import path."""
    names = sorted(names)
    if use in names or ":" in use:
        return
    close = get_close_matches(use, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(
        f"no {kind} is called {use!r}{hint} Built in: {', '.join(names)}; "
        "or give an import path, package.module:attribute"
    )


def check_arguments(function: Callable[..., Any], args: Mapping[str, Any], use: str, kind: str) -> None:
    """Refuse keyword arguments that ``function`` does not take.

    Raises:
        ValueError: names the argument and prints the signature; or ``function`` cannot be called at all.
    """
    if not callable(function):
        raise ValueError(f"{kind} {use!r} is a {type(function).__name__}; it must be a function or a class")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        return
    unknown = [name for name in args if name not in signature.parameters]
    if unknown:
        raise ValueError(f"{kind} {use!r} takes no argument {unknown[0]!r}; its signature is {use}{signature}")


def bind(
    use: str, args: Mapping[str, Any], registry: Mapping[str, Any], kind: str, **runtime: Any
) -> Callable[..., Any]:
    """The function that ``use`` names, with ``args`` bound: for losses and selectors.

    Args:
        runtime: arguments the system supplies; bound only where the signature takes them.

    Raises:
        ValueError: the name is unknown, an argument is not taken, or one that only ``args`` can give is missing.
    """
    function = resolve(use, registry, kind)
    check_arguments(function, args, use, kind)
    signature = inspect.signature(function)
    arguments = {name: value for name, value in runtime.items() if name in signature.parameters} | dict(args)
    for parameter in signature.parameters.values():
        if (
            parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
            and parameter.name not in arguments
        ):
            raise ValueError(f"{kind} {use!r} needs the argument {parameter.name!r}; its signature is {use}{signature}")
    return partial(function, **arguments)


def build(use: str, args: Mapping[str, Any], registry: Mapping[str, Any], kind: str, **runtime: Any) -> Any:
    """Call what ``use`` names with ``args`` and return the result: for judges and transports.

    Args:
        runtime: arguments the system supplies; passed only where the signature takes them.

    Raises:
        ValueError: the name is unknown, or an argument is not taken or is missing.
    """
    factory = resolve(use, registry, kind)
    check_arguments(factory, args, use, kind)
    signature = inspect.signature(factory)
    arguments = {name: value for name, value in runtime.items() if name in signature.parameters} | dict(args)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{kind} {use!r}: {error}; its signature is {use}{signature}") from None
    return factory(**arguments)
