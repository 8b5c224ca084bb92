"""What a judge's process gets of the run."""

from pathlib import Path
from typing import Any

from dpo_ray.config import Config
from dpo_ray.launch.rollouts.completions import EngineCompletions


def test_judges_decode_tokens_with_the_tokenizer_of_the_policy(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "?"}\n')
    config = Config.model_validate(
        {"model": {"path": str(tiny_model)}, "online": {"prompts": str(tmp_path / "prompts.jsonl")}}
    )
    from transformers import AutoTokenizer

    text = "<|im_start|>user\n6 x 7?<|im_end|>\n"
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(text)["input_ids"]
    assert EngineCompletions(config, None).decode(ids) == text
