"""The run directory of a sweep, which only the same sweep continues; lengths of trials; without a cluster."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, MedianStoppingRule
from ray.tune.search import ConcurrencyLimiter, Searcher

from dpo_ray.config import Config
from dpo_ray.launch.sweep import Sweep, define
from dpo_ray.launch.sweeps.sweep_dir import open_sweep_dir
from dpo_ray.launch.sweeps.trial_dirs import Plan
from dpo_ray.sweep.trials import read_definition, write_definition

SPACE = {"loss.beta": tune.loguniform(0.01, 0.5), "loss.use": tune.choice(["sigmoid", "ipo"])}


def sweep(
    folder: Path,
    space: dict[str, Any] | None = None,
    mode: Any = "max",
    scheduler: Any = None,
    search: Any = None,
    **sections: Any,
) -> tuple[Config, Any]:
    tree = {"model": {"path": "m"}, "run": {"dir": str(folder), "name": "s"}, **sections}
    config = Config.model_validate(tree)
    return config, define(config, Sweep(space or SPACE, mode=mode, samples=4, scheduler=scheduler, search=search))


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


def test_the_digests_of_the_data_stay_until_the_data_is_prepared_again(tmp_path: Path) -> None:
    run_dir = started(tmp_path)
    file = run_dir / "sweep.json"
    write_definition(file, replace(read_definition(file), data={"data.train": "digest"}))
    assert open_sweep_dir(*sweep(tmp_path))[1].data == {"data.train": "digest"}
    assert read_definition(file).data == {"data.train": "digest"}
    (run_dir / "journal.jsonl").unlink()
    assert open_sweep_dir(*sweep(tmp_path))[1].data == {}, "it has not begun"


def test_a_definition_with_fewer_fields_continues(tmp_path: Path) -> None:
    run_dir = started(tmp_path)
    written = json.loads((run_dir / "sweep.json").read_text())
    del written["data"]
    for key in written["keys"].values():
        for name in ("mean", "sd", "function"):
            del key[name]
    (run_dir / "sweep.json").write_text(json.dumps(written))
    assert open_sweep_dir(*sweep(tmp_path))[0] == run_dir


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


def ipo(**domains: Any) -> dict[str, Any]:
    """A conditional space."""
    return {"loss": tune.choice([{"use": "ipo", **domains}, {"use": "sigmoid"}])}


def constant_rate(config: dict[str, Any]) -> float:
    return 1e-6


def other_rate(config: dict[str, Any]) -> float:
    return 1e-5


class Own(Searcher):
    """A searcher with settings, and with state that is none of them."""

    def __init__(self, seed: int, name: str = "own") -> None:
        super().__init__()
        self.seed, self._name, self.trials = seed, name, [object()]


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        (
            {"space": ipo(beta=tune.loguniform(0.01, 0.5))},
            {"space": ipo(beta=tune.loguniform(0.1, 1.0))},
            "another space, loss: .*0.01 to 0.5 .log.*; this one has .*0.1 to 1 .log",
        ),
        (
            {"space": ipo(beta=tune.choice([0.1, 0.2]))},
            {"space": ipo(beta=tune.choice([0.1, 0.3]))},
            "another space, loss: .*choice 0.1, 0.2.*; this one has .*choice 0.1, 0.3",
        ),
        (
            {"space": {"loss.beta": tune.uniform(0.1, 0.12345678)}},
            {"space": {"loss.beta": tune.uniform(0.1, 0.12345679)}},
            "loss.beta: 0.1 to 0.12345678 .linear.; this one has 0.1 to 0.12345679 .linear.",
        ),
        (
            {"space": {"loss.beta": tune.randn(0.5, 0.1)}},
            {"space": {"loss.beta": tune.randn(0.5, 0.2)}},
            "loss.beta: normal, mean 0.5, standard deviation 0.1; .* normal, mean 0.5, standard deviation 0.2",
        ),
        (
            {"space": {"optim.lr": tune.sample_from(constant_rate)}},
            {"space": {"optim.lr": tune.sample_from(other_rate)}},
            "another space, optim.lr: function [0-9a-f]+; this one has function [0-9a-f]+",
        ),
        (
            {"scheduler": ASHAScheduler(time_attr="step", grace_period=1)},
            {"scheduler": ASHAScheduler(time_attr="step", grace_period=2)},
            "another scheduler: .*'rungs': .*, this one has ",
        ),
        (
            {"scheduler": HyperBandScheduler(time_attr="step", max_t=9)},
            {"scheduler": HyperBandScheduler(time_attr="step", max_t=27)},
            "another scheduler: .*'max_t': 9.*, this one has .*'max_t': 27",
        ),
        (
            {"scheduler": MedianStoppingRule(time_attr="step", grace_period=1)},
            {"scheduler": MedianStoppingRule(time_attr="step", grace_period=2)},
            "another scheduler: .*'grace_period': 1.*, this one has .*'grace_period': 2",
        ),
        ({"search": Own(1)}, {"search": Own(2)}, "another search: .*'seed': 1.*, this one has .*'seed': 2"),
        (
            {"search": ConcurrencyLimiter(Own(1), max_concurrent=2)},
            {"search": ConcurrencyLimiter(Own(2), max_concurrent=2)},
            "another search: .*'seed': 1.*, this one has .*'seed': 2",
        ),
    ],
)
def test_a_sweep_that_differs_inside_a_domain_or_a_part_of_its_own_is_rejected_by_the_difference(
    before: dict[str, Any], after: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    started(tmp_path, **before)
    with pytest.raises(ValueError, match=f"{difference}.*; set another run.name, or remove the directory"):
        open_sweep_dir(*sweep(tmp_path, **after))


MODULE = """
import functools
import time

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from tests.unit.launch.test_sweep_dir import Own

ARGUMENTS = {
    "space": {
        "loss": tune.choice([{"use": "ipo", "beta": tune.loguniform(0.1, 1.0)}, {"use": "sigmoid"}]),
        "loss.args.a": tune.sample_from(lambda config: 1e-5 if config["loss"]["use"] == "ipo" else 1e-6),
        "loss.args.b": tune.sample_from(functools.partial(lambda factor, config: factor, 2.0)),
        "loss.args.c": tune.randn(5.0, 2.0),
    },
    "scheduler": ASHAScheduler(time_attr="step", grace_period=2),
    "search": Own(seed=1),
}
ARGUMENTS["search"].started = time.monotonic()
"""


def test_a_sweep_with_domains_and_parts_of_its_own_continues_in_another_process(tmp_path: Path) -> None:
    file = tmp_path / "space.py"
    file.write_text(MODULE)

    def arguments() -> dict[str, Any]:
        spec = importlib.util.spec_from_file_location("space", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.ARGUMENTS

    run_dir = started(tmp_path, **arguments())
    assert open_sweep_dir(*sweep(tmp_path, **arguments()))[0] == run_dir


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
