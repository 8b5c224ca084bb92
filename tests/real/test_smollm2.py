"""The real 135M model: layouts agree on long ragged pairs, and bfloat16 log-probabilities stay close to float32."""

from pathlib import Path

import pytest
import torch

from dpo_ray.config.schema import DataConfig, ModelConfig
from dpo_ray.data.packing import Layout, build_row
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_tokenizer
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer, pair_logps, pair_losses
from dpo_ray.types import TokenPair

pytestmark = pytest.mark.slow

PAIRS = Path(__file__).parents[2] / "jobs/data/demo_pairs.jsonl"


@pytest.fixture(scope="module")
def pairs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TokenPair]:
    """Eight of the pairs that the project ships, written by this model."""
    tokenizer, folder = load_tokenizer(str(smollm2)), tmp_path_factory.mktemp("pairs")
    store = prepare_pairs([str(PAIRS)], tokenizer, DataConfig(limit=8), folder=folder)
    assert store.lengths.max() > 1.5 * store.lengths[:, 1:].min(), "ragged"
    return list(store)


def gradients(scorer: Scorer, pairs: list[TokenPair], layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scorer.zero_grad()
    losses = pair_losses(
        scorer,
        build_row(pairs, layout),
        lambda policy, _: torch.nn.functional.logsigmoid(0.1 * (policy.chosen - policy.rejected)) / len(pairs),
    )
    losses.total.backward()
    logps = losses.policy
    found = {
        name: parameter.grad.clone() for name, parameter in scorer.named_parameters() if parameter.grad is not None
    }
    return torch.stack((logps.chosen, logps.rejected)).detach(), found


def test_shared_rows_agree_with_plain_rows_in_float32(smollm2: Path, pairs: list[TokenPair]) -> None:
    scorer = Scorer(build_model(ModelConfig(path=str(smollm2)), with_weights=True))
    shared, shared_gradients = gradients(scorer, pairs, "shared")
    plain, plain_gradients = gradients(scorer, pairs, "plain")
    assert ((shared - plain).abs() / plain.abs()).max() < 1e-4
    for name, gradient in plain_gradients.items():
        assert (shared_gradients[name] - gradient).norm() / gradient.norm() < 1e-3, name


def test_bfloat16_logps_are_within_a_hundredth_of_float32(smollm2: Path, pairs: list[TokenPair]) -> None:
    logps = {}
    for dtype in (torch.float32, torch.bfloat16):
        scorer = Scorer(build_model(ModelConfig(path=str(smollm2)), with_weights=True, dtype=dtype))
        with torch.no_grad():
            found = pair_logps(scorer, build_row(pairs, "shared"))
        logps[dtype] = torch.stack((found.chosen, found.rejected))
    assert ((logps[torch.bfloat16] - logps[torch.float32]).abs() / logps[torch.float32].abs()).max() < 1e-2
