"""Schedulers: ray.tune's own, driven without its controller, and those of ``dpo_ray.sweep``.

A scheduler of ray.tune gets stand-ins for the trials and for the controller with the attributes that it reads. Its
random choices are seeded. So the same results in the same order give the same decisions, and a killed sweep is
continued by repeating them; ``Tuner.restore`` would start with an empty scheduler.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    ASHAScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.sample import Domain, Function

from dpo_ray.config import Config
from dpo_ray.config.resume import FIXED_KEYS
from dpo_ray.config.sweeps import AshaArgs, HalvingArgs, HyperbandArgs, MedianArgs, PbtArgs
from dpo_ray.launch.sweeps.space import Space, choices, draw, flatten, is_grid
from dpo_ray.sweep.halving import Halving
from dpo_ray.sweep.population import Population
from dpo_ray.sweep.scheduling import Decision, RunToEnd, Scheduler, Update
from dpo_ray.sweep.trials import Key, Objective
from dpo_ray.types import Metrics

_FIRST_DECISION = {"asha": "grace_period", "halving": "grace_period", "median": "grace_period", "pbt": "interval"}
"""Argument of a scheduler with the time of its first decision; without it, that is ``run.eval_every``."""
RUNGS = 20
"""Rungs of successive halving; more than any trial reaches, so that a longer trial has more of them."""


def build_scheduler(
    config: Config,
    space: Space,
    keys: Mapping[str, Key],
    own: Any,
    objective: Objective,
    *,
    time: str,
    length: int,
) -> Scheduler:
    """The scheduler that the configuration names, or the one that the space brings.

    Args:
        own: a scheduler of ray.tune; its ``time_attr`` must be ``step`` or ``round``.
        length: longest trial, in ``time``.

    Raises:
        ValueError: the scheduler cannot be used.
    """
    seed = config.run.seed
    if own is not None:
        validate_own(own, time)
        own.set_search_properties(objective.metric, objective.mode)
        return FromTune(own, seed, pauses=not isinstance(own, ASHAScheduler))
    use, args, every = config.sweep.scheduler.use, config.sweep.scheduler.args, config.run.eval_every or 1
    common: dict[str, Any] = {"time_attr": time, "metric": objective.metric, "mode": objective.mode}
    match use:
        case "asha":
            asha = AshaArgs.model_validate(args)
            first, factor = asha.grace_period or every, asha.reduction_factor
            return FromTune(
                ASHAScheduler(
                    **common, grace_period=first, reduction_factor=factor, max_t=first * factor**RUNGS,
                    stop_last_trials=False,
                ),
                seed,
            )  # fmt: skip
        case "halving":
            return Halving(HalvingArgs.model_validate(args), objective, rungs=_rungs_of_halving(config), time=time)
        case "median":
            median = MedianArgs.model_validate(args)
            return FromTune(
                MedianStoppingRule(
                    **common,
                    grace_period=median.grace_period or every,
                    min_samples_required=median.min_samples_required,
                    min_time_slice=float("inf"),  # type: ignore[arg-type]  # never pauses a trial for others
                ),
                seed,
            )
        case "hyperband":
            factor = HyperbandArgs.model_validate(args).reduction_factor
            return FromTune(HyperBandScheduler(**common, max_t=length, reduction_factor=factor), seed, pauses=True)
        case "pbt":
            pbt = PbtArgs.model_validate(args)
            mutable = {name: keys[name] for name, domain in flatten(space).items() if _may_change(name, domain)}
            if not mutable:
                raise ValueError(
                    "sweep.scheduler.use: pbt changes values during a run, and the space has none that may change: "
                    "constants, functions and values inside a choice of mappings do not; add optim.lr or loss.beta"
                )
            return Population(
                pbt, objective, mutable, partial(draw, space), interval=pbt.interval or every, time=time, seed=seed
            )
    return RunToEnd()


def validate_own(scheduler: Any, time: str) -> None:
    """Raises a ValueError if a scheduler that the space brings cannot be used."""
    name = f"the scheduler of the space is {type(scheduler).__name__}"
    if isinstance(scheduler, PopulationBasedTraining | HyperBandForBOHB):
        raise ValueError(
            f"{name}, which needs Tune's own controller; leave it out and set sweep.scheduler.use: pbt or hyperband"
        )
    if (attribute := getattr(scheduler, "_time_attr", time)) != time:
        raise ValueError(f"{name} with time_attr={attribute!r}; trials report {time!r}")
    for part in ("metric", "mode"):
        if (own := getattr(scheduler, f"_{part}", None)) is not None:
            raise ValueError(f"{name} with {part}={own!r}; leave metric and mode out, the sweep sets its own")


def validate_length(config: Config, own: Any, time: str, length: int) -> None:
    """Raises a ValueError if the scheduler decides nothing before the end of a trial, or ends all trials before it.

    Args:
        own: a scheduler that the space brings.
        length: of a trial, in ``time``.
    """
    use = config.sweep.scheduler.use
    if isinstance(own, ASHAScheduler) and own._max_t < length:
        raise ValueError(
            f"the scheduler of the space is {type(own).__name__} with max_t={own._max_t}, before the end of a trial at "
            f"{time} {length}; raise it"
        )
    first, key = _first_decision(config, length)
    if use != "none" and first >= length:
        raise ValueError(
            f"sweep.scheduler.use: {use} decides at evaluations before the end of a trial, and the first one is at "
            f"{time} {first} of {length}; lower {key}"
        )


def _first_decision(config: Config, length: int) -> tuple[int, str]:
    """The time of the first decision, and the key that sets it."""
    name = _FIRST_DECISION.get(config.sweep.scheduler.use, "")
    if at := config.sweep.scheduler.args.get(name):
        return at, f"sweep.scheduler.args.{name}"
    return config.run.eval_every or length, "run.eval_every"


def rungs(config: Config, length: int) -> tuple[int, ...]:
    """Steps (rounds online) at which trials are evaluated: where the scheduler decides, and no others."""
    every = config.run.eval_every or length
    if config.sweep.scheduler.use not in ("asha", "halving"):
        return tuple(range(every, length + 1, every)) or (length,)
    return tuple(rung for rung in _rungs_of_halving(config) if rung < length) or (length,)


def continuing_share(config: Config) -> float:
    """Share of paused trials that the scheduler lets continue; 1 if it stops no paused trial."""
    match config.sweep.scheduler.use:
        case "halving":
            return 1 / HalvingArgs.model_validate(config.sweep.scheduler.args).reduction_factor
        case "hyperband":
            return 1 / HyperbandArgs.model_validate(config.sweep.scheduler.args).reduction_factor
    return 1.0


def _rungs_of_halving(config: Config) -> tuple[int, ...]:
    use, args = config.sweep.scheduler.use, config.sweep.scheduler.args
    halving = AshaArgs.model_validate(args) if use == "asha" else HalvingArgs.model_validate(args)
    first = halving.grace_period or config.run.eval_every or 1
    return tuple(first * halving.reduction_factor**k for k in range(RUNGS))


def _may_change(name: str, domain: Any) -> bool:
    """True if trials have a value of the key that population-based training may perturb.

    A choice of mappings or of domains is no such value: trials have the keys and values inside of it.
    """
    drawn = is_grid(domain) or (isinstance(domain, Domain) and not isinstance(domain, Function))
    return drawn and not any(isinstance(c, Mapping | Domain) for c in choices(domain)) and not _is_fixed(name)


def _is_fixed(name: str) -> bool:
    """True if a run cannot be continued with another value of the key."""
    return any(name == key or name.startswith(f"{key}.") for key in FIXED_KEYS)


class StandInTrial:
    """The attributes of a ray.tune trial that schedulers read."""

    is_saving = False

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.trial_id = name
        self.config = self.evaluated_params = dict(values)
        self.status = TuneTrial.PENDING
        self.last_result: dict[str, Any] = {}

    def is_finished(self) -> bool:
        """True once it ended."""
        return self.status in (TuneTrial.TERMINATED, TuneTrial.ERROR)

    def __repr__(self) -> str:
        return self.trial_id


class StandInController:
    """The methods of ray.tune's controller that schedulers call."""

    search_alg = None

    def __init__(self) -> None:
        self.trials: dict[str, StandInTrial] = {}
        self.stopped: list[StandInTrial] = []

    def get_trials(self) -> list[StandInTrial]:
        """All trials."""
        return list(self.trials.values())

    def get_live_trials(self) -> list[StandInTrial]:
        """Trials that have not ended."""
        return [trial for trial in self.trials.values() if not trial.is_finished()]

    def stop_trial(self, trial: StandInTrial) -> None:
        """Stops a paused trial."""
        self.stopped.append(trial)


class FromTune:
    """A scheduler of ray.tune.

    Args:
        pauses: True if it may pause trials.
    """

    def __init__(self, scheduler: TrialScheduler, seed: int, *, pauses: bool = False) -> None:
        self.scheduler: Any = scheduler
        self.controller = StandInController()
        self.whole_population, self.pauses = isinstance(scheduler, HyperBandScheduler), pauses
        self.states = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()

    def add(self, trial: str, values: Mapping[str, Any]) -> None:
        self.controller.trials[trial] = StandInTrial(trial, values)
        with self._seeded():
            self.scheduler.on_trial_add(self.controller, self.controller.trials[trial])

    def started(self, trial: str) -> None:
        self.controller.trials[trial].status = TuneTrial.RUNNING

    def report(self, trial: str, metrics: Metrics) -> Decision:
        of_tune = self.controller.trials[trial]
        of_tune.last_result = {**metrics, "training_iteration": len(of_tune.last_result)}
        if self.scheduler.metric not in metrics:
            return "continue"
        with self._seeded():
            decision = self.scheduler.on_trial_result(self.controller, of_tune, dict(metrics))
        if decision == TrialScheduler.STOP:
            of_tune.status = TuneTrial.TERMINATED
            return "stop"
        if decision == TrialScheduler.PAUSE:
            of_tune.is_saving = True  # until then the scheduler must not take it for one that still runs
            return "pause"
        return "continue"

    def paused(self, trial: str) -> None:
        of_tune = self.controller.trials[trial]
        of_tune.status, of_tune.is_saving = TuneTrial.PAUSED, False

    def ended(self, trial: str, metrics: Metrics, *, failed: bool) -> None:
        of_tune = self.controller.trials[trial]
        with self._seeded():
            if failed:
                self.scheduler.on_trial_error(self.controller, of_tune)
            else:
                self.scheduler.on_trial_complete(self.controller, of_tune, dict(metrics))
        of_tune.status = TuneTrial.ERROR if failed else TuneTrial.TERMINATED

    def updates(self) -> list[Update]:
        stopped, self.controller.stopped = self.controller.stopped, []
        for trial in stopped:
            with self._seeded():
                self.scheduler.on_trial_remove(self.controller, trial)
            trial.status = TuneTrial.TERMINATED
        return [Update(trial.trial_id, "stop") for trial in stopped]

    def choose(self, ready: Sequence[str]) -> str | None:
        with self._seeded():
            chosen = self.scheduler.choose_trial_to_run(self.controller)
        return chosen.trial_id if chosen is not None else None

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Gives the scheduler random generators of its own: it uses the global ones."""
        before = random.getstate(), np.random.get_state()
        random.setstate(self.states[0])
        np.random.set_state(self.states[1])
        try:
            yield
        finally:
            self.states = random.getstate(), np.random.get_state()
            random.setstate(before[0])
            np.random.set_state(before[1])
