"""``dpo-ray inspect``: what a run would train on."""

import io
import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from rich.console import Console

from dpo_ray.config import Config
from dpo_ray.data.inspect import inspect_run

USER, OAK, HERRING = (
    {"role": role, "content": text}
    for role, text in (("user", "Name a tree."), ("assistant", "An oak."), ("assistant", "A herring."))
)


@pytest.fixture
def model(tokenizer: Any, tmp_path: Path) -> Path:
    """A directory with a tokenizer and no model."""
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def inspect(folder: Path, model: Path, records: dict[str, list[Any]], **data: Any) -> tuple[str, list[dict[str, Any]]]:
    """The printed text and the lines of --json."""
    paths = {}
    for name, rows in records.items():
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    online = {"prompts": paths.pop("prompts"), "judge": {"use": "length"}} if "prompts" in paths else None
    config = Config.model_validate({"model": {"path": str(model)}, "data": {**paths, **data}, "online": online})
    output = io.StringIO()
    inspect_run(config, Console(file=output, width=200), json_file=folder / "records.json")
    return output.getvalue(), [json.loads(line) for line in (folder / "records.json").read_text().splitlines()]


def test_records_are_shown_with_boundaries_and_what_the_template_added(model: Path, tmp_path: Path):
    pair = {"prompt": [USER], "chosen": [OAK], "rejected": [HERRING], "id": 7}
    text, (line, dropped) = inspect(tmp_path, model, {"train": [pair, {"prompt": "q"}]}, max_completion_tokens=4)
    assert "data.train: 2 records read, 1 kept, 1 dropped" in text
    assert "fields not used: id (1)" in text
    assert "| prompt\n«<|im_start|>user\n»Name a tree.«<|im_end|>\n<|im_start|>assistant\n»\n| chosen\nAn" in text
    assert "[truncated]" in text
    assert line["notes"] == ["completion_cut", "not_used: id"]
    assert (line["key"], line["number"], line["status"]) == ("data.train", 1, "kept")
    assert line["prompt"] == "<|im_start|>user\nName a tree.<|im_end|>\n<|im_start|>assistant\n"
    assert line["tokens"]["rejected"] == 4
    assert line["truncated"]["rejected"] > 0
    assert (dropped["status"], dropped["reason"], dropped["prompt"]) == ("dropped", "missing_field", None)


def test_held_out_pairs_and_prompts_are_shown_too(model: Path, tmp_path: Path):
    pair = {"prompt": [USER], "chosen": [OAK], "rejected": [HERRING]}
    text, lines = inspect(tmp_path, model, {"eval": [pair], "prompts": [{"prompt": "Name a tree.", "answer": "oak"}]})
    assert [line["key"] for line in lines] == ["data.eval", "online.prompts"]
    assert lines[1]["notes"] == ["strings_chat", "carried: answer"]
    assert lines[1]["prompt"] == lines[0]["prompt"]
    assert "online.prompts: 1 records read, 1 kept" in text
    assert "fields carried along for judges: answer (1)" in text


def test_nothing_to_inspect_is_an_error(model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.train, data\.eval and online\.prompts are empty"):
        inspect(tmp_path, model, {})


def test_an_output_that_cannot_be_written_is_an_error(model: Path, tmp_path: Path):
    config = Config.model_validate({"model": {"path": str(model)}, "data": {"train": "pairs.jsonl"}})
    with pytest.raises(ValueError, match=r"--json .*no/such/records\.jsonl: cannot be written: No such file"):
        inspect_run(config, Console(file=io.StringIO()), json_file=tmp_path / "no" / "such" / "records.jsonl")


# ---------------------------------------------------------------------------------------------- nothing lost in silence


class Markers:
    """Draws records whose texts are all different markers."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.count = draw, 0
        self.fields: dict[str, str] = {}

    def text(self, field: str) -> str:
        """A marker, noted under its field."""
        self.count += 1
        marker = f"marker{self.count:03d}"
        self.fields[marker] = field
        return marker

    def maybe(self, record: dict[str, Any], key: str, value: Any) -> None:
        """Set a key in some records."""
        if self.draw(st.booleans()):
            record[key] = value()

    def turn(self, role: str, field: str) -> dict[str, Any]:
        """A message, as text or parts, with optional keys."""
        content: Any = self.text(field)
        if self.draw(st.booleans()):
            content = [{"type": "text", "text": content}, {"type": "text", "text": self.text(field)}]
        turn = {"role": role, "content": content}
        self.maybe(turn, "name", lambda: self.text(f"{field}.name"))
        self.maybe(turn, "weight", lambda: self.text("weight"))
        if role == "assistant":
            self.maybe(turn, "reasoning_content", lambda: self.text(f"{field}.reasoning_content"))
            self.maybe(turn, "tool_calls", lambda: [{"function": {"name": self.text("call"), "arguments": {}}}])
        return turn

    def dialogue(self, field: str) -> list[dict[str, Any]]:
        """One or three turns that end with the user's."""
        roles = self.draw(st.sampled_from([["user"], ["user", "assistant", "user"], ["system", "user"]]))
        return [self.turn(role, field) for role in roles]


@st.composite
def marked_records(draw: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """A record in a random layout, and the field of each marker in it."""
    m = Markers(draw)
    layout = draw(
        st.sampled_from(["strings", "messages", "whole", "prompt and whole", "ranked", "verdict", "sharegpt"])
    )
    record: dict[str, Any] = {}
    if layout == "strings":
        record = {key: m.text(key) for key in ("prompt", "chosen", "rejected")}
    elif layout == "messages":
        record = {"prompt": m.dialogue("prompt"), **{key: [m.turn("assistant", key)] for key in ("chosen", "rejected")}}
    elif layout in ("whole", "prompt and whole"):
        shared = m.dialogue("prompt")
        record = {key: [*shared, m.turn("assistant", key)] for key in ("chosen", "rejected")}
        if layout == "prompt and whole":
            record["prompt"] = [m.turn("system", "prompt")] if shared[0]["role"] != "system" else shared
    elif layout == "ranked":
        items = [{"text": m.text("completions"), "score": i, "critique": m.text("critique")} for i in range(2)]
        record = {"prompt": m.dialogue("prompt"), "completions": items}
    elif layout == "verdict":
        record = {key: m.text(key) for key in ("prompt", "response_1", "response_2")} | {"preference_strength": 2}
    else:
        record = {
            "conversations": [{"from": "human", "value": m.text("conversations")}],
            **{key: {"from": "gpt", "value": m.text(key)} for key in ("chosen", "rejected")},
        }
    turns = [record.get(key) for key in ("prompt", "chosen")]
    has_system = any(isinstance(value, list) and value[0]["role"] == "system" for value in turns)
    for key in ("tools", "note") if has_system else ("system", "tools", "note"):
        m.maybe(record, key, lambda key=key: [{"name": m.text(key)}] if key == "tools" else m.text(key))
    return record, m.fields


@hypothesis.given(marked_records())
@hypothesis.settings(
    deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_every_text_of_a_record_is_read_by_the_model_or_its_field_is_reported(
    model: Path, tmp_path: Path, marked: tuple[dict[str, Any], dict[str, str]]
):
    record, fields = marked
    text, (line,) = inspect(tmp_path, model, {"train": [record]})
    named = " ".join(line["notes"]).replace("tool_calls", "call")
    for marker, field in fields.items():
        seen = any(marker in line[side] for side in ("prompt", "chosen", "rejected"))
        # Only these may be left out; then the record's notes and the report name them.
        key = field.rpartition(".")[2]
        optional = key in ("name", "weight", "reasoning_content", "call", "critique", "tools", "note")
        assert seen or (optional and key in named and key in text.replace("tool_calls", "call")), (marker, field, text)
