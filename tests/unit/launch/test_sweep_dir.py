"""The run directory of a sweep, which only the same sweep continues; lengths of trials; without a cluster."""

from pathlib import Path
from typing import Any

import pytest
from ray import tune

from dpo_ray.config import Config
from dpo_ray.launch.sweep import Sweep, define
from dpo_ray.launch.sweeps.driver import Plan, open_sweep_dir
from dpo_ray.sweep.trials import read_definition

SPACE = {"loss.beta": tune.loguniform(0.01, 0.5), "loss.use": tune.choice(["sigmoid", "ipo"])}


def sweep(folder: Path, space: dict[str, Any] | None = None, mode: Any = "max", **sections: Any) -> tuple[Config, Any]:
    tree = {"model": {"path": "m"}, "run": {"dir": str(folder), "name": "s"}, **sections}
    config = Config.model_validate(tree)
    return config, define(config, Sweep(space=space or SPACE, mode=mode, samples=4))


def started(folder: Path, **sections: Any) -> Path:
    """The directory of a sweep that has begun."""
    run_dir, _ = open_sweep_dir(*sweep(folder, **sections))
    (run_dir / "journal.jsonl").touch()
    return run_dir


def run_section(folder: Path, **keys: Any) -> dict[str, Any]:
    return {"run": {"dir": str(folder), "name": "s", **keys}}


def test_the_same_sweep_continues_with_other_workers_and_more_samples(tmp_path: Path) -> None:
    run_dir = started(tmp_path)
    more = {"sweep": {"samples": 9, "concurrent": 3}, "cluster": {"max_restarts": 7}}
    assert open_sweep_dir(*sweep(tmp_path, **more))[0] == run_dir
    assert read_definition(run_dir / "sweep.json").samples == 9


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"space": {"loss.beta": SPACE["loss.beta"]}}, "another space, loss.use: .* this one has no such key"),
        ({"space": SPACE | {"loss.beta": tune.loguniform(0.01, 0.4)}}, "another space, loss.beta: .*0.5.* has .*0.4"),
        ({"mode": "min"}, "another objective: .*'max'.*, this one has .*'min'"),
        ({"sweep": {"scheduler": {"use": "asha"}}}, "another scheduler: .*none.*, this one has .*asha"),
        ({"sweep": {"search": {"use": "sobol"}}}, "another search: .*random.*, this one has .*sobol"),
        ({"optim": {"pairs_per_step": 8}}, "optim.pairs_per_step: 32, this one has 8"),
        ({"loss": {"args": {"label_smoothing": 0.2}}}, "loss.args.label_smoothing: .no such key., this one has 0.2"),
    ],
)
def test_another_sweep_of_the_same_name_is_rejected_by_its_difference(
    change: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    started(tmp_path)
    with pytest.raises(ValueError, match=difference):
        open_sweep_dir(*sweep(tmp_path, **change))


def test_another_seed_is_rejected(tmp_path: Path) -> None:
    started(tmp_path)
    with pytest.raises(ValueError, match="another seed: 0, this one has 1"):
        open_sweep_dir(*sweep(tmp_path, **run_section(tmp_path, seed=1)))


def test_a_population_cannot_grow(tmp_path: Path) -> None:
    pbt = {"sweep": {"scheduler": {"use": "pbt"}}}
    started(tmp_path, **pbt)
    pbt["sweep"]["samples"] = 9  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"sweep\.samples is 9, and .* was started with 4: .*pbt compares trials"):
        open_sweep_dir(*sweep(tmp_path, **pbt))


def test_a_grid_has_as_many_trials_as_combinations_unless_fewer_are_asked_for(tmp_path: Path) -> None:
    for samples, expected in ((None, 10), (6, 6), (99, 10)):
        settings = {"search": {"use": "grid", "args": {"points": 5}}, "samples": samples}
        assert sweep(tmp_path, sweep=settings)[1].samples == expected


def test_the_length_of_a_trial_follows_its_own_settings(tmp_path: Path) -> None:
    config, definition = sweep(tmp_path, **run_section(tmp_path, epochs=2))
    plan = Plan(config, SPACE, None, None, definition, pairs=100, concurrent=1)
    assert plan.length(config) == 8, "two epochs of 32, 32, 32 and 4 pairs"
    assert plan.length(sweep(tmp_path, optim={"pairs_per_step": 10})[0]) == 10
    assert plan.length(sweep(tmp_path, **run_section(tmp_path, steps=7))[0]) == 7
