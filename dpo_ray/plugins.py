"""Replaceable components: a built-in name or an import path, and keyword arguments.

Used for losses, optimizers, judges, selectors and weight transports. A wrong name or argument raises an error that
lists the accepted ones, before a model is loaded.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any


def resolve(use: str, registry: Mapping[str, Any], kind: str) -> Any:
    """The object named by a component's ``use``.

    Args:
        use: a key of ``registry``, or ``package.module:attribute``. An import path runs that module's code.
        registry: the built-in names of this kind of component.
        kind: for messages: ``judge``, ``loss``, ...

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
    """Raise a ValueError if ``use`` is neither one of ``names`` nor an import path."""
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
    """Reject keyword arguments that ``function`` does not accept.

    Raises:
        ValueError: an argument is not accepted, or ``function`` is not callable.
    """
    if not callable(function):
        raise ValueError(f"{kind} {use!r} is a {type(function).__name__}; it must be a function or a class")
    signature = inspect.signature(function)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        return
    unknown = [name for name in args if name not in signature.parameters]
    if unknown:
        raise ValueError(f"{kind} {use!r} takes no argument {unknown[0]!r}; its signature is {use}{signature}")


def bind(
    use: str, args: Mapping[str, Any], registry: Mapping[str, Any], kind: str, **runtime: Any
) -> Callable[..., Any]:
    """The function named by ``use``, with ``args`` bound: for losses, optimizers and selectors.

    Args:
        runtime: arguments that dpo_ray supplies; bound only if the signature accepts them.

    Raises:
        ValueError: the name is unknown, an argument is not accepted, or a keyword-only argument is missing.
    """
    function, arguments, signature = _resolve_arguments(use, args, registry, kind, runtime)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and name not in arguments:
            raise ValueError(f"{kind} {use!r} needs the argument {name!r}; its signature is {use}{signature}")
    return partial(function, **arguments)


def bind_factory(
    use: str, args: Mapping[str, Any], registry: Mapping[str, Any], kind: str, **runtime: Any
) -> partial[Any]:
    """The factory named by ``use``, with all its arguments bound and not called: for components of another process.

    Arguments and errors are those of ``bind``; a missing positional argument is an error too.
    """
    factory, arguments, signature = _resolve_arguments(use, args, registry, kind, runtime)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{kind} {use!r}: {error}; its signature is {use}{signature}") from None
    return partial(factory, **arguments)


def build(use: str, args: Mapping[str, Any], registry: Mapping[str, Any], kind: str, **runtime: Any) -> Any:
    """Build the component, ``bind_factory(...)()``: for transports and trackers."""
    return bind_factory(use, args, registry, kind, **runtime)()


def _resolve_arguments(
    use: str, args: Mapping[str, Any], registry: Mapping[str, Any], kind: str, runtime: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any], inspect.Signature]:
    function = resolve(use, registry, kind)
    check_arguments(function, args, use, kind)
    signature = inspect.signature(function)
    accepted = {name: value for name, value in runtime.items() if name in signature.parameters}
    return function, accepted | dict(args), signature
