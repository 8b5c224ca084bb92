"""Search spaces: their values, their description, and their check against the configuration."""

import hashlib
import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist
from types import CodeType
from typing import Any, cast

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, LogUniform, Normal, Quantized
from ray.tune.search.variant_generator import generate_variants

from dpo_ray.config import Config, override
from dpo_ray.sweep.trials import Key

Space = Mapping[str, Any]
"""Dotted configuration keys to ray.tune domains, grid_search, or constants."""
PREVIEWS = 64
"""Trials that are checked before a sweep starts, beside every value of each choice and grid."""

RENAMED = {"_eta": "reduction_factor", "_max_t_attr": "max_t"}
"""Attributes of Ray Tune's schedulers that keep an argument of the constructor under another name."""
OF_THE_SWEEP = ("cluster.", "sweep.", "run.dir", "run.name", "run.eval_", "run.save_")
"""Prefixes of keys that trials cannot differ in: they share workers, and are compared at the same steps."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, as conditional spaces give them, as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value and not is_grid(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = plain(value)
    return flat


def plain(value: Any) -> Any:
    """A value without types of NumPy."""
    return value.item() if isinstance(value, np.generic) else value


def is_grid(domain: Any) -> bool:
    """True for ``tune.grid_search(...)``."""
    return isinstance(domain, dict) and set(domain) == {"grid_search"}


def choices(domain: Any) -> Sequence[Any]:
    """The values of a choice or a grid; none for other domains."""
    if is_grid(domain):
        return domain["grid_search"]
    return domain.categories if isinstance(domain, Categorical) else ()


def variants(space: Space, state: np.random.RandomState) -> Iterator[dict[str, Any]]:
    """Endless values of trials: a random sample for each combination of grid values, over and over."""
    for _ in itertools.repeat(None):
        for _, values in generate_variants({**space}, random_state=cast("Any", state)):
            yield flatten(values)


def describe(space: Space) -> dict[str, Key]:
    """The domains, as far as they can be described without Ray."""
    return {name: _describe(domain) for name, domain in flatten(space).items()}


def _describe(domain: Any) -> Key:
    if is_grid(domain):
        return Key("grid", values=tuple(map(_nameable, domain["grid_search"])))
    if not isinstance(domain, Domain):
        return Key("constant", values=(domain,))
    if isinstance(domain, Categorical):
        return Key("choice", values=tuple(map(_nameable, domain.categories)))
    if isinstance(domain, Function):
        return Key("function", function=_digest(domain.func))
    inner, step = _unquantized(domain)
    if isinstance(inner, Normal):
        return Key("normal", step=step, mean=float(inner.mean), sd=float(inner.sd))
    kind, numeric = ("log" if isinstance(inner, LogUniform) else "linear"), cast("Float | Integer", domain)
    integer = isinstance(domain, Integer)
    upper = numeric.upper - 1 if integer and step is None else numeric.upper
    return Key(kind, float(numeric.lower), float(upper), integer=integer, step=step)


def _nameable(value: Any) -> Any:
    """A value of a choice; the domains inside a conditional one as text."""
    if isinstance(value, Domain):
        return str(_describe(value))
    return {key: _nameable(part) for key, part in value.items()} if isinstance(value, Mapping) else plain(value)


def _digest(function: Callable[..., Any]) -> str:
    """A name of the function that is the same in every process, and another one if its code or a default changes."""
    if isinstance(code := getattr(function, "__code__", None), CodeType):
        source = (_stable(code), defaults) if (defaults := _plain_defaults(function)) else _stable(code)
        return hashlib.sha256(repr(source).encode()).hexdigest()[:12]
    return getattr(function, "__qualname__", type(function).__qualname__)


def _plain_defaults(function: Any) -> list[Any]:
    """Default arguments whose text is the same in every process."""
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [value for value in defaults if isinstance(value, bool | int | float | str)]


def _stable(constant: Any) -> Any:
    """A constant of code without names of files, lines and addresses."""
    if isinstance(constant, CodeType):
        return constant.co_code, constant.co_names, constant.co_varnames, _stable(constant.co_consts)
    if isinstance(constant, tuple):
        return tuple(map(_stable, constant))
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant


def describe_part(part: Any) -> dict[str, Any]:
    """A scheduler or searcher that a space brings: ``use`` is its class, ``args`` those of its arguments that it shows.

    They are the numbers, strings, booleans and further searchers that the constructor takes and keeps as attributes.
    """
    parameters = {name for base in type(part).__mro__ for name in _parameters(base)} - {"metric", "mode"}
    kept = {RENAMED.get(name, name.lstrip("_")): _setting(value) for name, value in vars(part).items()}
    args = {name: kept[name] for name in sorted(parameters & kept.keys()) if kept[name] is not None}
    if isinstance(part, AsyncHyperBandScheduler):
        args["rungs"] = [[rung for rung, _ in bracket._rungs] for bracket in part._brackets]
    return {"use": type(part).__name__, "args": args}


def _parameters(base: type) -> list[str]:
    """Parameters of the constructor that a class defines itself."""
    return list(inspect.signature(base.__init__).parameters) if inspect.isfunction(vars(base).get("__init__")) else []


def _setting(value: Any) -> Any:
    """An argument that is the same in every process; None for other ones."""
    if isinstance(value, Searcher):
        return describe_part(value)
    known = plain(value) if isinstance(value, bool | int | float | str | np.generic) else None
    return None if isinstance(known, float) and math.isnan(known) else known


def _unquantized(domain: Domain) -> tuple[Any, float | None]:
    sampler: Any = domain.get_sampler()
    return (sampler.sampler, float(sampler.q)) if isinstance(sampler, Quantized) else (sampler, None)


def quantile(domain: Domain, share: float) -> Any:
    """The value below which a ``share`` of the domain's samples lies; between 0 and 1, both included.

    Raises:
        ValueError: the domain has no quantiles.
    """
    if isinstance(domain, Categorical):
        return domain.categories[min(int(share * len(domain.categories)), len(domain.categories) - 1)]
    inner, step = _unquantized(domain)
    integer = isinstance(domain, Integer)
    numeric = cast("Float | Integer", domain)
    if isinstance(inner, Normal):
        share = min(max(share, 1e-6), 1 - 1e-6)
        value = NormalDist(inner.mean, inner.sd).inv_cdf(share)
    elif isinstance(inner, LogUniform):
        low, high = math.log(numeric.lower), math.log(numeric.upper)
        value = min(max(math.exp(low + share * (high - low)), numeric.lower), numeric.upper)
    else:
        value = numeric.lower + share * (numeric.upper - numeric.lower)
    if step is not None:
        value = round(value / step) * step
        return int(value) if integer else min(max(value, numeric.lower), numeric.upper)
    return min(int(value), int(numeric.upper) - 1) if integer else value


def draw(space: Space, name: str, generator: random.Random) -> Any:
    """A value of one key, for a perturbation."""
    domain = flatten(space)[name]
    if is_grid(domain):
        return generator.choice(domain["grid_search"])
    return plain(domain.sample(random_state=np.random.RandomState(generator.randrange(2**31))))


def validate_space(config: Config, space: Space, validate: Callable[[Config], None]) -> None:
    """Checks trials before any of them starts: every value of every choice and grid alone, bounds, and combinations.

    Args:
        validate: raises a ValueError for the configuration of a trial that cannot run.

    Raises:
        ValueError: naming the key or the values.
    """
    if not space:
        raise ValueError("the space is empty; give at least one key, such as loss.beta")
    flat = flatten(space)
    if common := [name for name in flat if name.startswith(OF_THE_SWEEP)]:
        raise ValueError(f"the space has {common[0]}, which all trials share; leave it out")
    for name, domain in flat.items():
        for value in _extremes(domain):
            _validate_value(config, space, flatten({name: value}))
    seen: list[Any] = []
    for values in previews(config, space):
        _validated(config, values, lambda trial: _validate_once(trial, seen, validate))


def previews(config: Config, space: Space) -> Iterator[dict[str, Any]]:
    """Values of the trials that are checked before a sweep starts."""
    state = np.random.RandomState(config.run.seed)
    return itertools.islice(variants(space, state), max(PREVIEWS, grid_points(space)))


def grid_points(space: Space) -> int:
    """Combinations of the values of all ``tune.grid_search``; 1 without any."""
    return math.prod(len(domain["grid_search"]) for domain in flatten(space).values() if is_grid(domain))


def _validate_value(config: Config, space: Space, alone: Mapping[str, Any]) -> None:
    """Checks one value of one key: alone, or if it needs others, with a sample of these."""
    try:
        _validated(config, alone, lambda _: None)
    except ValueError:
        sample = next(variants(space, np.random.RandomState(config.run.seed)))
        try:
            override(config, {**sample, **alone})
        except ValueError:
            pass
        else:
            return
        raise


def _extremes(domain: Any) -> list[Any]:
    """Values of a domain that must be accepted on their own: all of a choice or grid, and both bounds."""
    if is_grid(domain):
        return list(domain["grid_search"])
    if isinstance(domain, Categorical):
        return [value for value in domain.categories if not (isinstance(value, Domain) or has_domain(value))]
    if not isinstance(domain, Domain):
        return [domain]
    if isinstance(domain, Float | Integer) and not isinstance(_unquantized(domain)[0], Normal):
        return [quantile(domain, 0.0), quantile(domain, 1.0)]
    return []


def has_domain(value: Any) -> bool:
    """True if a choice, or a mapping, contains domains."""
    if isinstance(value, Categorical):
        return any(isinstance(choice, Domain) or has_domain(choice) for choice in value.categories)
    if isinstance(value, Mapping):
        return any(isinstance(item, Domain) or has_domain(item) for item in value.values())
    return False


def _validated(config: Config, values: Mapping[str, Any], validate: Callable[[Config], None]) -> None:
    try:
        validate(override(config, values))
    except ValueError as error:
        raise ValueError(f"a trial of the space, with {dict(values)}: {error}") from None


def _validate_once(trial: Config, seen: list[Any], validate: Callable[[Config], None]) -> None:
    """Skips the expensive checks for trials that differ in ``loss.beta``, numbers of ``optim``, or ``run`` only."""
    shape = trial.model_dump(exclude={"run": True, "loss": {"beta"}})
    shape["optim"] = {key: value for key, value in shape["optim"].items() if not isinstance(value, int | float)}
    if shape not in seen:
        validate(trial)
        seen.append(shape)
