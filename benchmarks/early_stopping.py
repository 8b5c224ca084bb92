"""Share of sweeps in which early stopping ends the best trial, from replays of a sweep that stopped none.

    dpo-ray sweep CONFIG SPACE run.name=full sweep.samples=20 run.eval_every=2
    python -m benchmarks.early_stopping runs/full --trials 8 --scheduler asha --args '{"reduction_factor": 4}'

Each replay is a sweep of some of the trials in a random order, one after another, that ends each as the scheduler
decides on its recorded evaluations. The learning curve of a trial does not depend on the others.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from dpo_ray.config import Config, override
from dpo_ray.launch.sweeps.schedulers import build_scheduler, rungs
from dpo_ray.sweep.journal import Journal
from dpo_ray.sweep.ranking import rank
from dpo_ray.sweep.scheduling import Decision
from dpo_ray.sweep.trials import SweepDefinition, Trial, read_definition, read_trials
from dpo_ray.types import Metrics


class Replay(NamedTuple):
    """One replayed sweep."""

    best_stopped: bool
    """True if the best trial was stopped."""
    steps: float
    """Steps of its trials, as a share of those of trials that all run to the end."""
    regret: float
    """Difference of the metric between the best trial and the best one that ran to the end."""


def main() -> None:
    """Print the outcome of all replays as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory of a finished sweep with sweep.scheduler.use: none")
    parser.add_argument("--trials", type=int, default=8, help="trials of each replay")
    parser.add_argument("--draws", type=int, default=1000, help="replays")
    parser.add_argument("--scheduler", default="asha", choices=("asha", "halving", "median"))
    parser.add_argument("--args", default="{}", help="its arguments, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.run / "sweep.json").exists():
        raise SystemExit(f"{arguments.run} is not the directory of a sweep: it has no sweep.json")
    definition = read_definition(arguments.run / "sweep.json")
    curves = read_curves(arguments.run)
    trials = rank(read_trials(arguments.run / "sweep.csv"), definition.objective).ranked
    if len({trial.metrics[definition.time] for trial in trials}) > 1 or {trial.status for trial in trials} != {"done"}:
        raise SystemExit(f"{arguments.run} has trials of different length, or some that were stopped")
    if len(trials) < arguments.trials:
        raise SystemExit(f"{arguments.run} has {len(trials)} finished trials; --trials is {arguments.trials}")
    saved = Config.model_validate(yaml.safe_load((arguments.run / "config.yaml").read_text(encoding="utf-8")))
    scheduler = {"use": arguments.scheduler, "args": json.loads(arguments.args)}
    config = override(saved, {"sweep.scheduler": scheduler})
    draw = random.Random(arguments.seed)
    replays = [
        replay(config, definition, draw.sample(trials, arguments.trials), curves) for _ in range(arguments.draws)
    ]
    kept = sum(not each.best_stopped for each in replays) / len(replays)
    steps = sum(each.steps for each in replays) / len(replays)
    reached = sum(each.regret == 0 for each in replays) / len(replays)
    regret = sum(each.regret for each in replays) / len(replays)
    print(f"{arguments.draws} draws of {arguments.trials} of {len(trials)} trials, {json.dumps(scheduler)}\n")
    print(f"| best trial not stopped | its {definition.objective.metric} reached | mean difference | steps |")
    print("|--:|--:|--:|--:|")
    print(f"| {kept:.0%} | {reached:.0%} | {regret:.4f} | {steps:.0%} |")


def read_curves(run: Path) -> dict[str, list[Metrics]]:
    """The evaluations of each trial, in the order of steps."""
    curves: dict[str, list[Metrics]] = {}
    for event in Journal(run / "journal.jsonl").read():
        if "metrics" in event:
            curves.setdefault(event["trial"], []).append(event["metrics"])
    return curves


def replay(
    config: Config, definition: SweepDefinition, trials: Sequence[Trial], curves: dict[str, list[Metrics]]
) -> Replay:
    """A sweep of ``trials``, one at a time, which start in this order.

    Raises:
        SystemExit: a trial was not evaluated where the scheduler decides.
    """
    objective, time = definition.objective, definition.time
    length = max(int(curves[trial.name][-1][time]) for trial in trials)
    scheduler = build_scheduler(config, {}, definition.keys, None, objective, time=time, length=length)
    reached = {trial.name: 0 for trial in trials}
    for trial in trials:
        scheduler.add(trial.name, trial.values)
    waiting = list(reached)
    while waiting:
        name = waiting.pop(0)
        curve = {int(metrics[time]): metrics for metrics in curves[name]}
        scheduler.started(name)
        decision: Decision = "continue"
        for rung in (rung for rung in rungs(config, length) if reached[name] < rung < length):
            if rung not in curve:
                raise SystemExit(f"trial {name} has no evaluation after {time} {rung}; set run.eval_every")
            reached[name], decision = rung, scheduler.report(name, curve[rung])
            if decision != "continue":
                break
        if decision == "pause":
            scheduler.paused(name)
        elif decision == "continue":
            reached[name] = length
            scheduler.ended(name, curve[length], failed=False)
        waiting += [update.trial for update in scheduler.updates() if update.action == "resume"]
    finished = {name for name, position in reached.items() if position == length}
    ranked = rank(trials, objective).ranked
    best, found = ranked[0], next(trial for trial in ranked if trial.name in finished)
    difference = abs(best.metrics[objective.metric] - found.metrics[objective.metric])
    return Replay(best.name not in finished, sum(reached.values()) / (length * len(trials)), difference)


if __name__ == "__main__":
    main()
