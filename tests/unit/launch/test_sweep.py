"""Search spaces by name, and their check against a configuration; without a cluster."""

from pathlib import Path
from typing import Any

import pytest
from ray import tune

from dpo_ray.config import Config
from dpo_ray.launch.sweep import Sweep, _validate_sweep, load_sweep


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
