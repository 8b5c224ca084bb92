"""The prompts that an online run keeps, and the reasons printed for the others."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dpo_ray.config import Config
from dpo_ray.launch.data import prepare_prompts

TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


def prompts_of(folder: Path, model: Path, **engine: int) -> tuple[list[int], str]:
    """The record numbers of the kept prompts, and the printed lines."""
    texts = [
        [{"role": "user", "content": "short"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "x" * 90}],
        [{"role": "user", "content": "also short"}],
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    (folder / "template.jinja").write_text(TEMPLATE)
    config = Config.model_validate(
        {
            "model": {"path": str(model), "chat_template": str(folder / "template.jinja")},
            "online": {"prompts": str(folder / "prompts.jsonl"), "sampling": {"max_tokens": 20}, "engine": engine},
        }
    )
    assert config.online is not None
    output = io.StringIO()
    kept = prepare_prompts(config, config.online.prompts, "online.prompts", Console(file=output, width=400))
    return [texts.index(list(map(dict, prompt.messages))) + 1 for prompt in kept], output.getvalue()


def test_a_prompt_that_the_template_rejects_is_named_by_file_and_record(tiny_model: Path, tmp_path: Path) -> None:
    kept, output = prompts_of(tmp_path, tiny_model)
    assert kept == [1, 3, 4]
    assert "online.prompts: 4 records read, 3 kept, 1 dropped" in output
    assert f"template_refused: {tmp_path / 'prompts.jsonl'}:2 (the chat template says: no system turn here)" in output


def test_a_prompt_that_leaves_no_room_for_the_completion_is_dropped(tiny_model: Path, tmp_path: Path) -> None:
    kept, output = prompts_of(tmp_path, tiny_model, max_model_len=100)
    assert kept == [1, 4]
    assert "(90 tokens; online.engine.max_model_len - online.sampling.max_tokens is 80)" in output


def test_without_a_usable_prompt_the_run_does_not_start(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"online\.prompts: no usable prompt in .*prompts\.jsonl"):
        prompts_of(tmp_path, tiny_model, max_model_len=21)
