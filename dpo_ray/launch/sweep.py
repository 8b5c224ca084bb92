"""``jobs.sweep``: Ray Tune over any keys of the configuration, each trial an offline run on Ray Train.

All trials share cached reference log-probabilities: the cache does not depend on the keys that a sweep varies.
"""

import csv
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.sample import Domain
from rich.console import Console
from rich.table import Table

from dpo_ray.config import Config, override, with_absolute_paths, write_config
from dpo_ray.launch.cluster import SPARE_CPUS, Cluster, cpus_needed, gpus_needed
from dpo_ray.launch.command import TrainingFailed
from dpo_ray.launch.data import prepare_data
from dpo_ray.launch.display import live_display, text_console
from dpo_ray.launch.follower import follow_run
from dpo_ray.launch.offline import LOOP, validate_offline
from dpo_ray.launch.run_dir import make_run_dir
from dpo_ray.launch.spaces import find_space
from dpo_ray.launch.status import Status, start_status_actor, without_ties
from dpo_ray.launch.workers import train_on_workers
from dpo_ray.report.figures import TIE_BREAK, Rows, rank_trials
from dpo_ray.report.formatting import format_number

logger = logging.getLogger(__name__)

TRIAL_CPUS = 0.01
"""CPUs of a trial's driver, which only waits for its workers. Tune rejects trials that need no resource."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A search space and its objective: the one object of a module of ``tune_spaces``."""

    space: Mapping[str, Any]
    """Dotted configuration key to a ray.tune domain."""
    metric: str = "eval/rewards/accuracies"
    """A held-out metric."""
    mode: Literal["max", "min"] = "max"
    samples: int = 16
    """Trials."""


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
    """Runs all trials; writes sweep.csv, best.yaml and report.html to the run directory.

    Raises:
        ValueError: the configuration, the space or the data are invalid.
        TrainingFailed: every trial failed.
    """
    console, sweep = text_console(), load_sweep(space)
    config = with_absolute_paths(config)
    _validate_sweep(config, sweep)
    run_dir = make_run_dir(config)
    samples = config.sweep.samples or sweep.samples
    prepare_data(config, cluster, console)
    concurrent = min(samples, config.sweep.concurrent or _trials_that_fit(config, cluster))
    console.print(f"{samples} trials, {concurrent} at a time")
    progress = _Progress(samples)
    title = f"{config.run.name}: sweep of {samples} trials"
    with live_display(lambda: progress.status, title=title, rounds=None, console=console):
        results = _fit(config, sweep, samples, concurrent, run_dir, progress, cluster)
    ranked, failed = rank_trials([_row(result, sweep) for result in results], sweep.metric, sweep.mode)
    report = _write_results(config, sweep, ranked, failed, run_dir)
    _print_results(sweep, ranked, failed, run_dir, report, console)


def _validate_sweep(config: Config, sweep: Sweep) -> None:
    if config.run.remote:
        raise ValueError(f"run.dir is {config.run.dir!r}: a sweep needs a path that all nodes mount")
    samples = {key: _sample(domain) for key, domain in sweep.space.items()}
    try:
        # Each key alone names the one that is wrong; together they are the configuration of a trial.
        for trial in (*({key: value} for key, value in samples.items()), samples):
            trial_config = override(config, trial)
        validate_offline(trial_config)
    except ValueError as error:
        raise ValueError(f"a trial of the space, with {samples}: {error}") from None


def _sample(domain: Any) -> Any:
    """A value that a trial may get."""
    if isinstance(domain, Domain):
        return domain.sample()
    return domain["grid_search"][0] if isinstance(domain, dict) and "grid_search" in domain else domain


def _fit(
    config: Config, sweep: Sweep, samples: int, concurrent: int, run_dir: Path, progress: "_Progress", cluster: Cluster
) -> Any:
    def run_trial(sample: dict[str, Any]) -> None:
        name, folder = ray.tune.get_context().get_trial_id(), str(run_dir / "trials")
        trial = {"run.dir": folder, "run.name": name, "run.export": False, "run.save_every": None}
        trial_config = override(config, {**sample, **trial})
        make_run_dir(trial_config)
        with follow_run(trial_config, logger.warning, group=config.run.name):
            callbacks = [TuneReportCallback()]
            train_on_workers(trial_config, cluster, LOOP, status_actor=start_status_actor(), callbacks=callbacks)

    return ray.tune.Tuner(
        ray.tune.with_resources(run_trial, {"CPU": TRIAL_CPUS}),
        param_space=dict(sweep.space),
        tune_config=ray.tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            num_samples=samples,
            # The limit of TuneConfig does not apply to a search_alg, which has its own.
            search_alg=ray.tune.search.BasicVariantGenerator(max_concurrent=concurrent, random_state=config.run.seed),
        ),
        run_config=ray.tune.RunConfig(
            name="tune", storage_path=str(run_dir / "ray"), verbose=0, callbacks=[progress], log_to_file=True
        ),
    ).fit()


def _trials_that_fit(config: Config, cluster: Cluster) -> int:
    trials = (cluster.cpus - SPARE_CPUS) // cpus_needed(config.cluster, 0)
    if cluster.on_gpus:
        trials = min(trials, cluster.gpus // gpus_needed(config.cluster, 0))
    return max(1, trials)


class _Progress(ray.tune.Callback):
    """Counts finished and failed trials in the driver's process, for the display."""

    def __init__(self, samples: int) -> None:
        self.status = Status(phase="starting", total=samples)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Shows the latest held-out metrics."""
        self.status = replace(self.status, metrics=without_ties(result))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Counts the trials that have ended."""
        if trials:
            self.status = replace(self.status, phase="training", done=sum(trial.is_finished() for trial in trials))


def _row(result: Any, sweep: Sweep) -> dict[str, Any]:
    """A line of sweep.csv."""
    metrics = result.metrics or {}
    return {
        "trial": metrics.get("trial_id", Path(result.path).name),
        **{key: (result.config or {}).get(key) for key in sweep.space},
        **{key: value for key, value in metrics.items() if key.startswith("eval/") or key == "step"},
        "seconds": metrics.get("time_total_s"),
        "error": None if result.error is None else _error_line(str(result.error)),
    }


def _error_line(traceback: str) -> str:
    """The line of a trial's traceback that names the cause."""
    lines = [line.strip() for line in traceback.strip().splitlines()]
    causes = [line for line in lines if "TrainingFailed: " in line]
    return (causes or lines)[-1].rpartition("TrainingFailed: ")[2]


def _write_results(config: Config, sweep: Sweep, ranked: Rows, failed: Rows, run_dir: Path) -> Path:
    """Writes sweep.csv, best.yaml and the report; returns the report's path."""
    from dpo_ray.report.page import write_sweep_report

    rows = [*ranked, *failed]
    with (run_dir / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    if not ranked:
        raise TrainingFailed(f"all {len(failed)} trials failed; the error of the first: {failed[0]['error']}")
    sample = {key: ranked[0][key] for key in sweep.space}
    write_config(override(config, {**sample, "run.name": f"{config.run.name}-best"}), run_dir / "best.yaml")
    return write_sweep_report(run_dir, rows, sweep.metric, sweep.mode)


def _print_results(sweep: Sweep, ranked: Rows, failed: Rows, run_dir: Path, report: Path, console: Console) -> None:
    table = Table("trial", title=f"Trials by {sweep.metric}, best first", title_justify="left")
    keys = [*sweep.space, sweep.metric, TIE_BREAK, "seconds"]
    for key in keys:
        table.add_column(key, justify="right")
    for row in [*ranked, *failed]:
        table.add_row(row["trial"], *(format_number(row.get(key)) for key in keys))
    console.print(table)
    for row in failed:
        console.print(f"failed: {row['trial']}: {row['error'] or f'no finite {sweep.metric}'}")
    best = run_dir / "best.yaml"
    console.print(f"best: {best}   train it: dpo-ray offline {best}", soft_wrap=True)
    console.print(f"all:  {run_dir / 'sweep.csv'}   plots: {report}", soft_wrap=True)
