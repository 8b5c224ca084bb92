"""``jobs.sweep``: trials over any keys of the configuration, with schedulers and searchers of Ray Tune.

The driver owns the course of the sweep (``sweep/conductor.py``) and answers the slots that run trials
(``launch/sweeps/slots.py``). All trials share tokenized data and cached reference log-probabilities.
"""

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dpo_ray.config import Config, override, with_absolute_paths, write_config
from dpo_ray.launch.cluster import SPARE_CPUS, Cluster, cpus_needed, gpus_needed
from dpo_ray.launch.command import TrainingFailed
from dpo_ray.launch.data import prepare_data, prepare_round_data
from dpo_ray.launch.offline import validate_offline
from dpo_ray.launch.online import validate_online
from dpo_ray.launch.run_dir import exclusive_run_dir
from dpo_ray.launch.sweeps.driver import Driver
from dpo_ray.launch.sweeps.schedulers import build_scheduler, validate_own
from dpo_ray.launch.sweeps.search import build_searcher, grid
from dpo_ray.launch.sweeps.space import describe, describe_part, grid_points, previews, validate_space
from dpo_ray.launch.sweeps.sweep_dir import open_sweep_dir
from dpo_ray.launch.sweeps.trial_dirs import Plan
from dpo_ray.model.architecture import read_model_config
from dpo_ray.report.formatting import count_noun
from dpo_ray.report.live.display import text_console
from dpo_ray.report.sweep_record import SweepRecord, read_sweep
from dpo_ray.report.sweep_summary import print_sweep
from dpo_ray.report.sweep_text import verdict_text
from dpo_ray.sweep.spaces import find_space
from dpo_ray.sweep.trials import ENDED, Constraint, Objective, SweepDefinition, Trial, write_definition
from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)

JUDGE_METRICS = "heldout/judge_"
"""Prefix of held-out metrics that a judge reports itself, such as its cost."""
METRICS = {"step": "eval/rewards/accuracies", "round": "heldout/score"}
"""The metric of a space that names none, by the unit of progress."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A search space and its objective: the one object of a module of ``tune_spaces``."""

    space: Mapping[str, Any]
    """Dotted configuration key to a ray.tune domain, ``tune.grid_search``, ``tune.sample_from`` or a constant. Values
    may be mappings of further keys, such as the choices of a conditional space."""
    metric: str | None = None
    """A held-out metric; None is eval/rewards/accuracies offline and heldout/score online."""
    mode: Literal["max", "min"] = "max"
    samples: int = 16
    """Number of trials, grids included: unlike ``num_samples`` of Ray Tune it does not multiply them."""
    scheduler: Any = None
    """A scheduler of ray.tune with ``time_attr="step"`` (``"round"`` online), instead of ``sweep.scheduler``."""
    search: Any = None
    """A searcher of ray.tune, instead of ``sweep.search``."""


def load_sweep(name: str) -> Sweep:
    """The sweep of a module of ``tune_spaces``, or of any importable module.

    Raises:
        ValueError: the module does not exist or has no SWEEP.
    """
    module = importlib.import_module(find_space(name))
    if not isinstance(sweep := getattr(module, "SWEEP", None), Sweep):
        raise ValueError(f"space {name!r}: module {module.__name__} has no SWEEP = Sweep(...)")
    return sweep


def run_sweep(config: Config, cluster: Cluster, space: str) -> None:
    """Runs all trials, or those that an interrupted sweep left; writes sweep.csv, best.yaml and report.html.

    Raises:
        ValueError: the configuration, the space or the data are invalid, or another sweep has this name.
        TrainingFailed: no trial can win.
    """
    console, sweep = text_console(), load_sweep(space)
    config = with_absolute_paths(config)
    _validate_sweep(config, sweep)
    definition = define(config, sweep)
    _validate_metrics(config, sweep, definition.objective)
    _validate_parts(config, sweep, definition)
    with exclusive_run_dir(config.run):
        _run_exclusively(config, cluster, sweep, definition, console)


def _run_exclusively(
    config: Config, cluster: Cluster, sweep: Sweep, definition: SweepDefinition, console: Console
) -> None:
    _concurrent(config, cluster, definition.samples)  # for its error
    run_dir, definition = open_sweep_dir(config, definition)
    concurrent = _concurrent(config, cluster, definition.samples)
    pairs, prompts, held_out, digests = _prepare(config, cluster, console, definition.data)
    definition = replace(definition, data=digests)
    write_definition(run_dir / "sweep.json", definition)
    console.print(f"{count_noun(definition.samples, 'trial')}, {concurrent} at a time")
    if sweep.search is None and definition.samples < (points := grid_points(sweep.space)):
        console.print(
            f"  {definition.samples} of the {points} combinations of tune.grid_search; sweep.samples={points} tries all"
        )
    plan = Plan(config, sweep.space, sweep.scheduler, sweep.search, definition, pairs, concurrent)
    driver = Driver(plan, cluster, run_dir, console, prompts=prompts, held_out=held_out)
    try:
        driver.run()
    except TrainingFailed:
        # The results so far are good, and the same command continues.
        if any(trial.status in ENDED for trial in driver.trials):
            _finish(config, definition, driver.trials, run_dir, console)
        raise
    record = _finish(config, definition, driver.trials, run_dir, console)
    if record.verdict.best is None:
        raise TrainingFailed(_no_result(record))


def define(config: Config, sweep: Sweep) -> SweepDefinition:
    """The resolved sweep."""
    settings, time = config.sweep, "round" if config.online is not None else "step"
    samples = settings.samples or sweep.samples
    if settings.search.use == "grid" and sweep.search is None:
        combinations = len(grid(sweep.space, settings.search.args.get("points", 3)))
        samples = min(settings.samples or combinations, combinations)
    constraint = Constraint(settings.constraint.metric, settings.constraint.max) if settings.constraint else None
    own_scheduler, own_search = (
        describe_part(own) if own is not None else None for own in (sweep.scheduler, sweep.search)
    )
    return SweepDefinition(
        keys=describe(sweep.space),
        objective=Objective(sweep.metric or METRICS[time], sweep.mode, constraint),
        scheduler=own_scheduler or settings.scheduler.model_dump(mode="json"),
        search=own_search or settings.search.model_dump(mode="json"),
        samples=samples,
        seed=config.run.seed,
        time="round" if time == "round" else "step",
    )


def _validate_sweep(config: Config, sweep: Sweep) -> None:
    if config.run.remote:
        raise ValueError(f"run.dir is {config.run.dir!r}: a sweep needs a path that all nodes mount")
    for name, own, setting, default in (
        ("scheduler", sweep.scheduler, config.sweep.scheduler.use, "none"),
        ("search", sweep.search, config.sweep.search.use, "random"),
    ):
        if own is not None and setting != default:
            raise ValueError(
                f"sweep.{name}.use is {setting}, and the space brings {type(own).__name__}; leave one of them out"
            )
    if sweep.scheduler is not None and config.run.eval_every is None:
        raise ValueError(
            f"the space brings {type(sweep.scheduler).__name__}, which judges trials by evaluations during training, "
            "and run.eval_every is null; set it to the steps (rounds online) between two evaluations"
        )
    if "model.path" not in sweep.space:
        read_model_config(config.model.path)  # the same in all trials: no trial is to blame
    validate_space(config, sweep.space, validate_online if config.online is not None else validate_offline)


def _validate_metrics(config: Config, sweep: Sweep, objective: Objective) -> None:
    """Checks that there are trials whose evaluations have the metrics by which the sweep compares them."""
    trials = [override(config, values) for values in previews(config, sweep.space)]
    accepted = list(dict.fromkeys(name for trial in trials for name in trial.evaluation_metrics))
    metrics = {"Sweep.metric": objective.metric}
    if objective.constraint is not None:
        metrics["sweep.constraint.metric"] = objective.constraint.metric
    kind, distance = ("offline", "eval/drift") if config.online is None else ("online", "kl")
    for key, metric in metrics.items():
        if metric not in accepted and not (config.online is not None and metric.startswith(JUDGE_METRICS)):
            advice = f": {distance} needs a reference that is held for the whole run" if metric == distance else ""
            raise ValueError(
                f"{key} is {metric!r}; evaluations of these {kind} trials have {', '.join(accepted)}{advice}"
            )


def _validate_parts(config: Config, sweep: Sweep, definition: SweepDefinition) -> None:
    """Builds scheduler and searcher once for their errors, before data are tokenized; not those of the space."""
    objective, time = definition.objective, definition.time
    if sweep.search is None:
        build_searcher(config.sweep.search, sweep.space, None, objective, definition.seed)
    if sweep.scheduler is None:
        build_scheduler(config, sweep.space, definition.keys, None, objective, time=time, length=1)
    else:
        validate_own(sweep.scheduler, time)


def _prepare(
    config: Config, cluster: Cluster, console: Console, recorded: Mapping[str, str]
) -> tuple[int, list[Prompt], list[Prompt], dict[str, str]]:
    """Prepares the data that trials share: number of training pairs, prompts, held-out prompts, and digests of all.

    Args:
        recorded: digests of the data of the sweep that is continued.
    """
    if config.online is None:
        pairs, digests = prepare_data(config, cluster, console, recorded=recorded)
        return pairs, [], [], digests
    return 0, *prepare_round_data(config, cluster, console, recorded=recorded)


def _concurrent(config: Config, cluster: Cluster, samples: int) -> int:
    """Slots of the sweep.

    Raises:
        ValueError: ``sweep.concurrent`` trials do not fit the cluster: some would wait for resources until they fail.
    """
    asked = config.sweep.concurrent
    if asked is None:
        return min(samples, _trials_that_fit(config, cluster))
    if min(samples, asked) > (fit := _trials_that_fit(config, cluster, spare_cpus=0)):
        gpus = f" and {count_noun(cluster.gpus, 'GPU')}" if cluster.on_gpus else ""
        raise ValueError(
            f"sweep.concurrent is {asked}; the cluster's {count_noun(cluster.cpus, 'CPU')}{gpus} hold "
            f"{count_noun(fit, 'trial')} of cluster.* at once: lower sweep.concurrent, or add nodes"
        )
    return min(samples, asked)


def _trials_that_fit(config: Config, cluster: Cluster, *, spare_cpus: int = SPARE_CPUS) -> int:
    engines, judges = (
        (0, {}) if config.online is None else (config.cluster.rollout_engines, config.online.started_judges)
    )
    trials = (cluster.cpus - spare_cpus) // cpus_needed(config.cluster, engines, on_gpus=cluster.on_gpus)
    if cluster.on_gpus:
        trials = min(trials, int(cluster.gpus // gpus_needed(config.cluster, engines, judges)))
    return max(1, trials)


def _finish(
    config: Config, definition: SweepDefinition, trials: list[Trial], run_dir: Path, console: Console
) -> SweepRecord:
    """Writes best.yaml, if a trial can win, and the report; prints the result."""
    record = read_sweep(run_dir, trials, definition.objective)
    if (best := record.verdict.pick) is not None:
        name = f"{config.run.name}-best"
        write_config(override(config, {**best.values, "run.name": name, "sweep": {}}), run_dir / "best.yaml")
    print_sweep(record, "online" if config.online is not None else "offline", console)
    return record


def _no_result(record: SweepRecord) -> str:
    """The cause for which no trial can win."""
    trials, metric = record.trials, record.objective.metric
    errors = [trial.error for trial in trials if trial.status == "failed"]
    if errors and len(errors) == len(trials):
        return f"{'all ' * (len(trials) > 1)}{count_noun(len(trials), 'trial')} failed; first error: {errors[0]}"
    known = sorted({key for trial in trials for key in trial.metrics if key.startswith(("eval/", "heldout/", "kl"))})
    others = f" The evaluations have {', '.join(known) or 'no metrics'}." if metric not in known else ""
    return f"{verdict_text(record.verdict)}{others}"
