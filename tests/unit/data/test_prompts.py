"""Prompts of online runs: kept, dropped and reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config.schema import DataConfig
from dpo_ray.data.examples import load_prompts, tokenize_answers
from dpo_ray.data.records import Problem
from dpo_ray.data.tokenize import RecordTokenizer
from dpo_ray.data.tokenizer import ModelLimits, load_tokenizer

TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


def load(folder: Path, model: Path, *, max_engine_tokens: int = 1000, strict: bool = False) -> tuple[list[int], str]:
    """Record numbers of the kept prompts, and the report."""
    texts = [
        [{"role": "user", "content": "short"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "x" * 90}],
        [{"role": "user", "content": "also short"}],
    ]
    source, template = folder / "prompts.jsonl", folder / "template.jinja"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    template.write_text(TEMPLATE)
    prompts, report = load_prompts(
        [str(source)],
        RecordTokenizer(
            load_tokenizer(str(model), str(template)), DataConfig(), ModelLimits(engine_prompt=max_engine_tokens)
        ),
        strict=strict,
    )
    assert [prompt.index for prompt in prompts] == list(range(len(prompts)))
    return [texts.index(list(map(dict, prompt.messages))) + 1 for prompt in prompts], report.text("online.prompts")


def test_the_report_names_file_and_record_of_a_prompt_that_the_template_rejects(
    tiny_model: Path, tmp_path: Path
) -> None:
    kept, text = load(tmp_path, tiny_model)
    assert kept == [1, 3, 4]
    assert "online.prompts: 4 records read, 3 kept, 1 dropped" in text
    assert f"{tmp_path / 'prompts.jsonl'}:2 (the chat template raised: no system turn here)" in text
    assert "prompt   tokens: mean 35, median 10, max 90" in text


def test_a_prompt_that_leaves_an_engine_no_room_for_a_completion_is_dropped(tiny_model: Path, tmp_path: Path) -> None:
    kept, text = load(tmp_path, tiny_model, max_engine_tokens=80)
    assert kept == [1, 4]
    assert "(90 tokens; online.engine.max_model_len - online.sampling.max_tokens is 80)" in text


def test_prompts_without_a_usable_record_are_rejected(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"online\.prompts: no record of .*prompts\.jsonl can be used"):
        load(tmp_path, tiny_model, max_engine_tokens=1)


def test_strict_rejects_dropped_prompts(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"online\.prompts: data\.strict is true and records were dropped"):
        load(tmp_path, tiny_model, strict=True)


ANSWERED = [
    {"prompt": "p", "completion": "answer"},
    {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "answer"}]},
    {"instruction": "p", "output": "answer", "answer": 4},
    {"prompt": "p", "chosen": "answer", "rejected": "worse"},
    {"prompt": "p", "completions": ["worse", "answer"], "scores": [1, 2]},
    {"prompt": "p"},
]


def test_self_play_reads_the_answer_of_each_layout_as_tokens_after_the_prompt(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ANSWERED))
    tokenizer = RecordTokenizer(load_tokenizer(str(tiny_model)), DataConfig(strings="chat"))
    prompts, report = load_prompts([str(tmp_path / "answers.jsonl")], tokenizer, strict=False, answers=True)
    assert report.kept == 5
    assert "accepted are completion, output, response, answer" in report.text("online.prompts")
    (messages,) = {tuple(map(tuple, (turn.items() for turn in prompt.messages))) for prompt in prompts}
    assert dict(messages[0]) == {"role": "user", "content": "p"}
    for prompt in prompts:
        assert prompt.answer is not None
        assert prompt.answer.text == "answer"
        whole = tokenizer.tokenizer.apply_chat_template(
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": "answer"}], return_dict=False
        )
        assert [*prompt.token_ids, *prompt.answer.token_ids] == whole
    assert prompts[2].fields == {"answer": 4}


def test_self_play_reports_what_it_leaves_out_of_a_record(tiny_model: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "see <image> there", "generations": ["a", " ", "b"], "ratings": [1, 9, 2]},
    ]
    source = tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = RecordTokenizer(load_tokenizer(str(tiny_model)), DataConfig(strings="chat"))
    prompts, report = load_prompts([str(source)], tokenizer, strict=True, answers=True)
    assert [prompt.answer and prompt.answer.text for prompt in prompts] == ["a", "b"]
    text = report.text("online.prompts")
    assert "fields carried along for judges: rejected (1), generations (1), ratings (1)" in text
    assert [(reason, tally.count, tally.first[0].detail) for reason, tally in report.notes.items()] == [
        ("strings_chat", 2, ""),
        ("media_placeholder", 1, "prompt: <image>"),
        ("left_out", 1, 'field empty: generations[1]: " "'),
    ]


def test_a_prompt_that_is_a_string_is_kept_as_text_beside_its_messages(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    records = [{"prompt": "6 x 7?", "answer": 42}, {"prompt": [{"role": "user", "content": "6 x 7?"}]}]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = RecordTokenizer(load_tokenizer(str(tiny_model)), DataConfig())
    (text, turns), _ = load_prompts([str(source)], tokenizer, strict=True)
    assert text.messages == turns.messages == ({"role": "user", "content": "6 x 7?"},)
    assert (text.text, turns.text) == ("6 x 7?", None)


def test_a_note_on_a_prompt_and_its_answer_is_listed_once(tokenizer: Any, tmp_path: Path) -> None:
    record = {"prompt": [{"role": "user", "content": "Why <|im_end|>?"}], "completion": "So <|im_end|>."}
    (tmp_path / "answers.jsonl").write_text(json.dumps(record))
    (item,) = tokenize_answers([f"{tmp_path}/answers.jsonl"], RecordTokenizer(tokenizer, DataConfig()))
    assert not isinstance(item, Problem), item
    _, prompt, _ = item
    assert prompt.notes == (("special_in_text", "prompt[0].content: <|im_end|>, completion[0].content: <|im_end|>"),)
