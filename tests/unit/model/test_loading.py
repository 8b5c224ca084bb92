"""Checkpoints as people have them: missing, extra and misshaped weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_ray.config.schema import ModelConfig
from dpo_ray.model.export import CheckpointWeights
from dpo_ray.model.load import build_model, head_is_tied
from dpo_ray.model.scorer import Scorer
from tests.conftest import save_tiny_model
from tests.families import save_small_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Saves an untied tiny model with changed weights."""

    def save(change: Callable[[dict[str, Any]], object]) -> Path:
        folder = save_tiny_model(tmp_path / "model", tied=False)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return save


def load(folder: Path) -> Any:
    return build_model(ModelConfig(path=str(folder)), with_weights=True)


def test_a_missing_head_is_rejected_and_never_random(checkpoint: Any) -> None:
    folder = checkpoint(lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"model\.path: '.*' lacks lm_head\.weight, which would be random"):
        load(folder)


def test_missing_layers_are_rejected_with_their_number(checkpoint: Any) -> None:
    def drop(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if "layers.1." in name]:
            del weights[name]

    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\..* and 6 more weights"):
        load(checkpoint(drop))


def test_an_embedding_of_another_size_is_rejected_with_what_to_correct(checkpoint: Any) -> None:
    def pad(weights: dict[str, Any]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, 5))

    with pytest.raises(ValueError, match=r"weights of other shapes than config\.json says.*correct config\.json"):
        load(checkpoint(pad))


def test_extra_weights_are_named_in_the_log(checkpoint: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = load(checkpoint(lambda weights: weights.update({"draft_head.weight": torch.ones(2)})))
    assert "weights that the architecture has no place for: draft_head.weight" in caplog.text
    assert not head_is_tied(model)


@pytest.mark.parametrize("architecture", ["gemma3", "granitemoe", "mixtral", "qwen2_5_vl", "qwen3_moe", "qwen3"])
def test_engines_get_the_weights_of_the_checkpoint_under_its_names(tmp_path: Path, architecture: str) -> None:
    folder = save_small_model(tmp_path, architecture)
    scorer = Scorer(build_model(ModelConfig(path=str(folder)), with_weights=True))
    weights = dict(CheckpointWeights(scorer, torch.float32))
    expected = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
