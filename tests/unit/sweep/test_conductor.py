"""The course of a sweep, driven call by call; schedulers and searchers of Ray Tune behind their adapters."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import HyperBandScheduler

from dpo_ray.config import Config, override
from dpo_ray.config.sweeps import SCHEDULERS, START_TOGETHER, HalvingArgs, PbtArgs, SearchConfig
from dpo_ray.launch.sweeps.schedulers import FromTune, build_scheduler, rungs, validate_length
from dpo_ray.launch.sweeps.search import build_searcher
from dpo_ray.launch.sweeps.space import describe
from dpo_ray.sweep.conductor import Conductor
from dpo_ray.sweep.halving import Halving
from dpo_ray.sweep.journal import Journal
from dpo_ray.sweep.population import Population
from dpo_ray.sweep.scheduling import RunToEnd, Scheduler, Update
from dpo_ray.sweep.trials import Constraint, Key, Objective

SPACE = {"loss.beta": tune.loguniform(0.01, 0.5), "optim.lr": tune.loguniform(1e-6, 5e-5)}
LOSS = Objective("eval/loss", "min")
STEPS = 9


def config(**sweep: Any) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "run": {"seed": 3, "eval_every": 1}, "sweep": sweep})


def conductor(
    file: Path,
    scheduler: Scheduler | str = "none",
    *,
    search: str = "random",
    samples: int = 6,
    cloned: Callable[[str, str], None] = lambda trial, donor: None,
    saved: int = -1,
) -> Conductor:
    """A sweep whose journal is ``file``; it continues one that is there."""

    def clone(trial: str, donor: str) -> int:
        cloned(trial, donor)
        return max(sweep.progress[donor].decisions)

    settings = config(scheduler={"use": scheduler} if isinstance(scheduler, str) else {}, search={"use": search})
    searcher = build_searcher(settings.sweep.search, SPACE, None, LOSS, settings.run.seed)
    if isinstance(scheduler, str):
        scheduler = build_scheduler(settings, SPACE, describe(SPACE), None, LOSS, time="step", length=STEPS)
    sweep = Conductor(
        Journal(file),
        searcher,
        scheduler,
        LOSS,
        samples=samples,
        time="step",
        max_deaths=1,
        clone=clone,
        saved=lambda trial: saved,
    )
    sweep.resume()
    return sweep


def loss_of(trial: Any, step: int) -> float:
    """A learning curve that depends on the values of the trial only."""
    return abs(math.log(trial.values["loss.beta"] / 0.1)) + 1 / (1 + step)


def run(sweep: Conductor, slots: int, *, seed: int = 0, calls: float = math.inf) -> Conductor:
    """Trains all trials on ``slots`` slots that take turns at random; ends after ``calls`` reports, as a kill does."""
    order, running, step = random.Random(seed), [], {}
    while not sweep.finished and calls > 0:
        while len(running) < slots and (progress := sweep.next()) is not None:
            running.append(progress)
            step.setdefault(progress.name, max(progress.decisions, default=0))
        progress = order.choice(running)
        step[progress.name] += 1
        position = step[progress.name]
        metrics = {"step": position, "eval/loss": loss_of(progress, position)}
        decision = sweep.report(progress.name, metrics, final=position == STEPS)
        calls -= 1
        if decision == "pause":
            running.remove(progress)
            sweep.paused(progress.name)
        elif decision == "stop" or position == STEPS:
            running.remove(progress)
    return sweep


def outcome(sweep: Conductor) -> list[tuple[Any, ...]]:
    return [(trial.name, dict(trial.values), trial.status, trial.metrics) for trial in sweep.trials]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("search", ["random", "sobol", "optuna"])
def test_a_sweep_killed_at_any_report_ends_like_an_undisturbed_one(scheduler: str, search: str, tmp_path: Path) -> None:
    if scheduler in START_TOGETHER and search == "optuna":
        pytest.skip("all trials start together, so that none is modeled")
    whole = run(conductor(tmp_path / "whole", scheduler, search=search), 1)
    assert all(trial.status in ("done", "stopped") for trial in whole.trials)
    reports = sum('"metrics"' in line for line in (tmp_path / "whole").read_text().splitlines())
    for kill in range(1, reports, 4):
        file = tmp_path / str(kill)
        run(conductor(file, scheduler, search=search), 1, calls=kill)
        with file.open("a") as journal:
            journal.write('{"event": "rep')  # a kill amid a write
        assert outcome(run(conductor(file, scheduler, search=search), 1)) == outcome(whole), kill


@pytest.mark.parametrize("saved", [-1, 1])
def test_a_trial_that_is_killed_between_decision_and_pause_pauses_after_all(saved: int, tmp_path: Path) -> None:
    """With its checkpoint it is paused at once; without, it repeats its last step and is told to pause again."""
    sweep = conductor(tmp_path / "journal", "pbt", samples=2)
    first = sweep.next()
    assert first is not None
    assert sweep.report(first.name, {"step": 1, "eval/loss": 0.5}, final=False) == "pause"
    resumed = conductor(tmp_path / "journal", "pbt", samples=2, saved=saved)
    trial = resumed.next()
    assert trial is not None
    if saved == 1:
        assert trial.name != first.name
        assert resumed.progress[first.name].phase == "paused"
        return
    assert trial.name == first.name
    assert resumed.report(trial.name, {"step": 1, "eval/loss": 0.5}, final=False) == "pause"
    resumed.paused(trial.name)
    assert trial.phase == "paused"


def test_the_decisions_of_a_killed_sweep_are_those_that_its_reports_give(tmp_path: Path) -> None:
    """On several slots the order of reports is that of the cluster; the state after it is not."""
    for kill in range(5, 30, 5):
        sweep = run(conductor(tmp_path / f"{kill}", "asha", samples=12), 3, seed=kill, calls=kill)
        resumed = conductor(tmp_path / f"{kill}", "asha", samples=12)
        for before, after in zip(sweep.progress.values(), resumed.progress.values(), strict=True):
            assert before.decisions == after.decisions
            assert (before.phase == after.phase) or (before.phase, after.phase) == ("running", "waiting")
        rungs_of = lambda conductor: [b._rungs for b in conductor.scheduler.scheduler._brackets]  # noqa: E731
        assert rungs_of(sweep) == rungs_of(resumed)


def test_a_decision_stays_though_another_version_of_the_scheduler_would_decide_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = run(conductor(tmp_path / "journal", "asha"), 1)
    stopped = [trial.name for trial in sweep.trials if trial.status == "stopped"]
    assert stopped
    resumed = conductor(tmp_path / "journal", RunToEnd())
    assert outcome(resumed) == outcome(sweep)
    assert f"the scheduler would continue {stopped[0]} after step" in caplog.text


def test_the_time_of_a_trial_counts_from_its_first_step_not_from_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 100))
    monkeypatch.setattr("dpo_ray.sweep.conductor.time.time", lambda: next(clock))
    sweep = conductor(tmp_path / "journal", samples=1)
    trial = sweep.next()  # added at 0, started at 100
    assert trial is not None
    sweep.begin(trial.name)  # at 200
    sweep.begin(trial.name)  # at 300, by workers that were restarted on the slot
    sweep.report(trial.name, {"step": 9, "eval/loss": 0.5}, final=True)  # at 400
    assert sweep.trials[0].seconds == 200
    assert conductor(tmp_path / "journal", samples=1).trials[0].seconds == 200


class Limited:
    """A searcher that proposes the next trial only after the one before it has ended, two in all."""

    def __init__(self) -> None:
        self.proposed, self.waits, self.exhausted = 0, False, False

    def suggest(self, trial: str) -> dict[str, Any] | None:
        if self.waits or self.proposed == 2:
            return None
        self.proposed, self.waits = self.proposed + 1, True
        return {"loss.beta": float(self.proposed)}

    def report(self, trial: str, metrics: Any) -> None: ...

    def ended(self, trial: str, metrics: Any, *, failed: bool) -> None:
        self.waits = False


def test_a_searcher_may_wait_for_results_and_a_sweep_ends_when_there_are_none_to_wait_for(tmp_path: Path) -> None:
    sweep = conductor(tmp_path / "journal", samples=5)
    sweep.searcher = Limited()
    first = sweep.next()
    assert first is not None
    assert sweep.next() is None, "no trial for a second slot yet"
    assert not sweep.exhausted
    sweep.report(first.name, {"step": 9, "eval/loss": 0.5}, final=True)
    second = sweep.next()
    assert second is not None
    assert second.values == {"loss.beta": 2.0}
    sweep.report(second.name, {"step": 9, "eval/loss": 0.5}, final=True)
    assert sweep.next() is None
    assert sweep.finished, "with 2 of 5 trials"


def test_a_population_cannot_start_with_a_searcher_that_waits_for_results(tmp_path: Path) -> None:
    sweep = conductor(tmp_path / "journal", "pbt", samples=3)
    sweep.searcher = Limited()
    with pytest.raises(ValueError, match="starts all 3 trials together, and the searcher has no values after 1"):
        sweep.next()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        (Key("linear", 4, 64, integer=True, step=4), {16: {12, 20}, 4: {4, 8}}),
        (Key("linear", 1, 8, integer=True), {1: {1, 2}, 2: {1, 3}, 8: {7, 8}}),
        (Key("linear", 0.0, 1.0, step=0.25), {0.5: {0.25, 0.75}}),
    ],
)
def test_perturbed_values_lie_on_the_steps_of_their_domain(key: Key, values: dict[float, set[float]]) -> None:
    population = Population(
        PbtArgs(resample=0.0), LOSS, {"model.lora.r": key}, lambda name, generator: 0, interval=1, time="step", seed=0
    )
    for value, neighbors in values.items():
        generator = random.Random(0)
        perturbed = {population._perturb("model.lora.r", key, value, generator) for _ in range(40)}
        assert perturbed == neighbors


def test_asha_stops_bad_trials_early_and_no_good_one(tmp_path: Path) -> None:
    sweep = run(conductor(tmp_path / "journal", "asha", samples=12), 1)
    done = [trial for trial in sweep.trials if trial.status == "done"]
    best = min(sweep.trials, key=lambda trial: loss_of(trial, STEPS))
    assert best in done
    steps = sum(trial.metrics["step"] for trial in sweep.trials)
    assert steps <= 0.6 * 12 * STEPS, "at most 60% of the steps of all trials"
    assert {trial.metrics["step"] for trial in sweep.trials if trial.status == "stopped"} <= {1, 3}, "only at rungs"


def test_halving_keeps_the_best_third_of_each_rung_whatever_the_order_of_reports(tmp_path: Path) -> None:
    """Nine trials to step 1, the best three of them to step 3, the best of those to step 9: 24 of 81 steps."""
    sweep = run(conductor(tmp_path / "a", "halving", samples=9), 1)
    ranked = sorted(sweep.trials, key=lambda trial: loss_of(trial, STEPS))
    assert [trial.metrics["step"] for trial in ranked] == [9, 3, 3, 1, 1, 1, 1, 1, 1]
    assert [trial.status for trial in ranked] == ["done"] + ["stopped"] * 8
    assert outcome(run(conductor(tmp_path / "b", "halving", samples=9), 4, seed=9)) == outcome(sweep)


def test_halving_counts_only_trials_that_are_left_and_puts_those_that_cannot_win_last(tmp_path: Path) -> None:
    bound = Objective("eval/loss", "min", Constraint("eval/drift", 10.0))
    scheduler = Halving(HalvingArgs(reduction_factor=2, keep_ties=True), bound, rungs=(2, 4, 8, 16), time="step")
    for trial in "abcd":
        scheduler.add(trial, {})

    def pause(trial: str, loss: float, drift: float = 1.0, step: int = 2) -> list[Update]:
        assert scheduler.report(trial, {"step": step, "eval/loss": loss, "eval/drift": drift}) == "pause"
        scheduler.paused(trial)
        return scheduler.updates()

    assert pause("a", 0.1, drift=11.0) == pause("b", 0.5) == pause("c", 0.4) == []
    scheduler.ended("d", {}, failed=True)
    assert scheduler.updates() == [Update("c", "resume"), Update("b", "resume"), Update("a", "stop")]
    assert pause("b", 0.2, step=4) == []
    assert pause("c", 0.2, step=4) == [Update("b", "resume"), Update("c", "resume")], "a tie"
    assert pause("b", 0.2, step=8) == []
    assert pause("c", 0.1, step=8) == [Update("c", "resume"), Update("b", "stop")]
    assert scheduler.report("c", {"step": 16, "eval/loss": 0.1, "eval/drift": 1.0}) == "continue", "it is the last"


def test_of_trials_that_tie_the_first_continue_unless_ties_are_kept() -> None:
    def decided(keep_ties: bool) -> list[str]:
        scheduler = Halving(HalvingArgs(reduction_factor=2, keep_ties=keep_ties), LOSS, rungs=(2,), time="step")
        for trial in "abcd":
            scheduler.add(trial, {})
        for trial, loss in zip("dcba", (0.1, 0.2, 0.2, 0.2), strict=True):
            scheduler.report(trial, {"step": 2, "eval/loss": loss})
            scheduler.paused(trial)
        return [f"{update.action} {update.trial}" for update in scheduler.updates()]

    assert decided(True) == ["resume d", "resume a", "resume b", "resume c"]
    assert decided(False) == ["resume d", "resume a", "stop b", "stop c"]


def test_halving_stops_all_trials_that_cannot_win_unless_there_are_no_others() -> None:
    bound = Objective("eval/loss", "min", Constraint("eval/drift", 10.0))

    def decided(*drifts: float) -> list[str]:
        scheduler = Halving(HalvingArgs(reduction_factor=2, keep_ties=True), bound, rungs=(2,), time="step")
        for trial in range(len(drifts)):
            scheduler.add(f"{trial}", {})
        for trial, drift in enumerate(drifts):
            scheduler.report(f"{trial}", {"step": 2, "eval/loss": 0.5, "eval/drift": drift})
            scheduler.paused(f"{trial}")
        return [f"{update.action} {update.trial}" for update in scheduler.updates()]

    assert decided(1.0, 11.0, 12.0, 13.0) == ["resume 0", "stop 1", "stop 2", "stop 3"]
    assert decided(14.0, 11.0, 12.0, 13.0) == ["resume 0", "resume 1", "stop 2", "stop 3"]


def test_trials_are_evaluated_where_the_scheduler_decides() -> None:
    every = Config.model_validate({"model": {"path": "m"}, "run": {"eval_every": 5}})
    assert rungs(every, 20) == (5, 10, 15, 20)
    asha = Config.model_validate(
        {"model": {"path": "m"}, "run": {"eval_every": 5}, "sweep": {"scheduler": {"use": "asha"}}}
    )
    assert rungs(asha, 50) == (5, 15, 45)
    assert rungs(override(asha, {"sweep.scheduler": {"use": "halving", "args": {"reduction_factor": 2}}}), 20) == (
        5,
        10,
    )


@pytest.mark.parametrize("scheduler", [use for use in SCHEDULERS if use != "none"])
def test_a_scheduler_that_would_decide_at_the_end_of_a_trial_only_is_rejected(scheduler: str) -> None:
    late = override(config(scheduler={"use": scheduler}), {"run.eval_every": 9})
    with pytest.raises(
        ValueError, match=rf"{scheduler} decides at .* the first one is at step 9 of 9; lower run\.eval_ev"
    ):
        validate_length(late, None, "step", 9)


@pytest.mark.parametrize(
    ("scheduler", "key"), [("halving", "grace_period"), ("asha", "grace_period"), ("pbt", "interval")]
)
def test_the_argument_that_puts_the_first_decision_behind_the_end_is_named(scheduler: str, key: str) -> None:
    late = config(scheduler={"use": scheduler, "args": {key: 9}})
    with pytest.raises(ValueError, match=rf"at step 9 of 9; lower sweep\.scheduler\.args\.{key}"):
        validate_length(late, None, "step", 9)
    validate_length(late, None, "step", 10)


def test_more_samples_add_trials_to_a_finished_sweep(tmp_path: Path) -> None:
    first = run(conductor(tmp_path / "a", samples=3), 1)
    more = run(conductor(tmp_path / "a", samples=5), 1)
    assert outcome(more)[:3] == outcome(first)
    assert outcome(more) == outcome(run(conductor(tmp_path / "b", samples=5), 1))
    added = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert [event["trial"] for event in added if event["event"] == "add"] == [f"{i:05d}" for i in range(5)]


def test_a_trial_of_which_the_metric_is_nan_has_failed_and_says_so(tmp_path: Path) -> None:
    sweep = conductor(tmp_path / "journal", samples=1)
    trial = sweep.next()
    assert trial is not None
    assert sweep.report(trial.name, {"step": 2, "eval/loss": math.nan}, final=False) == "stop"
    assert sweep.trials[0].status == "failed"
    assert sweep.trials[0].error == "eval/loss is nan after step 2"
    assert sweep.finished


@pytest.mark.parametrize("metric", ["eval/loss", "eval/drift", "eval/rewards/accuracies"])
def test_a_trial_with_a_nan_that_orders_or_excludes_trials_has_failed(metric: str, tmp_path: Path) -> None:
    """The accuracy of a diverged policy is finite: no margin is positive."""
    sweep = conductor(tmp_path / "journal", samples=1)
    sweep.objective = Objective("eval/rewards/accuracies", constraint=Constraint("eval/drift", 10.0))
    trial = sweep.next()
    assert trial is not None
    metrics = {"step": 9, "eval/rewards/accuracies": 0.5, "eval/loss": 0.7, "eval/drift": 1.0, "eval/margins": math.nan}
    assert sweep.report(trial.name, metrics | {metric: math.nan}, final=True) == "stop"
    assert (sweep.trials[0].status, sweep.trials[0].error) == ("failed", f"{metric} is nan after step 9")


def test_a_trial_that_loses_its_workers_continues_once_and_then_fails(tmp_path: Path) -> None:
    sweep = conductor(tmp_path / "journal", samples=2)
    first = sweep.next()
    assert first is not None
    assert sweep.report(first.name, {"step": 1, "eval/loss": 0.5}, final=False) == "continue"
    sweep.failed(first.name, "its worker died", retryable=True)
    assert sweep.next() is first, "before a new trial"
    assert sweep.report(first.name, {"step": 1, "eval/loss": 0.5}, final=False) == "continue", "a known report"
    sweep.failed(first.name, "its worker died", retryable=True)
    assert (first.phase, first.error) == ("failed", "its worker died")
    other = sweep.next()
    assert other is not None
    assert other is not first
    reports = [line for line in (tmp_path / "journal").read_text().splitlines() if '"report"' in line]
    assert len(reports) == 1


@pytest.mark.parametrize("search", ["random", "sobol", "grid", "optuna"])
def test_the_values_of_a_seed_are_the_same_and_within_their_bounds(search: str) -> None:
    def values(seed: int) -> Sequence[Any]:
        searcher = build_searcher(SearchConfig(use=search), SPACE, None, LOSS, seed)  # type: ignore[arg-type]
        return [searcher.suggest(str(i)) for i in range(8)]

    assert values(1) == values(1)
    assert (values(1) == values(2)) == (search == "grid")
    for trial in values(1):
        assert 0.01 <= trial["loss.beta"] <= 0.5
        assert 1e-6 <= trial["optim.lr"] <= 5e-5


def test_sobol_covers_the_space_more_evenly_than_random_samples() -> None:
    def cells(search: str) -> int:
        searcher = build_searcher(SearchConfig(use=search), SPACE, None, LOSS, 0)  # type: ignore[arg-type]
        trials = [searcher.suggest(str(i)) for i in range(16)]
        place = lambda value, low, high: int(4 * math.log(value / low) / math.log(high / low))  # noqa: E731
        return len({(place(t["loss.beta"], 0.01, 0.5), place(t["optim.lr"], 1e-6, 5e-5)) for t in trials if t})

    assert cells("sobol") == 16, "16 points, one in each of 4 x 4 cells"
    assert cells("random") < 14


def test_the_best_of_a_population_are_cloned_and_perturbed(tmp_path: Path) -> None:
    keys = {"optim.lr": Key("log", 1e-6, 5e-5)}
    copied: list[tuple[str, str]] = []

    def population() -> Population:
        args = PbtArgs(interval=3, resample=0.0)
        return Population(args, LOSS, keys, lambda name, generator: 0, interval=3, time="step", seed=0)

    sweep = run(
        conductor(tmp_path / "a", population(), samples=4, cloned=lambda trial, donor: copied.append((trial, donor))), 2
    )
    assert len(copied) == 2, "one of four at the end of each of two generations that others follow"
    final = {trial.name: trial for trial in sweep.trials}
    for trial, donor in copied[-1:]:
        ratio = final[trial].values["optim.lr"] / final[donor].values["optim.lr"]
        assert min(abs(ratio - 1.2), abs(ratio - 1 / 1.2)) < 1e-9
        assert final[trial].values["loss.beta"] == final[donor].values["loss.beta"], "not among the keys"
        assert final[trial].origin == f"{donor}@6"
    other_order = run(conductor(tmp_path / "b", population(), samples=4), 4, seed=9)
    assert outcome(other_order) == outcome(sweep), "whatever the slots and the order of reports"


def test_a_population_changes_neither_constants_nor_functions_nor_choices_of_mappings(tmp_path: Path) -> None:
    """With the default arguments, of which ``resample`` draws a quarter of the values anew."""
    space = {
        "optim.lr": tune.loguniform(1e-6, 5e-5),
        "optim.weight_decay": 0.1,
        "loss": tune.choice([{"beta": tune.uniform(0.1, 0.2), "args": {"gamma": 0.5}}]),
        "optim.warmup_steps": tune.sample_from(lambda spec: 3),
    }
    settings = config(scheduler={"use": "pbt"})
    scheduler = build_scheduler(settings, space, describe(space), None, LOSS, time="step", length=STEPS)
    assert isinstance(scheduler, Population)
    assert set(scheduler.keys) == {"optim.lr"}
    sweep = conductor(tmp_path / "journal", scheduler, samples=8)
    sweep.searcher = build_searcher(settings.sweep.search, space, None, LOSS, 0)
    run(sweep, 1)
    clones = [trial for trial in sweep.trials if trial.origin]
    assert clones
    for clone in clones:
        assert clone.values["optim.weight_decay"] == 0.1
        assert clone.values["optim.warmup_steps"] == 3
        assert 1e-6 <= clone.values["optim.lr"] <= 5e-5


@pytest.mark.parametrize(
    "space",
    [
        {"loss.beta": 0.1},
        {"loss": tune.choice([{"use": "ipo", "beta": tune.uniform(0.1, 0.2)}, {"use": "sigmoid"}])},
        {"loss.beta": tune.sample_from(lambda spec: 0.1)},
        {"loss.use": tune.choice(["ipo", "sigmoid"])},
    ],
)
def test_a_population_without_a_value_that_may_change_is_rejected(space: dict[str, Any]) -> None:
    settings = config(scheduler={"use": "pbt"})
    with pytest.raises(ValueError, match=r"^sweep.scheduler.use: pbt changes .* the space has none that may change"):
        build_scheduler(settings, space, describe(space), None, LOSS, time="step", length=STEPS)


def test_a_sweep_without_a_scheduler_runs_its_trials_in_order(tmp_path: Path) -> None:
    sweep = run(conductor(tmp_path / "journal", RunToEnd(), samples=3), 1)
    assert [trial.status for trial in sweep.trials] == ["done"] * 3
    starts = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines() if '"start"' in line]
    assert [event["trial"] for event in starts] == ["00000", "00001", "00002"]


def test_hyperband_keeps_a_bracket_while_one_of_its_trials_saves_its_state() -> None:
    scheduler = FromTune(HyperBandScheduler("step", "score", "max", max_t=9, reduction_factor=3), seed=0, pauses=True)
    for i in range(8):
        scheduler.add(f"{i}", {})
        scheduler.started(f"{i}")
    score = {"3": 0.1, "4": 0.2, "5": 0.3, "6": 0.4, "7": 0.9}

    def report(trial: str) -> str:
        return scheduler.report(trial, {"step": 3, "score": score[trial]})

    for trial in ("4", "5", "7"):
        assert report(trial) == "pause"
        scheduler.paused(trial)
    assert report("6") == "pause", "and its message that it has paused is on its way"
    assert report("3") in ("pause", "stop"), "the worst of the bracket does not run on"
    scheduler.paused("6")
