"""Values of search spaces: conditional ones, grids, quantiles; searchers and schedulers of a space's own."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, PopulationBasedTraining
from ray.tune.search import Searcher

from dpo_ray.config import Config
from dpo_ray.config.sweeps import SearchConfig
from dpo_ray.launch.sweeps.schedulers import build_scheduler, validate_length
from dpo_ray.launch.sweeps.search import build_searcher, grid, sobol
from dpo_ray.launch.sweeps.space import describe, draw, grid_points, quantile, validate_space, variants
from dpo_ray.sweep.trials import Key, Objective

OBJECTIVE = Objective("eval/loss", "min")
CONDITIONAL = {
    "loss": tune.choice([{"use": "ipo", "beta": tune.uniform(0.5, 1.0)}, {"use": "sigmoid", "beta": 0.1}]),
    "optim.lr": tune.sample_from(lambda spec: 1e-5 if spec["loss"]["use"] == "ipo" else 1e-6),
}


def test_a_function_is_known_by_its_code_and_not_by_its_place() -> None:
    first, other = tune.sample_from(lambda spec: [1e-5, {"a", "b"}]), tune.sample_from(lambda spec: [2e-5, {"a", "b"}])
    moved = tune.sample_from(
        lambda spec: [1e-5, {"a", "b"}]  # in other lines
    )
    digests = [describe({"optim.lr": domain})["optim.lr"].function for domain in (first, moved, other)]
    assert digests[0] == digests[1] != digests[2]

    def function(rate: float, *, name: Any = object()) -> Any:  # noqa: B008
        return tune.sample_from(lambda spec, rate=rate, *, name=name: rate)

    with_defaults = [describe({"optim.lr": function(rate)})["optim.lr"].function for rate in (1e-5, 1e-5, 2e-5)]
    assert with_defaults[0] == with_defaults[1] != with_defaults[2]


def first(values: Any, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(values, count))


@pytest.mark.parametrize("search", [sobol, lambda space, seed: variants(space, np.random.RandomState(seed))])
def test_a_choice_of_mappings_and_a_function_make_a_space_conditional(search: Any) -> None:
    trials = first(search(CONDITIONAL, 0), 32)
    assert {trial["loss.use"] for trial in trials} == {"ipo", "sigmoid"}
    for trial in trials:
        assert set(trial) == {"loss.use", "loss.beta", "optim.lr"}
        if trial["loss.use"] == "ipo":
            assert 0.5 <= trial["loss.beta"] <= 1.0
            assert trial["optim.lr"] == 1e-5
        else:
            assert (trial["loss.beta"], trial["optim.lr"]) == (0.1, 1e-6)


@pytest.mark.parametrize("search", [sobol, lambda space, seed: variants(space, np.random.RandomState(seed))])
def test_grid_values_take_turns(search: Any) -> None:
    space = {"loss.use": tune.grid_search(["sigmoid", "ipo", "hinge"]), "loss.beta": tune.uniform(0.1, 0.2)}
    trials = first(search(space, 0), 6)
    assert grid_points(space) == 3
    assert [trial["loss.use"] for trial in trials] == ["sigmoid", "ipo", "hinge"] * 2
    assert len({trial["loss.beta"] for trial in trials}) == 6


@pytest.mark.parametrize("search", [sobol, lambda space, seed: iter(grid(space, points=2))])
def test_domains_inside_a_mapping_are_searched_like_others(search: Any) -> None:
    space = {"loss": {"use": tune.grid_search(["sigmoid", "ipo"]), "beta": tune.uniform(0.1, 0.2), "args": {"a": 1}}}
    trials = first(search(space, 0), 4)
    assert all(trial.keys() == {"loss.use", "loss.beta", "loss.args.a"} for trial in trials)
    assert sorted(trial["loss.use"] for trial in trials) == ["ipo", "ipo", "sigmoid", "sigmoid"]
    assert all(0.1 <= trial["loss.beta"] <= 0.2 for trial in trials)


def test_functions_see_the_values_inside_a_mapping_whatever_the_search() -> None:
    space = {
        "loss": {"use": tune.grid_search(["sigmoid", "ipo"])},
        "optim.lr": tune.sample_from(lambda spec: 1e-5 if spec["loss"]["use"] == "ipo" else 1e-6),
    }
    expected = [{"loss.use": "sigmoid", "optim.lr": 1e-6}, {"loss.use": "ipo", "optim.lr": 1e-5}]
    assert first(sobol(space, 0), 2) == expected
    assert first(variants(space, np.random.RandomState(0)), 2) == expected


def test_a_grid_has_all_combinations_with_both_bounds() -> None:
    space = {"loss.beta": tune.loguniform(0.01, 1.0), "optim.warmup_steps": tune.randint(0, 3), "loss.use": "ipo"}
    trials = grid(space, points=3)
    assert len(trials) == 9
    assert sorted({trial["loss.beta"] for trial in trials}) == pytest.approx([0.01, 0.1, 1.0])
    assert {trial["optim.warmup_steps"] for trial in trials} == {0, 1, 2}
    with pytest.raises(ValueError, match=r"grid has no values for optim\.lr, which a function computes"):
        grid(CONDITIONAL, points=3)
    with pytest.raises(ValueError, match=r"grid has no values for loss, which holds further domains"):
        grid({"loss": CONDITIONAL["loss"]}, points=3)


@pytest.mark.parametrize(
    ("domain", "half", "key"),
    [
        (tune.uniform(1.0, 3.0), 2.0, Key("linear", 1.0, 3.0)),
        (tune.loguniform(0.01, 1.0), 0.1, Key("log", 0.01, 1.0)),
        (tune.quniform(0.0, 1.0, 0.25), 0.5, Key("linear", 0.0, 1.0, step=0.25)),
        (tune.randint(0, 8), 4, Key("linear", 0.0, 7.0, integer=True)),
        (tune.randn(5.0, 2.0), 5.0, Key("normal", mean=5.0, sd=2.0)),
        (tune.choice(["a", "b", "c"]), "b", Key("choice", values=("a", "b", "c"))),
    ],
)
def test_quantiles_follow_the_scale_of_a_domain(domain: Any, half: Any, key: Key) -> None:
    assert quantile(domain, 0.5) == (half if isinstance(half, str) else pytest.approx(half))
    assert describe({"k": domain}) == {"k": key}
    lowest, highest = quantile(domain, 0.0), quantile(domain, 1.0)
    samples = [draw({"k": domain}, "k", random.Random(i)) for i in range(50)]
    assert all(lowest <= sample <= highest for sample in samples)


def validate(space: dict[str, Any], **sections: Any) -> None:
    config = Config.model_validate({"model": {"path": "m"}, **sections})
    validate_space(config, space, lambda trial: None)


def test_every_value_is_checked_before_a_trial_starts() -> None:
    with pytest.raises(ValueError, match=r"a trial of the space, with {'loss.beta': 0.0}: .*loss.beta: found 0.0"):
        validate({"loss.beta": tune.grid_search([*(0.1 + i for i in range(99)), 0.0])})
    with pytest.raises(ValueError, match=r"{'optim.lr': 0.0}.*optim.lr"):
        validate({"optim.lr": tune.uniform(0.0, 1.0)})
    with pytest.raises(ValueError, match=r"the space has cluster\.train_workers, which all trials share"):
        validate({"cluster.train_workers": tune.choice([1, 2])})
    with pytest.raises(ValueError, match="the space is empty"):
        validate({})


def test_the_expensive_checks_are_made_once_for_trials_that_differ_in_numbers_only() -> None:
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "t"}})
    space = {"optim.use": tune.grid_search(["adamw", "adamw_8bit"]), "optim.lr": tune.loguniform(1e-6, 1e-4)}
    checked: list[str] = []
    validate_space(config, space, lambda trial: checked.append(trial.optim.use))
    assert checked == ["adamw", "adamw_8bit"]


def test_a_value_may_need_another_of_the_space() -> None:
    validate(
        {"loss.use": tune.grid_search([["sigmoid", "nll"]]), "loss.weights": tune.choice([[1.0, 0.1], [1.0, 1.0]])}
    )


class Counting(Searcher):
    """A searcher that proposes 1, 2, 3."""

    def __init__(self) -> None:
        super().__init__()
        self.proposed, self.results = 0, []  # type: ignore[var-annotated]

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        self.proposed += 1
        return {"loss.beta": float(self.proposed)} if self.proposed < 4 else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.results.append((trial_id, result, error))


def test_a_searcher_of_the_space_is_asked_and_told_the_results() -> None:
    own = Counting()
    searcher = build_searcher(SearchConfig(), {"loss.beta": tune.uniform(0, 9)}, own, OBJECTIVE, 0)
    values = [searcher.suggest(str(i)) for i in range(4)]
    assert values == [{"loss.beta": 1.0}, {"loss.beta": 2.0}, {"loss.beta": 3.0}, None]
    searcher.ended("0", {"step": 1, "eval/loss": 0.5}, failed=False)
    searcher.ended("1", {}, failed=True)
    assert own.results == [("0", {"step": 1, "eval/loss": 0.5}, False), ("1", None, True)]


def test_a_scheduler_of_the_space_decides() -> None:
    config = Config.model_validate({"model": {"path": "m"}})
    own = AsyncHyperBandScheduler(time_attr="step", max_t=100, grace_period=1, reduction_factor=2)
    scheduler = build_scheduler(config, {}, {}, own, OBJECTIVE, time="step", length=8)
    for name, loss in (("a", 0.1), ("b", 0.9)):
        scheduler.add(name, {})
        scheduler.started(name)
        decision = scheduler.report(name, {"step": 1, "eval/loss": loss})
        assert decision == ("continue" if name == "a" else "stop")
    for arguments, part in (({"metric": "loss", "mode": "min"}, "metric='loss'"), ({"mode": "min"}, "mode='min'")):
        other = AsyncHyperBandScheduler(time_attr="step", **arguments)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"AsyncHyperBandScheduler with {part}; leave metric and mode out"):
            build_scheduler(config, {}, {}, other, OBJECTIVE, time="step", length=8)
    with pytest.raises(ValueError, match=r"AsyncHyperBandScheduler with max_t=4, before the end of a trial at step 8"):
        validate_length(config, AsyncHyperBandScheduler(time_attr="step", max_t=4), "step", 8)
    other = AsyncHyperBandScheduler(time_attr="training_iteration")
    with pytest.raises(ValueError, match=r"time_attr='training_iteration'; trials report 'step'"):
        build_scheduler(config, {}, {}, other, OBJECTIVE, time="step", length=8)
    with pytest.raises(ValueError, match=r"PopulationBasedTraining.*sweep\.scheduler\.use: pbt"):
        build_scheduler(
            config, {}, {}, PopulationBasedTraining(hyperparam_mutations={"a": [1]}), OBJECTIVE, time="step", length=8
        )
