"""Which trials run on the engines of another, and which actors end with a trial; actors are stood for by names."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from dpo_ray.config import Config, override
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.rollouts.actors import PromptFile
from dpo_ray.launch.sweeps import trial_rollouts as module
from dpo_ray.launch.sweeps.trial_rollouts import TrialRollouts, engine_settings

CONFIG = Config.model_validate(
    {
        "model": {"path": "m"},
        "run": {"name": "sweep"},
        "online": {"prompts": "p.jsonl", "rounds": 1, "judge": {"use": "length"}},
    }
)


@pytest.mark.parametrize(
    "values",
    [
        {"loss.beta": 0.3, "optim.lr": 1e-5, "run.seed": 7},
        {"online.sampling.temperature": 0.5, "online.candidates": 4, "online.judge": {"use": "sentiment"}},
        {"run.name": "another", "reference.refresh": "round"},
    ],
)
def test_trials_that_differ_in_training_sampling_or_judging_share_engines(values: dict[str, Any]) -> None:
    assert engine_settings(override(CONFIG, values)) == engine_settings(CONFIG)


@pytest.mark.parametrize(
    "values",
    [
        {"online.max_lag": 1},
        {"online.sampling.max_tokens": CONFIG.online.sampling.max_tokens + 1},  # type: ignore[union-attr]
        {"online.engine.kv_cache_gib": 1.5},
        {"model.dtype": "float32"},
        {"online.engine_timeout_s": 17.0},
    ],
)
def test_trials_that_need_other_engines_have_other_settings(values: dict[str, Any]) -> None:
    assert engine_settings(override(CONFIG, values)) != engine_settings(CONFIG)


class Fleet:
    """Stands for the handle of a FleetActor; a call of ``reset`` is an answer of ``answers``."""

    def __init__(self, name: str, answers: list[Exception | None]) -> None:
        self.name, self.answers, self.reset = name, answers, self

    def remote(self) -> Exception | None:
        return self.answers.pop(0) if self.answers else None


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is started and ended."""
    events: list[str] = []

    @contextlib.contextmanager
    def fleet_actor(config: Config, cluster: Cluster) -> Iterator[Fleet]:
        fleet = Fleet(f"fleet {sum('start fleet' in event for event in events)}", [])
        events.append(f"start {fleet.name} in {config.run.path.parent.name}/{config.run.path.name}")
        yield fleet
        events.append(f"end {fleet.name}")

    @contextlib.contextmanager
    def collecting_actors(config: Config, fleet: Fleet, *arguments: Any) -> Iterator[tuple[str, tuple[()]]]:
        events.append(f"start collector of {config.run.name} on {fleet.name}")
        yield "collector", ()
        events.append(f"end collector of {config.run.name}")

    def get(answer: Exception | None, timeout: float) -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(module, "fleet_actor", fleet_actor)
    monkeypatch.setattr(module, "collecting_actors", collecting_actors)
    monkeypatch.setattr(module.ray, "get", get)
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    return events


@pytest.fixture
def rollouts(tmp_path: Path) -> TrialRollouts:
    prompts = PromptFile(tmp_path / "prompts", {"judge": set(), "eval_judge": set()}, "digest", 4)
    return TrialRollouts(Cluster(gpus=0, cpus=4), tmp_path / "slots/0", prompts, None)


def trial(folder: Path, name: str, **values: Any) -> Config:
    (folder / "trials" / name).mkdir(parents=True)
    return override(CONFIG, {"run.dir": str(folder / "trials"), "run.name": name, **values})


def test_engines_that_suit_the_next_trial_stay_and_others_are_replaced(
    rollouts: TrialRollouts, events: list[str], tmp_path: Path
) -> None:
    rollouts.start_engines(CONFIG)
    rollouts.begin(trial(tmp_path, "a"))
    rollouts.end_trial()
    rollouts.begin(trial(tmp_path, "b", **{"loss.beta": 0.3}))
    rollouts.begin(trial(tmp_path, "c", **{"online.max_lag": 1}))
    rollouts.close()
    rollouts.close()
    assert events == [
        "start fleet 0 in slots/0",
        "start collector of a on fleet 0",
        "end collector of a",
        "start collector of b on fleet 0",
        "end collector of b",
        "end fleet 0",
        "start fleet 1 in slots/0",
        "start collector of c on fleet 1",
        "end collector of c",
        "end fleet 1",
    ]


@pytest.mark.parametrize(
    ("answers", "fleets"),
    [
        ([None], 1),
        ([ActorDiedError(), ActorDiedError(), None], 1),
        ([RuntimeError("no engine took over policy version 3")], 2),
        ([TimeoutError("no answer")], 2),
    ],
    ids=["answers", "restarts", "has failed", "hangs"],
)
def test_a_fleet_that_restarts_is_awaited_and_one_that_has_failed_or_hangs_is_replaced(
    rollouts: TrialRollouts, events: list[str], tmp_path: Path, answers: list[Exception | None], fleets: int
) -> None:
    first = rollouts.begin(trial(tmp_path, "a")).fleet
    first.answers.extend([None, *answers])  # the first is that of the trial's end, which nobody awaits
    rollouts.end_trial()
    second = rollouts.begin(trial(tmp_path, "b")).fleet
    assert (second is first) == (fleets == 1)
    assert sum("start fleet" in event for event in events) == fleets


def test_prompts_that_lack_a_column_of_the_trials_judge_fail_it_and_leave_the_engines(
    rollouts: TrialRollouts, events: list[str], tmp_path: Path
) -> None:
    first = rollouts.begin(trial(tmp_path, "a")).fleet
    exact = {"use": "exact"}
    with pytest.raises(ValueError, match=r"online.prompts: judge 'exact' needs the column"):
        rollouts.begin(trial(tmp_path, "b", **{"online.judge": exact}))
    assert rollouts.begin(trial(tmp_path, "c")).fleet is first
    assert [event for event in events if "collector" in event] == [
        "start collector of a on fleet 0",
        "end collector of a",
        "start collector of c on fleet 0",
    ]
