"""What a judge's process gets of the run."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray.config import Config
from dpo_ray.config.rounds import SamplingConfig
from dpo_ray.launch.rollouts.completions import EngineCompletions


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Config:
    """Engines of 100 tokens."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "?"}\n')
    online = {
        "prompts": str(tmp_path / "prompts.jsonl"),
        "engine": {"max_model_len": 100},
        "sampling": {"max_tokens": 16},
    }
    return Config.model_validate({"model": {"path": str(tiny_model)}, "online": online})


def test_a_judges_prompt_that_does_not_fit_the_engines_is_rejected_with_the_key_to_raise(config: Config) -> None:
    class Fleet:
        """Its methods are called as an actor's."""

        membership = suspect = SimpleNamespace(remote=lambda *_: asyncio.sleep(3600))

    async def ask() -> None:
        sampling = SamplingConfig(max_tokens=30)
        await EngineCompletions(config, Fleet()).complete(({"role": "user", "content": "x" * 90},), sampling)

    with pytest.raises(ValueError, match=r"judge's prompt has \d+ tokens; .* at most 70 beside 30 .*max_model_len"):
        asyncio.run(ask())


def test_judges_decode_tokens_with_the_tokenizer_of_the_policy(config: Config, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    text = "<|im_start|>user\n6 x 7?<|im_end|>\n"
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(text)["input_ids"]
    assert EngineCompletions(config, None).decode(ids) == text
