"""sweep.csv and sweep.json: what is written is read."""

import math
from pathlib import Path

from dpo_ray.sweep.trials import (
    Constraint,
    Key,
    Objective,
    SweepDefinition,
    Trial,
    read_definition,
    read_trials,
    write_definition,
    write_trials,
)


def test_trials_are_read_as_they_were_written(tmp_path: Path) -> None:
    trials = [
        Trial(
            "00000", {"loss.beta": 0.05, "loss.use": "ipo", "run.seed": 3}, "done", {"step": 8, "eval/loss": 0.5}, 1.5
        ),
        Trial(
            "00001",
            {"loss.use": ["sigmoid", "nll"], "loss.args.k": "12", "model.lora": None},
            "stopped",
            {"step": 4, "eval/loss": 0.75, "round": 1},
            origin="00000@4",
        ),
        Trial("00002", {"loss.beta": 1e-7}, "failed", error='ValueError: a, "b"\nsecond line'),
    ]
    write_trials(tmp_path / "sweep.csv", trials)
    assert read_trials(tmp_path / "sweep.csv") == trials
    header = (tmp_path / "sweep.csv").read_text().splitlines()[0]
    assert header == (
        "trial,status,loss.beta,loss.use,run.seed,loss.args.k,model.lora,step,eval/loss,round,seconds,origin,error"
    )


def test_a_metric_that_is_not_finite_stays_so(tmp_path: Path) -> None:
    write_trials(tmp_path / "sweep.csv", [Trial("a", {}, "failed", {"eval/loss": math.nan})])
    (trial,) = read_trials(tmp_path / "sweep.csv")
    assert math.isnan(trial.metrics["eval/loss"])


def test_the_definition_is_read_as_it_was_written(tmp_path: Path) -> None:
    definition = SweepDefinition(
        keys={
            "loss.beta": Key("log", 0.01, 0.5),
            "optim.warmup_steps": Key("linear", 0, 8, integer=True, step=2),
            "loss.use": Key("choice", values=("sigmoid", "ipo")),
        },
        objective=Objective("heldout/score", "max", Constraint("kl", 10.0)),
        scheduler={"use": "asha", "args": {"reduction_factor": 3}},
        search={"use": "random", "args": {}},
        samples=8,
        seed=7,
        time="round",
    )
    write_definition(tmp_path / "sweep.json", definition)
    assert read_definition(tmp_path / "sweep.json") == definition
