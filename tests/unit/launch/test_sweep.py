"""Search spaces by name, and their check against a configuration; without a cluster."""

import io
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from ray import tune
from rich.console import Console

from dpo_ray.config import Config
from dpo_ray.config.losses import LOSSES, REFERENCE_FREE_LOSSES
from dpo_ray.launch import sweep as module
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.command import TrainingFailed
from dpo_ray.launch.sweep import (
    Sweep,
    _concurrent,
    _trials_that_fit,
    _validate_metrics,
    _validate_sweep,
    define,
    load_sweep,
)
from dpo_ray.sweep.trials import Trial, read_definition

ONLINE = {"prompts": "p.jsonl", "eval_prompts": "e.jsonl"}


def test_every_space_loads_and_an_unknown_one_is_rejected_with_the_known_names() -> None:
    assert "loss.beta" in load_sweep("beta_lr").space
    with pytest.raises(ValueError, match=r"beta_rl.*beta_lr"):
        load_sweep("beta_rl")


def validate(folder: Path, model: Path, space: dict[str, Any], **sections: Any) -> None:
    """Check a space against a configuration."""
    (folder / "pairs.jsonl").touch()
    data = {"train": str(folder / "pairs.jsonl"), "eval": str(folder / "pairs.jsonl")}
    config = Config.model_validate({"model": {"path": str(model)}, "data": data, **sections})
    _validate_sweep(config, Sweep(space=space, metric="eval/loss", mode="min", samples=2))


def test_a_space_may_vary_arguments_of_components_and_absent_sections(tmp_path: Path, tiny_model: Path) -> None:
    gamma = {"loss.args.gamma": tune.choice([0.3, 0.9]), "loss.beta": tune.uniform(2.0, 3.0)}
    validate(tmp_path, tiny_model, gamma, loss={"use": "simpo"})
    validate(tmp_path, tiny_model, {"model.lora.rank": tune.choice([2, 4]), "optim.lr": tune.grid_search([1e-5, 1e-4])})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"loss.betta": tune.uniform(0, 1)}, "loss.betta"),
        ({"loss.args.copy": tune.choice([1])}, "copy"),
        ({"optim.lr": tune.choice([-1.0])}, "optim.lr"),
    ],
)
def test_a_space_with_a_wrong_key_argument_or_value_is_rejected(
    space: dict[str, Any], message: str, tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        validate(tmp_path, tiny_model, space)


@pytest.mark.parametrize(
    ("cluster", "size", "online", "trials"),
    [
        (Cluster(gpus=0, cpus=10), {"train_workers": 2}, None, 4),
        (Cluster(gpus=0, cpus=10), {"cpus_per_worker": 3}, {}, 2),
        (Cluster(gpus=0, cpus=2), {"train_workers": 2}, None, 1),
        (Cluster(gpus=8, cpus=64), {"train_workers": 2}, None, 4),
        (Cluster(gpus=8, cpus=64), {"gpus_per_engine": 2}, {}, 2),
        (Cluster(gpus=8, cpus=64), {"colocate": True}, {}, 8),
        (Cluster(gpus=8, cpus=64), {}, {"judge": {"num_gpus": 1}}, 2),
        (Cluster(gpus=8, cpus=64), {}, {"judge": {"num_gpus": 0.5}}, 3),
        (Cluster(gpus=8, cpus=64), {}, {"judge": {"num_gpus": 0.6}}, 2),
        (Cluster(gpus=8, cpus=64), {}, {"judge": {"num_gpus": 1}, "eval_judge": {"num_gpus": 1, "replicas": 2}}, 1),
    ],
)
def test_a_trial_takes_the_cpus_and_gpus_of_its_workers_engines_and_judges(
    cluster: Cluster, size: dict[str, Any], online: dict[str, Any] | None, trials: int
) -> None:
    sections = {"cluster": size, "online": None if online is None else ONLINE | online}
    assert _trials_that_fit(Config.model_validate({"model": {"path": "m"}, **sections}), cluster) == trials


def test_more_concurrent_trials_than_the_cluster_holds_are_rejected_with_their_number() -> None:
    def concurrent(cluster: Cluster, asked: int | None, samples: int = 16, **size: int) -> int:
        sections: dict[str, Any] = {"cluster": size, "sweep": {"concurrent": asked}}
        return _concurrent(Config.model_validate({"model": {"path": "m"}, **sections}), cluster, samples)

    eight, cards = Cluster(gpus=0, cpus=8), Cluster(gpus=4, cpus=64)
    assert [concurrent(eight, asked) for asked in (None, 3, 8)] == [6, 3, 8]
    assert concurrent(eight, 20, samples=5) == 5
    assert concurrent(cards, 2, train_workers=2) == 2
    with pytest.raises(ValueError, match=r"sweep.concurrent is 9; the cluster's 8 CPUs hold 8 trials of cluster.\* at"):
        concurrent(eight, 9)
    with pytest.raises(ValueError, match=r"the cluster's 64 CPUs and 4 GPUs hold 2 trials"):
        concurrent(cards, 3, train_workers=2)


def validate_metrics(
    metric: str | None, constraint: str | None = None, space: dict[str, Any] | None = None, **sections: Any
) -> None:
    """Check the metrics of a sweep against the evaluations of its trials."""
    bound = {"constraint": {"metric": constraint, "max": 1.0}} if constraint else {}
    config = Config.model_validate({"model": {"path": "m"}, "sweep": bound, **sections})
    sweep = Sweep(space=space or {"loss.beta": tune.uniform(0.1, 0.2)}, metric=metric, samples=2)
    _validate_metrics(config, sweep, define(config, sweep).objective)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metric": "eval/accuracy"},
            r"Sweep\.metric is 'eval/accuracy'; .* have eval/loss, .*eval/rewards/accuracies, .*, eval/drift",
        ),
        ({"metric": None, "constraint": "eval/drfit"}, r"sweep\.constraint\.metric is 'eval/drfit'; .* eval/drift"),
        ({"metric": None, "constraint": "kl"}, r"sweep\.constraint\.metric is 'kl'; .*eval/drift"),
        ({"metric": "eval/loss", "online": ONLINE}, r"Sweep\.metric is 'eval/loss'; .* have heldout/score, .*, kl"),
        (
            {"metric": None, "constraint": "kl", "online": ONLINE, "reference": {"refresh": "round"}},
            r"sweep\.constraint\.metric is 'kl'; .* have heldout/score, heldout/win_rate: .* reference",
        ),
        (
            {"metric": None, "constraint": "kl", "online": ONLINE, "loss": {"use": "simpo"}},
            r"sweep\.constraint\.metric is 'kl'; .* have heldout/score, heldout/win_rate: .* reference",
        ),
        (
            {"metric": None, "constraint": "eval/drift", "space": {"loss.use": tune.choice(["simpo", "orpo"])}},
            r"sweep\.constraint\.metric is 'eval/drift'; .*: .* reference",
        ),
    ],
)
def test_a_metric_that_no_evaluation_has_is_rejected_with_those_they_have(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        validate_metrics(**arguments)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_default_metric_is_accepted_with_every_loss_and_the_distance_from_a_reference_where_one_is(
    loss: str,
) -> None:
    drift = None if loss in REFERENCE_FREE_LOSSES else "eval/drift"
    validate_metrics("eval/rewards/accuracies", drift, loss={"use": loss})


def test_a_metric_that_some_trials_have_is_accepted() -> None:
    space = {"loss.use": tune.choice(["ipo", "simpo"])}
    validate_metrics(None, "eval/drift", space, loss={"use": "simpo"})
    validate_metrics("heldout/win_rate", "kl", space, online=ONLINE)
    validate_metrics("heldout/score", "heldout/judge_cost_usd", space, online=ONLINE)
    validate_metrics(None, "kl", online=ONLINE, model={"path": "m", "lora": {}}, reference={"refresh": 2})


class Finished:
    """Stands for the driver of a sweep whose trials have ended."""

    trials: ClassVar[list[Trial]] = []

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def run(self) -> None: ...


def finish(trials: list[Trial], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """Ends a sweep with trials and a constraint on the drift; returns its directory and what it printed."""
    monkeypatch.setattr(module, "_prepare", lambda *arguments: (8, [], [], {"data.train": "digest"}))
    monkeypatch.setattr(module, "Driver", type("Driver", (Finished,), {"trials": trials}))
    constraint = {"metric": "eval/drift", "max": 10}
    config = Config.model_validate(
        {"model": {"path": "m"}, "run": {"dir": str(folder), "name": "s"}, "sweep": {"constraint": constraint}}
    )
    sweep, output = Sweep(space={"loss.beta": tune.uniform(0.1, 0.2)}, samples=2), io.StringIO()
    console = Console(file=output, width=200)
    try:
        module._run_exclusively(config, Cluster(gpus=0, cpus=2), sweep, define(config, sweep), console)
    except TrainingFailed as error:
        output.write(f"error: {error}")
    return config.run.path, output.getvalue()


def ended(name: str, drift: float) -> Trial:
    metrics = {"step": 8, "eval/rewards/accuracies": 0.5, "eval/drift": drift}
    return Trial(name, {"loss.beta": drift / 100}, "done", metrics, 10.0)


def test_a_sweep_in_which_no_trial_can_win_writes_table_and_report_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, output = finish([ended("00000", 30.0), ended("00001", 12.3)], tmp_path, monkeypatch)
    sentence = "No trial meets eval/drift ≤ 10; the smallest is 12.3 (trial 00001)."
    assert output.count(sentence) == 2, "the verdict and the error"
    assert f"error: {sentence}" in output
    assert "Trials by eval/rewards/accuracies, best first" in output
    assert "best.yaml" not in output
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert sentence in page
    assert 'http-equiv="refresh"' not in page
    assert not (run_dir / "best.yaml").exists()


def test_a_sweep_with_a_winner_writes_its_configuration_and_the_digests_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, output = finish([ended("00000", 30.0), ended("00001", 2.0)], tmp_path, monkeypatch)
    assert "error" not in output
    assert yaml.safe_load((run_dir / "best.yaml").read_text())["loss"]["beta"] == 0.02
    assert read_definition(run_dir / "sweep.json").data == {"data.train": "digest"}


def test_a_sweep_of_failed_trials_ends_with_their_cause_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = [Trial(f"0000{i}", {"loss.beta": i / 10}, "failed", error="out of memory") for i in range(2)]
    run_dir, output = finish(failed, tmp_path, monkeypatch)
    assert output.endswith("error: all 2 trials failed; first error: out of memory")
    assert "out of memory" in (run_dir / "report.html").read_text(encoding="utf-8")
