"""The run directories of a sweep's trials: their configurations, and what one takes over from another."""

import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ray.config import Config, override
from dpo_ray.launch.run_dir import make_run_dir
from dpo_ray.launch.sweeps.schedulers import rungs
from dpo_ray.launch.sweeps.space import Space
from dpo_ray.rollout.evaluation import EvaluationStore
from dpo_ray.storage import atomic_folder
from dpo_ray.sweep.conductor import Progress
from dpo_ray.sweep.trials import ENDED, SweepDefinition
from dpo_ray.train.checkpoint_files import finished_checkpoints


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides the course of a sweep."""

    config: Config
    space: Space
    scheduler: Any
    search: Any
    """Scheduler and searcher that the space brings; None for those of the configuration."""
    definition: SweepDefinition
    pairs: int
    """Training pairs of the configuration; 0 online."""
    concurrent: int
    """Slots."""

    def length(self, config: Config) -> int:
        """Length of a trial, in steps or rounds."""
        if config.online is not None:
            return config.online.rounds
        steps = math.ceil(self.pairs / config.optim.pairs_per_step)
        return config.run.steps or max(1, round(config.run.epochs * steps))


class TrialDirs:
    """``trials/`` of a sweep.

    Args:
        pauses: True if the scheduler pauses trials, which then save their state.
        held_out: held-out prompts; online only.
    """

    def __init__(self, plan: Plan, run_dir: Path, *, pauses: bool, held_out: int) -> None:
        self.plan, self.folder, self.pauses, self.held_out = plan, run_dir / "trials", pauses, held_out
        self.cleaned: set[str] = set()
        """Ended trials whose checkpoints are deleted."""

    def make(self, progress: Progress, others: Sequence[Progress]) -> Config:
        """Creates the directory of a trial, with the evaluation of the untrained policy if another has the same.

        Raises:
            ValueError: the values of the trial are invalid, or its directory is that of another configuration.
        """
        config = self.config(progress)
        make_run_dir(config)
        if config.online is not None:
            self._share_evaluation(config, others)
        return config

    def config(self, progress: Progress) -> Config:
        """The configuration of a trial: evaluated where the scheduler decides, saved where it pauses."""
        config = override(self.plan.config, progress.values)
        of_trial: dict[str, Any] = {
            "run.dir": str(self.folder),
            "run.name": progress.name,
            "run.export": False,
            "run.save_last": False,
            "run.keep_checkpoints": 1,
            "run.best_metric": None,
            "run.eval_at": list(rungs(config, self.plan.length(config))),
            "sweep": {},
        }
        if config.online is not None:
            of_trial["run.eval_at"] = [0, *of_trial["run.eval_at"]]
        if self.pauses:
            of_trial["run.save_last"] = True  # also where it pauses
            if config.online is not None and not config.cluster.colocate:
                # Training then waits for the evaluation of a round, and pauses right after it.
                of_trial["run.best_metric"] = self.plan.definition.objective.metric
        return override(config, of_trial)

    def clone(self, trial: str, donor: str) -> int:
        """Copies the newest checkpoint of ``donor``; the optimizer's state comes with it. Returns its step."""
        newest = finished_checkpoints(self.folder / donor / "checkpoints")[-1]
        folder = self.folder / trial / "checkpoints"
        # It has values of the donor, with which the trial's own work could not be continued.
        (self.folder / trial / "config.yaml").unlink(missing_ok=True)
        with atomic_folder(folder, replace=True) as draft:
            shutil.copytree(newest, draft / newest.name)
        return int(newest.name)

    def saved(self, trial: str) -> int:
        """The position of the newest checkpoint of a trial; -1 without one."""
        finished = finished_checkpoints(self.folder / trial / "checkpoints")
        return int(finished[-1].name) if finished else -1

    def clean(self, trials: Collection[Progress]) -> None:
        """Deletes the checkpoints of those that have ended: nothing continues from them."""
        for name in [trial.name for trial in trials if trial.phase in ENDED and trial.name not in self.cleaned]:
            checkpoints = self.folder / name / "checkpoints"
            shutil.rmtree(checkpoints, ignore_errors=True)
            if not checkpoints.exists():
                self.cleaned.add(name)

    def _share_evaluation(self, config: Config, others: Sequence[Progress]) -> None:
        evaluations = EvaluationStore(config.run.path)
        if evaluations.recorded(0):
            return
        for other in others:
            earlier = EvaluationStore(self.folder / other.name)
            same = _untrained(override(self.plan.config, other.values)) == _untrained(config)
            if same and earlier.complete(0, self.held_out):
                evaluations.copy(earlier, 0)
                return


def _untrained(config: Config) -> tuple[Any, ...]:
    """All that decides how the untrained policy is evaluated online."""
    return config.model, config.data, config.online, config.reference_kind, config.run.seed
