"""What trials take over from others, and what is left of those that have ended."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Config
from dpo_ray.launch.sweep import Sweep, define
from dpo_ray.launch.sweeps.trial_dirs import Plan, TrialDirs
from dpo_ray.sweep.conductor import Phase, Progress
from dpo_ray.train.checkpoint_files import MARKER

ONLINE = {"prompts": "p.jsonl", "eval_prompts": "e.jsonl", "rounds": 3, "judge": {"use": "length"}}


def trial_dirs(folder: Path, *, pauses: bool = False, **sections: Any) -> TrialDirs:
    tree = {"model": {"path": "m"}, "run": {"dir": str(folder), "name": "sweep", "eval_every": 2}, **sections}
    config = Config.model_validate(tree)
    sweep = Sweep({"loss.beta": 0.1})
    plan = Plan(config, sweep.space, None, None, define(config, sweep), pairs=160, concurrent=1)
    return TrialDirs(plan, folder / "sweep", pauses=pauses, held_out=2)


def save(folder: Path, step: int, *, finished: bool = True) -> Path:
    checkpoint = folder / "checkpoints" / f"{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text(f"of step {step}")
    if finished:
        (checkpoint / MARKER).write_text(json.dumps({"files": {}, "metrics": {}, "config": {}}))
    return checkpoint


def test_a_trial_is_evaluated_where_the_scheduler_decides_and_saved_at_its_end_only_if_that_pauses_it(
    tmp_path: Path,
) -> None:
    alone = trial_dirs(tmp_path).config(Progress("00000", {"loss.beta": 0.3}))
    assert (alone.loss.beta, alone.run.path) == (0.3, tmp_path / "sweep/trials/00000")
    assert (alone.run.eval_at, alone.run.save_last) == ((2, 4), False), "160 pairs are five steps of 32"
    assert trial_dirs(tmp_path, pauses=True).config(Progress("00000", {})).run.save_last


def test_an_online_trial_is_evaluated_before_it_is_trained_and_waits_for_evaluations_after_which_it_may_pause(
    tmp_path: Path,
) -> None:
    online = trial_dirs(tmp_path, online=ONLINE).config(Progress("00000", {}))
    assert (online.run.eval_at, online.run.best_metric) == ((0, 2), None)
    pausing = trial_dirs(tmp_path, online=ONLINE, pauses=True).config(Progress("00000", {}))
    assert pausing.run.best_metric == "heldout/score"


def test_a_clone_has_the_newest_finished_checkpoint_of_its_donor_and_none_of_its_own(tmp_path: Path) -> None:
    dirs = trial_dirs(tmp_path)
    donor, clone = dirs.folder / "00000", dirs.folder / "00001"
    for step, finished in ((2, True), (4, True), (6, False)):
        save(donor, step, finished=finished)
    save(clone, 8)
    (clone / "config.yaml").write_text("of the values before")
    assert (dirs.saved("00000"), dirs.saved("00001"), dirs.saved("00002")) == (4, 8, -1)
    assert dirs.clone("00001", "00000") == 4
    assert [path.name for path in (clone / "checkpoints").iterdir()] == ["000004"]
    assert (clone / "checkpoints/000004/weights").read_text() == "of step 4"
    assert not (clone / "config.yaml").exists(), "another configuration could not continue it"


@pytest.mark.parametrize(
    ("phase", "kept"),
    [("done", False), ("stopped", False), ("failed", False), ("running", True), ("paused", True), ("waiting", True)],
)
def test_only_the_checkpoints_of_trials_that_have_ended_are_deleted(phase: Phase, kept: bool, tmp_path: Path) -> None:
    dirs = trial_dirs(tmp_path)
    checkpoint = save(dirs.folder / "00000", 2)
    (dirs.folder / "00000/metrics.jsonl").touch()
    dirs.clean([Progress("00000", {}, phase=phase)])
    assert checkpoint.exists() is kept
    assert (dirs.folder / "00000/metrics.jsonl").exists()
