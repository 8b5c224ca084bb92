"""``dpo-ray inspect``: what a run would train on."""

import io
import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from rich.console import Console

from dpo_ray.cli import main
from dpo_ray.config import Config
from dpo_ray.data.inspect import inspect_run
from dpo_ray.data.turns import transcript_turns
from tests.unit.data.conftest import CHATML
from tests.unit.data.test_layouts import LAYOUTS as PUBLIC_SETS
from tests.unit.data.test_templates import TOOLS_TEMPLATE

USER, OAK, HERRING = (
    {"role": role, "content": text}
    for role, text in (("user", "Name a tree."), ("assistant", "An oak."), ("assistant", "A herring."))
)


@pytest.fixture
def model(tokenizer: Any, tmp_path: Path) -> Path:
    """A directory with a tokenizer and no model."""
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def inspect(
    folder: Path, model: Path, records: dict[str, list[Any]], loss: Any = None, source: str = "candidates", **data: Any
) -> tuple[str, list[dict[str, Any]]]:
    """The printed text and the lines of --json."""
    paths = {}
    for name, rows in records.items():
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    online = {"prompts": paths.pop("prompts"), "source": {"use": source}} if "prompts" in paths else None
    config = Config.model_validate(
        {"model": {"path": str(model)}, "data": {**paths, **data}, "online": online, "loss": loss or {}}
    )
    output = io.StringIO()
    inspect_run(config, Console(file=output, width=200), json_file=folder / "records.json")
    return output.getvalue(), [json.loads(line) for line in (folder / "records.json").read_text().splitlines()]


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_records_of_every_layout_are_shown_with_their_texts_and_the_fields_that_are_not_used(
    name: str, model: Path, tmp_path: Path
):
    record, sides, unused = PUBLIC_SETS[name]
    text, (line,) = inspect(tmp_path, model, {"train": [record]})
    assert "data.train: 1 records read, 1 kept" in text
    for side, written in zip(("prompt", "chosen", "rejected"), sides, strict=True):
        turns = written if isinstance(written, tuple) else transcript_turns(written) or ({"content": written},)
        for turn in turns:
            assert turn["content"].strip() in line[side], side
    notes = dict(note.split(": ", 1) for note in line["notes"] if ": " in note)
    assert set(filter(None, notes.get("not_used", "").split(", "))) == unused


def test_prompts_of_self_play_are_shown_with_their_answers_and_dropped_without(model: Path, tmp_path: Path):
    records = [{"prompt": [USER], "completion": "An oak."}, {"prompt": [USER]}]
    text, (kept, dropped) = inspect(tmp_path, model, {"prompts": records}, source="self_play")
    assert "online.prompts: 2 records read, 1 kept, 1 dropped" in text
    assert "| chosen\nAn oak.«<|im_end|>" in text
    assert (kept["prompt"], kept["chosen"]) == (
        "<|im_start|>user\nName a tree.<|im_end|>\n<|im_start|>assistant\n",
        "An oak.<|im_end|>\n",
    )
    assert set(kept["tokens"]) == {"prompt", "chosen"}
    assert dropped["reason"] == "missing_field"


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


def test_a_field_with_a_comma_in_its_name_is_one_field(model: Path, tmp_path: Path):
    pair = {"prompt": [USER], "chosen": [OAK], "rejected": [HERRING], "source, of 2": 7}
    text, (line,) = inspect(tmp_path, model, {"train": [pair]})
    assert "fields not used: source, of 2 (1)" in text
    assert line["notes"] == ["not_used: source, of 2"]
    text, _ = inspect(tmp_path, model, {"prompts": [{"prompt": [USER], "source, of 2": 7}]})
    assert "fields carried along for judges: source, of 2 (1)" in text


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city":  "Oslo"}'])
@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (
            "{{ call.function | tojson }}",
            '«<tool_call>{"name": "»forecast«", "arguments": »{"city": "Oslo"}«}</tool_call>',
        ),
        (
            "{{ call.function.name }}: {{ call.function.arguments if call.function.arguments is string else "
            "call.function.arguments | tojson }}",
            "«<tool_call>»forecast«: »ARGUMENTS«</tool_call>",
        ),
        (
            "{% set args = call.function.arguments %}{{ call.function.name }}"
            "{% for key in args %} {{ key }}={{ args[key] }}{% endfor %}",
            "«<tool_call>»forecast« city=»Oslo«</tool_call>",
        ),
    ],
)
def test_calls_of_tools_are_shown_as_the_records_text(
    written: str, shown: str, arguments: Any, model: Path, tokenizer: Any, tmp_path: Path
):
    tokenizer.chat_template = TOOLS_TEMPLATE.replace("{{ call.function | tojson }}", written)
    tokenizer.save_pretrained(model)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "forecast", "arguments": arguments}}]}
    pair = {"prompt": [USER], "chosen": [call, {"role": "tool", "content": "rain"}, OAK], "rejected": [HERRING]}
    text, _ = inspect(tmp_path, model, {"train": [pair]})
    spelling = arguments if isinstance(arguments, str) else json.dumps(arguments)
    assert shown.replace("ARGUMENTS", spelling) in text


def test_the_command_prints_as_many_records_as_asked_and_writes_all_of_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pairs = [{"prompt": f"Tree {i}?", "chosen": "An oak.", "rejected": "A herring."} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, {"prompt": "q"}]))
    (tmp_path / "run.yaml").write_text(f"model: {{path: {model}}}\ndata: {{train: {tmp_path / 'pairs.jsonl'}}}\n")
    lines = tmp_path / "records.jsonl"
    main(["inspect", str(tmp_path / "run.yaml"), "data.strings=raw", "--json", str(lines), "--records", "2"])
    printed = capsys.readouterr().out
    assert "data.train: 4 records read, 3 kept, 1 dropped" in printed
    assert ["Tree 0?" in printed, "Tree 1?" in printed, "Tree 2?" in printed] == [True, True, False]
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(record["number"], record["status"], record["prompt"]) for record in records] == [
        *((i + 1, "kept", f"Tree {i}?") for i in range(3)), (4, "dropped", None)
    ]  # fmt: skip
    with pytest.raises(SystemExit) as error:
        main(["inspect", str(tmp_path / "run.yaml"), "--records", "many"])
    assert error.value.code == 2
    assert "--records" in capsys.readouterr().err


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

    def turn(self, role: str, field: str, *, begun: bool = False) -> dict[str, Any]:
        """A message, as text or parts, with optional keys."""
        content: Any = self.text(field)
        if self.draw(st.booleans()):
            content = [{"type": "text", "text": content}, {"type": "text", "text": self.text(field)}]
        turn = {"role": role, "content": content}
        self.maybe(turn, "name", lambda: self.text(f"{field}.name"))
        self.maybe(turn, "weight", lambda: self.text("weight"))
        if role == "assistant":
            self.maybe(turn, "reasoning_content", lambda: self.text(f"{field}.reasoning_content"))
        if role == "assistant" and not begun:
            called = {"arguments": {}}
            self.maybe(turn, "tool_calls", lambda: [{"function": called | {"name": self.text(f"{field}.call")}}])
        return turn

    def continued(self, begun: dict[str, Any], field: str) -> dict[str, Any]:
        """The whole of a turn that a prompt begins."""
        more = f" {self.text(field)}"
        parts = begun["content"]
        return begun | {"content": parts + more if isinstance(parts, str) else [*parts, {"type": "text", "text": more}]}

    def dialogue(self, field: str, *others: list[str]) -> list[dict[str, Any]]:
        """Some turns that end with the user's, or those of ``others``; an assistant turn at the end is begun."""
        roles = self.draw(st.sampled_from([["user"], ["user", "assistant", "user"], ["system", "user"], *others]))
        return [self.turn(role, field, begun=i == len(roles) - 1) for i, role in enumerate(roles)]

    def answer(self, field: str) -> list[dict[str, Any]]:
        """An answer, or a trajectory of up to three calls of a tool with their results and an answer."""
        calls = self.draw(st.integers(0, 3))
        return [
            *(self.turn(role, field) for _ in range(calls) for role in ("assistant", "tool")),
            self.turn("assistant", field),
        ]

    def completion(self, field: str, number: int) -> Any:
        """A completion of a ranked list with its score: text in an object, or messages in a list."""
        item = {"score": number, "critique": self.text("critique")}
        match self.draw(st.sampled_from(["text", "nested", "message"])):
            case "text":
                return item | {"text": self.text(field)}
            case "nested":
                return item | {"response": self.answer(field)}
        return item | self.turn("assistant", field)


PAIR, CALLS, BEGUN = ("chosen", "rejected"), ["user", "assistant", "tool"], ["user", "assistant"]
SIDES = {
    "chosen": "chosen",
    "preferred_output": "chosen",
    "rejected": "rejected",
    "non_preferred_output": "rejected",
} | (dict.fromkeys(("prompt", "system", "tools", "input", "conversations", "instruction", "history"), "prompt"))
"""The part of the pair that a field belongs to."""
LAYOUTS = (
    "strings", "messages", "whole", "prompt and whole", "ranked", "scores", "verdict", "sharegpt", "openai", "alpaca",
    "label", "label of a conversation",
)  # fmt: skip


@st.composite
def marked_records(draw: Any) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The loss, a record in a random layout, and the field of each marker in it."""
    m = Markers(draw)
    layout, loss = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(["sigmoid", "kto", "bco", "plackett_luce"]))
    record: dict[str, Any] = {}
    match layout:
        case "strings":
            record = {key: m.text(key) for key in ("prompt", *PAIR)}
        case "messages":
            record = {"prompt": m.dialogue("prompt", CALLS), **{key: m.answer(key) for key in PAIR}}
        case "whole" | "prompt and whole":
            shared = m.dialogue("prompt", *([CALLS, BEGUN] if layout == "prompt and whole" else []))
            if shared[-1]["role"] == "assistant":
                record = {key: [*shared[:-1], m.continued(shared[-1], key)] for key in PAIR}
            else:
                record = {key: [*shared, *m.answer(key)] for key in PAIR}
            if layout == "prompt and whole":
                first = [m.turn("system", "prompt")] if shared[0]["role"] != "system" and draw(st.booleans()) else []
                only = bool(first) and shared[-1]["role"] == "user" and draw(st.booleans())
                record["prompt"] = first if only else [*first, *shared]
        case "ranked":
            count = draw(st.integers(2, 4)) if loss == "plackett_luce" else 2
            items = [m.completion("completions", i) for i in range(count)]
            record = {draw(st.sampled_from(["prompt", "messages"])): m.dialogue("prompt"), "completions": items}
        case "scores":
            record = {
                "prompt": m.text("prompt"),
                "generations": [m.text("generations") for _ in range(2)],
                "ratings": [1, 2],
            }
        case "verdict":
            record = {key: m.text(key) for key in ("prompt", "response_1", "response_2")} | {"preference_strength": 2}
        case "sharegpt":
            turns = [{"from": role, "value": m.text("conversations")} for role in ("human", "gpt", "human")]
            record = {"conversations": turns, **{key: {"from": "gpt", "value": m.text(key)} for key in PAIR}}
        case "openai":
            record = {"input": {"messages": m.dialogue("input", CALLS), "tools": [{"name": m.text("input.tools")}]}}
            record |= {key: m.answer(key) for key in ("preferred_output", "non_preferred_output")}
        case "alpaca":
            record = {key: m.text(key) for key in ("instruction", "input", *PAIR)}
            record["history"] = [[m.text("history"), m.text("history")]]
        case "label":
            loss = draw(st.sampled_from(["kto", "bco"]))
            record = {
                "prompt": m.dialogue("prompt"),
                "completion": m.answer("completion"),
                "label": draw(st.booleans()),
            }
        case "label of a conversation":
            loss = draw(st.sampled_from(["kto", "bco"]))
            record = {"messages": [*m.dialogue("messages"), *m.answer("messages")], "label": draw(st.booleans())}
    values = (value if isinstance(value, list) else [] for value in record.values())
    has_system = any(isinstance(turn, dict) and turn.get("role") == "system" for value in values for turn in value)
    has_system |= "input" in record and '"system"' in json.dumps(record["input"])
    for key in ("tools", "note") if has_system else ("system", "tools", "note"):
        m.maybe(record, key, lambda key=key: [{"name": m.text(key)}] if key == "tools" else m.text(key))
    return loss, record, m.fields


@hypothesis.given(marked_records(), st.booleans())
@hypothesis.settings(
    deadline=None, max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_every_text_of_a_record_is_read_by_the_model_or_its_field_is_reported(
    model: Path, tokenizer: Any, tmp_path: Path, marked: tuple[str, dict[str, Any], dict[str, str]], with_tools: bool
):
    loss, record, fields = marked
    tokenizer.chat_template = TOOLS_TEMPLATE if with_tools else CHATML
    tokenizer.save_pretrained(model)
    text, lines = inspect(tmp_path, model, {"train": [record]}, loss={"use": loss})
    assert {line["status"] for line in lines} == {"kept"}, (lines, text)
    named = " ".join(note for line in lines for note in line["notes"]).replace("tool_calls", "call")
    for marker, field in fields.items():
        seen = any(marker in line[side] for line in lines for side in ("prompt", "chosen", "rejected"))
        # Only these may be left out; then the record's notes and the report name them.
        key = field.rpartition(".")[2]
        optional = key in ("name", "weight", "reasoning_content", "call", "critique", "tools", "note")
        assert seen or (optional and key in named and key in text.replace("tool_calls", "call")), (marker, field, text)
        if side := SIDES.get(field.partition(".")[0]):
            for line in lines:
                counts = {part: line[part].count(marker) for part in ("prompt", "chosen", "rejected")}
                assert counts.pop(side) <= 1, (marker, field, line)
                assert not any(counts.values()), (marker, field, line)
