"""``jobs.sweep``: Ray Tune over any keys of the configuration, each trial a Ray Train run through the offline launch.

The reference is scored once for all trials: its cache knows nothing of what a sweep varies.
"""

import csv
import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from rich.console import Console
from rich.table import Table

from dpo_ray.config import Config, override, with_absolute_paths, write_config
from dpo_ray.launch.cluster import SPARE_CPUS, Cluster
from dpo_ray.launch.command import TrainingFailed
from dpo_ray.launch.display import live_display
from dpo_ray.launch.follower import follow_run
from dpo_ray.launch.offline import train, validate_offline
from dpo_ray.launch.preparation import prepare_data
from dpo_ray.launch.run_dir import make_run_dir
from dpo_ray.launch.spaces import find_space
from dpo_ray.launch.status import Status, start_status_actor

logger = logging.getLogger(__name__)

TRIAL_CPUS = 0.01
"""A trial's own process only waits for its workers; Tune refuses to place a trial that asks for nothing."""
TIE_BREAK = "eval/loss"
"""Decides between trials of equal metric, smaller is better: accuracies on few held-out pairs are often equal."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A search space and what is sought in it: the one object of a module of ``tune_spaces``."""

    space: Mapping[str, Any]
    """Dotted configuration key to a ray.tune domain."""
    metric: str = "eval/rewards/accuracies"
    """A held-out metric."""
    mode: Literal["max", "min"] = "max"
    samples: int = 16
    """Trials."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one trial."""

    name: str
    sample: Mapping[str, Any]
    metrics: Mapping[str, Any]
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """A line of sweep.csv."""
        evaluated = {key: value for key, value in self.metrics.items() if key.startswith("eval/") or key == "step"}
        return {
            "trial": self.name,
            **self.sample,
            **evaluated,
            "seconds": self.metrics.get("time_total_s"),
            "error": self.error,
        }


def load_sweep(name: str) -> Sweep:
    """The sweep of a module of ``tune_spaces``, or of any importable module, by name.

    Raises:
        ValueError: there is no such module, or it holds no SWEEP.
    """
    module = importlib.import_module(find_space(name))
    if not isinstance(sweep := getattr(module, "SWEEP", None), Sweep):
        raise ValueError(f"space {name!r}: module {module.__name__} has no SWEEP = Sweep(...)")
    return sweep


def run_sweep(config: Config, cluster: Cluster, space: str) -> None:
    """Run all trials; leaves sweep.csv, best.yaml and report.html in the run directory.

    Raises:
        ValueError: the configuration, the space or the data cannot be used.
        TrainingFailed: no trial succeeded.
    """
    console, sweep = Console(), load_sweep(space)
    config = with_absolute_paths(config)
    if config.run.remote:
        raise ValueError(f"run.dir is {config.run.dir!r}: a sweep needs a path that all nodes mount")
    validate_offline(config)
    for key in sweep.space:
        _validate_key(config, key)
    run_dir = make_run_dir(config)
    samples = config.sweep.samples or sweep.samples
    prepare_data(config, cluster, console)
    concurrent = min(samples, config.sweep.concurrent or _trials_at_a_time(config, cluster))
    console.print(f"{samples} trials, {concurrent} at a time", highlight=False)
    progress = _Progress(samples)
    with live_display(
        lambda: progress.status, title=f"{config.run.name}: sweep of {samples} trials", rounds=None, console=console
    ):
        results = _fit(config, sweep, samples, concurrent, run_dir, progress, cluster)
    trials = [_outcome(result, sweep) for result in results]
    _tell(config, sweep, trials, run_dir, console)


def _fit(
    config: Config, sweep: Sweep, samples: int, concurrent: int, run_dir: Path, progress: "_Progress", cluster: Cluster
) -> Any:
    def trial(sample: dict[str, Any]) -> None:
        chosen = _of_trial(config, sample, run_dir, ray.tune.get_context().get_trial_id())
        make_run_dir(chosen)
        status_actor = start_status_actor()
        with follow_run(chosen, logger.warning, group=config.run.name):
            train(chosen, cluster, status_actor, callbacks=[TuneReportCallback()])

    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trial, {"CPU": TRIAL_CPUS}),
        param_space=dict(sweep.space),
        tune_config=ray.tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            num_samples=samples,
            # The generator's own limit: the one of TuneConfig does not reach it.
            search_alg=ray.tune.search.BasicVariantGenerator(max_concurrent=concurrent, random_state=config.run.seed),
        ),
        run_config=ray.tune.RunConfig(
            name="tune", storage_path=str(run_dir / "ray"), verbose=0, callbacks=[progress], log_to_file=True
        ),
    )
    return tuner.fit()


def _of_trial(config: Config, sample: Mapping[str, Any], run_dir: Path, name: str) -> Config:
    """A trial's configuration: the sample, a directory of its own, and nothing kept but metrics."""
    return override(
        config,
        {**sample, "run.dir": str(run_dir / "trials"), "run.name": name, "run.export": False, "run.save_every": None},
    )


def _validate_key(config: Config, key: str) -> None:
    section, _, name = key.rpartition(".")
    known = config
    for part in section.split(".") if section else []:
        known = getattr(known, part, None)
    if not hasattr(known, name):
        raise ValueError(f"the space varies {key!r}, which is no key of the configuration")


def _trials_at_a_time(config: Config, cluster: Cluster) -> int:
    size = config.cluster
    fit = (cluster.cpus - SPARE_CPUS) // (size.train_workers * size.cpus_per_worker)
    if cluster.on_gpus:
        fit = min(fit, cluster.gpus // size.train_workers)
    return max(1, fit)


class _Progress(ray.tune.Callback):
    """Counts trials in the driver's process, where the display reads it."""

    def __init__(self, samples: int) -> None:
        self.samples, self.ended = samples, 0
        self.status = Status(phase="starting", total=samples)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show that trials are under way."""
        self.status = Status(phase="training", done=self.ended, total=self.samples, metrics=self.status.metrics)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Show the latest held-out figures."""
        self.status = Status(phase="training", done=self.ended, total=self.samples, metrics=dict(result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial that ended well."""
        self._end()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial that failed."""
        self._end()

    def _end(self) -> None:
        self.ended += 1
        self.status = Status(phase="training", done=self.ended, total=self.samples, metrics=self.status.metrics)


def _outcome(result: Any, sweep: Sweep) -> Trial:
    metrics = result.metrics or {}
    sample = {key: (result.config or {}).get(key) for key in sweep.space}
    error = None if result.error is None else _first_cause(str(result.error))
    return Trial(metrics.get("trial_id", Path(result.path).name), sample, metrics, error)


def _first_cause(error: str) -> str:
    """The line of a trial's traceback that says what went wrong."""
    told = [line.strip() for line in error.strip().splitlines() if "TrainingFailed: " in line]
    return (told or error.strip().splitlines())[-1].rpartition("TrainingFailed: ")[2]


def rank(trials: Sequence[Trial], sweep: Sweep) -> list[Trial]:
    """Trials that have the metric, best first."""
    sign = -1.0 if sweep.mode == "max" else 1.0
    scored = [trial for trial in trials if isinstance(trial.metrics.get(sweep.metric), int | float)]
    return sorted(scored, key=lambda t: (sign * t.metrics[sweep.metric], t.metrics.get(TIE_BREAK, 0.0)))


def _tell(config: Config, sweep: Sweep, trials: Sequence[Trial], run_dir: Path, console: Console) -> None:
    from dpo_ray.report.page import write_sweep_report

    ranked = rank(trials, sweep)
    failed = [trial for trial in trials if trial not in ranked]
    rows = [trial.row() for trial in [*ranked, *failed]]
    with (run_dir / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    if not ranked:
        raise TrainingFailed(f"no trial of {len(trials)} succeeded; the first said: {failed[0].error}")
    best = override(config, {**ranked[0].sample, "run.name": f"{config.run.name}-best"})
    write_config(best, run_dir / "best.yaml")
    report = write_sweep_report(run_dir, rows, sweep.metric, sweep.mode)

    table = Table(title=f"Trials by {sweep.metric}, best first", title_justify="left")
    shown_keys = [*sweep.space, sweep.metric, TIE_BREAK, "seconds"]
    for name in ("trial", *shown_keys):
        table.add_column(name, justify="left" if name == "trial" else "right")
    for row in rows:
        table.add_row(row["trial"], *(_short(row.get(key)) for key in shown_keys))
    console.print(table)
    for trial in failed:
        console.print(f"failed: {trial.name}: {trial.error}", highlight=False, markup=False)
    console.print(f"best: {run_dir / 'best.yaml'}   train it: dpo-ray offline {run_dir / 'best.yaml'}", soft_wrap=True)
    console.print(f"all:  {run_dir / 'sweep.csv'}   pictures: {report}", soft_wrap=True)


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
