"""Searchers: random, grid and Sobol sequences over a space, and any searcher of ray.tune."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.search import Searcher as TuneSearcher
from ray.tune.search.sample import Categorical, Domain, Function, Integer
from ray.tune.search.variant_generator import generate_variants

from dpo_ray.config.sweeps import GridArgs, OptunaArgs, SearchConfig
from dpo_ray.launch.sweeps.space import Space, flatten, has_domain, is_grid, plain, quantile, variants
from dpo_ray.sweep.scheduling import Searcher
from dpo_ray.sweep.trials import Objective
from dpo_ray.types import Metrics


class Sequential:
    """A searcher that ignores results: the values of an iterator."""

    def __init__(self, values: Iterator[dict[str, Any]]) -> None:
        self.values, self.exhausted = values, False

    def suggest(self, trial: str) -> Mapping[str, Any] | None:
        value = next(self.values, None)
        self.exhausted = value is None
        return value

    def report(self, trial: str, metrics: Metrics) -> None: ...

    def ended(self, trial: str, metrics: Metrics, *, failed: bool) -> None: ...


class FromTune:
    """A searcher of ray.tune that models ``metric``."""

    def __init__(self, searcher: TuneSearcher, metric: str) -> None:
        self.searcher, self.metric, self.exhausted = searcher, metric, False

    def suggest(self, trial: str) -> Mapping[str, Any] | None:
        values: Any = self.searcher.suggest(trial)
        self.exhausted = values == TuneSearcher.FINISHED
        return None if values is None or self.exhausted else flatten(values)

    def report(self, trial: str, metrics: Metrics) -> None:
        if self.metric in metrics:
            self.searcher.on_trial_result(trial, {**metrics, "training_iteration": metrics.get("step", 0)})

    def ended(self, trial: str, metrics: Metrics, *, failed: bool) -> None:
        known = self.metric in metrics
        self.searcher.on_trial_complete(trial, dict(metrics) if known else None, error=failed or not known)


def build_searcher(config: SearchConfig, space: Space, own: Any, objective: Objective, seed: int) -> Searcher:
    """The searcher that the configuration names, or the one that the space brings.

    Raises:
        ValueError: it cannot search the space.
    """
    if own is not None:
        own.set_search_properties(objective.metric, objective.mode, dict(space))
        return FromTune(own, objective.metric)
    match config.use:
        case "grid":
            return Sequential(iter(grid(space, GridArgs.model_validate(config.args).points)))
        case "sobol":
            return Sequential(sobol(space, seed))
        case "optuna":
            return FromTune(_optuna(space, objective, seed, OptunaArgs.model_validate(config.args)), objective.metric)
    return Sequential(variants(space, np.random.RandomState(seed)))


def grid(space: Space, points: int) -> list[dict[str, Any]]:
    """All combinations: every value of choices, grids and short integer ranges, ``points`` of other domains."""
    flat = flatten(space)
    if computed := next((name for name, domain in flat.items() if isinstance(domain, Function)), None):
        raise ValueError(f"sweep.search.use: grid has no values for {computed}, which a function computes; use random")
    axes = {name: _axis(name, domain, points) for name, domain in flat.items()}
    return [flatten(dict(zip(axes, combination, strict=True))) for combination in itertools.product(*axes.values())]


def _axis(name: str, domain: Any, points: int) -> Sequence[Any]:
    if is_grid(domain):
        return domain["grid_search"]
    if has_domain(domain):
        raise ValueError(f"sweep.search.use: grid has no values for {name}, which holds further domains; use random")
    if isinstance(domain, Categorical):
        return domain.categories
    if isinstance(domain, Domain):
        if isinstance(domain, Integer) and domain.upper - domain.lower <= points:
            return list(range(int(domain.lower), int(domain.upper)))
        return list(dict.fromkeys(plain(quantile(domain, i / (points - 1))) for i in range(points)))
    return [domain]


def sobol(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    """A scrambled Sobol sequence through the quantiles of all domains.

    Grid values take turns, each with a point of its own; functions see the other values.
    """
    import torch

    flat = flatten(space)
    domains = {name: domain for name, domain in flat.items() if isinstance(domain, Domain)}
    sampled = [name for name, domain in domains.items() if not isinstance(domain, Function)]
    engine = torch.quasirandom.SobolEngine(max(1, len(sampled)), scramble=True, seed=seed)
    grids = {name: domain["grid_search"] for name, domain in flat.items() if is_grid(domain)}
    state: Any = np.random.RandomState(seed)
    while True:
        for combination in itertools.product(*grids.values()):
            (point,) = engine.draw(1).double().tolist()
            shares = dict(zip(sampled, point, strict=False))  # a space without domains draws one number in vain
            values = {name: quantile(domains[name], share) for name, share in shares.items()}
            chosen = values | dict(zip(grids, combination, strict=True))
            ((_, complete),) = generate_variants(_filled(space, chosen), random_state=state)
            yield flatten(complete)


def _filled(space: Space, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The space with values, by their dotted keys, in the places of their domains: functions see it nested."""
    filled = {}
    for key, domain in space.items():
        name = f"{prefix}{key}"
        nested = isinstance(domain, Mapping) and domain and not is_grid(domain)
        filled[key] = _filled(domain, values, f"{name}.") if nested else values.get(name, domain)
    return filled


def _optuna(space: Space, objective: Objective, seed: int, args: OptunaArgs) -> TuneSearcher:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name, domain in space.items():
        if is_grid(domain) or isinstance(domain, Function | Mapping) or has_domain(domain):
            raise ValueError(
                f"sweep.search.use: optuna samples domains, and {name} is a grid, a function or nested; use random or "
                "give it a domain such as tune.choice"
            )
    # The startup trials of the default sampler cannot be set by name.
    sampler = optuna.samplers.TPESampler(n_startup_trials=args.startup_trials, seed=seed)
    return OptunaSearch(dict(space), metric=objective.metric, mode=objective.mode, sampler=sampler)
