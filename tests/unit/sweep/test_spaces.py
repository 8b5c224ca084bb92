"""Every built-in search space: all of its values make a valid trial."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tune_spaces
from dpo_ray.config import Config, override
from dpo_ray.launch.offline import validate_offline
from dpo_ray.launch.online import validate_online
from dpo_ray.launch.sweep import load_sweep
from dpo_ray.launch.sweeps.space import flatten, validate_space, variants
from dpo_ray.objective.losses import LOSSES
from dpo_ray.sweep.spaces import find_space

SPACES = ("beta_lr", "lora_rank", "loss_family", "online", "seeds")


def base(name: str, folder: Path, model: Path) -> Config:
    """A configuration that the space applies to."""
    file = folder / "pairs.jsonl"
    file.touch()
    config: dict[str, Any] = {"model": {"path": str(model)}}
    if name == "online":
        online = {"prompts": str(file), "eval_prompts": str(file), "judge": {"use": "length"}}
        return Config.model_validate(config | {"online": online})
    return Config.model_validate(config | {"data": {"train": str(file), "eval": str(file)}})


def test_the_spaces_are_those_of_the_folder_and_each_is_one_sweep_and_nothing_else() -> None:
    files = sorted(path.stem for path in Path(tune_spaces.__path__[0]).glob("*.py") if path.stem != "__init__")
    assert files == sorted(SPACES)
    for name in SPACES:
        text = Path(tune_spaces.__path__[0], f"{name}.py").read_text()
        assert text.count("\nSWEEP = Sweep(") == 1
        assert "def " not in text
        assert find_space(name) == f"tune_spaces.{name}"


@pytest.mark.parametrize("name", SPACES)
def test_every_value_of_a_space_is_accepted_by_the_schema(name: str, tmp_path: Path, tiny_model: Path) -> None:
    sweep, config = load_sweep(name), base(name, tmp_path, tiny_model)
    validate_space(config, sweep.space, validate_online if name == "online" else validate_offline)
    trials = list(itertools.islice(variants(sweep.space, np.random.RandomState(0)), 50))
    for values in trials:
        parsed = override(config, values).model_dump(mode="json")
        for key, value in values.items():
            node: Any = parsed
            for part in key.split("."):
                node = node[part]
            assert node == value, key
    assert len({repr(values) for values in trials}) > 40, "trials differ"


def test_seeds_are_drawn_once_each_and_more_samples_add_seeds() -> None:
    seeds = [v["run.seed"] for v in itertools.islice(variants(load_sweep("seeds").space, np.random.RandomState(0)), 8)]
    assert seeds == list(range(8))


def test_all_losses_of_the_family_are_in_the_space_with_their_own_beta() -> None:
    choices = load_sweep("loss_family").space["loss"].categories
    assert len({choice["use"] for choice in choices}) == len(choices) == 6
    assert {choice["use"] for choice in choices} < set(LOSSES)
    ranges = {choice["use"]: (choice["beta"].lower, choice["beta"].upper) for choice in choices}
    assert ranges["sigmoid_norm"] == (1.0, 10.0), "log-ratios per token are smaller than their sums"


def test_adapters_are_scaled_alike_at_every_rank() -> None:
    choices = [flatten({"model.lora": choice}) for choice in load_sweep("lora_rank").space["model.lora"].categories]
    assert {choice["model.lora.alpha"] / choice["model.lora.rank"] for choice in choices} == {2.0}
