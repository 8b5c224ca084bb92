import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.data.formats import Part, Unreadable
from dpo_ray.data.records import PairRecord, Problem, PromptRecord, read_pairs, read_prompts
from dpo_ray.data.sources import source_digest, split_sources

Write = Callable[..., str]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def records(source: str) -> list[PairRecord]:
    """Records of a source without problems."""
    usable = []
    for record in read_pairs([Part(source)]):
        assert isinstance(record, PairRecord), record
        usable.append(record)
    return usable


def only(source: str) -> PairRecord:
    (record,) = records(source)
    return record


def roles(record: PairRecord) -> list[str]:
    assert not isinstance(record.prompt, str)
    return [turn["role"] for turn in record.prompt]


SKY = {"prompt": "sky?", "chosen": "blue", "rejected": "green"}


# ------------------------------------------------------------------------------------------------------------ layouts


def test_text_pairs_stay_text(write: Write):
    source = write([SKY])
    assert only(source) == PairRecord("sky?", "blue", "green", source, 1)


MESSAGES = {
    "message lists": {"prompt": [user("sky?")], "chosen": [assistant("blue")], "rejected": [assistant("green")]},
    "single messages": {"prompt": [user("sky?")], "chosen": assistant("blue"), "rejected": assistant("green")},
    "message prompt, text answers": {"prompt": [user("sky?")], "chosen": "blue", "rejected": "green"},
    "text prompt, message answers": {"prompt": "sky?", "chosen": [assistant("blue")], "rejected": [assistant("green")]},
    "implicit prompt": {"chosen": [user("sky?"), assistant("blue")], "rejected": [user("sky?"), assistant("green")]},
    "null prompt": {
        "prompt": None,
        "chosen": [user("sky?"), assistant("blue")],
        "rejected": [user("sky?"), assistant("green")],
    },
    "text prompt repeated in whole conversations": {
        "prompt": "sky? ",
        "chosen": [user("sky?"), assistant("blue")],
        "rejected": [user("sky?"), assistant("green")],
    },
    "message prompt repeated in whole conversations": {
        "prompt": [user("sky?")],
        "chosen": [user("sky?"), assistant("blue")],
        "rejected": [user("sky?"), assistant("green")],
    },
    "ranked texts": {"messages": [user("sky?")], "completions": ["red", "blue", "green"], "scores": [0.5, 2, -1]},
    "ranked objects": {
        "messages": [user("sky?")],
        "completions": [{"content": "green", "score": 1}, {"content": "red", "score": 2}, {"text": "blue", "score": 9}],
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "sky?"}],
        "chosen": {"from": "gpt", "value": "blue"},
        "rejected": {"from": "gpt", "value": "green"},
    },
}


@pytest.mark.parametrize("record", MESSAGES.values(), ids=MESSAGES.keys())
def test_every_message_layout_gives_the_same_pair(record: dict[str, Any], write: Write):
    source = write([record])
    pair = only(source)
    assert isinstance(pair, PairRecord)
    expected = PairRecord((user("sky?"),), (assistant("blue"),), (assistant("green"),), source, 1)
    assert replace(pair, completions=(0, 1), names=("chosen", "rejected"), unread=(), gap=None) == expected


def test_sharegpt_speakers_and_system_become_roles(write: Write):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    answers = {"chosen": {"from": "gpt", "value": "d"}, "rejected": {"from": "gpt", "value": "e"}}
    with_system, empty_system = records(
        write([{"conversations": turns, "system": system, **answers} for system in ("be kind", "")])
    )
    assert roles(with_system) == ["system", "user", "assistant", "user"]
    assert roles(empty_system) == ["user", "assistant", "user"]


def test_the_implicit_prompt_is_the_longest_shared_start(write: Write):
    shared = [user("a"), assistant("b"), user("c")]
    record = only(write([{"chosen": [*shared, assistant("d"), assistant("e")], "rejected": [*shared, assistant("f")]}]))
    assert record.prompt == tuple(shared)
    assert record.chosen == (assistant("d"), assistant("e"))
    assert record.rejected == (assistant("f"),)


def test_the_prompt_of_two_transcripts_ends_with_their_last_shared_assistant_tag(write: Write):
    shared = "\n\nHuman: sky?\n\nAssistant: Where?\n\nHuman: Here.\n\nAssistant:"
    record = only(write([{"chosen": f"{shared} It is blue", "rejected": f"{shared} It is green"}]))
    assert (record.prompt, record.chosen, record.rejected) == (shared, " It is blue", " It is green")


def test_ranked_text_prompts_give_text_pairs(write: Write):
    record = only(write([{"prompt": "sky?", "completions": ["green", "blue"], "scores": [0, 1]}]))
    assert (record.prompt, record.chosen, record.rejected) == ("sky?", "blue", "green")


# ------------------------------------------------------------------------------------------------------------ sources


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": [user(f"q{i}")], "chosen": [assistant("a")], "rejected": [assistant("b")]} for i in range(count)]


def as_json(folder: Path) -> str:
    (folder / "pairs.json").write_text(json.dumps(pairs(3), indent=2))
    return str(folder / "pairs.json")


def as_parquet(folder: Path) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(pairs(3)), folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


def as_arrow_file(folder: Path) -> str:
    import pyarrow as pa

    table = pa.Table.from_pylist(pairs(3))
    with pa.ipc.new_file(folder / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    return str(folder / "file.arrow")


def as_arrow_stream(folder: Path) -> str:
    import pyarrow as pa

    table = pa.Table.from_pylist(pairs(3))
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    return str(folder / "stream.arrow")


def as_saved_dataset(folder: Path) -> str:
    import datasets

    datasets.Dataset.from_list(pairs(3)).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_split_of_saved_datasets(folder: Path) -> str:
    import datasets

    splits: dict[Any, Any] = {
        "train": datasets.Dataset.from_list(pairs(1)),
        "held_out": datasets.Dataset.from_list(pairs(3)),
    }
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return f"{folder / 'splits'}:held_out"


@pytest.mark.parametrize(
    "save", [as_json, as_parquet, as_arrow_file, as_arrow_stream, as_saved_dataset, as_split_of_saved_datasets]
)
def test_every_format_gives_the_records_of_the_jsonl_file(save: Callable[[Path], str], write: Write, tmp_path: Path):
    def content(source: str) -> list[Any]:
        return [(r.prompt, r.chosen, r.rejected, r.number) for r in records(source)]

    assert content(save(tmp_path)) == content(write(pairs(3), "same.jsonl"))


@pytest.mark.parametrize(
    "save", [as_json, as_parquet, as_arrow_file, as_arrow_stream, as_saved_dataset, as_split_of_saved_datasets]
)
def test_parts_of_any_format_give_the_same_records_each_read_alone(
    save: Callable[[Path], str], write: Write, tmp_path: Path
):
    for source in (save(tmp_path), write(pairs(3), "same.jsonl")):
        parts = split_sources([source], rows_per_part=2)
        whole = source.endswith(".json")  # parsed once
        assert [(part.start, part.rows) for part in parts] == ([(0, 3)] if whole else [(0, 2), (2, 1)])
        assert list(read_pairs([parts[-1]])) == list(read_pairs([Part(source)]))[parts[-1].start :]
        assert list(read_pairs(parts)) == list(read_pairs([Part(source)]))


def test_parts_of_a_table_begin_inside_its_row_groups(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    source = str(tmp_path / "pairs.parquet")
    parquet.write_table(pa.Table.from_pylist(pairs(10)), source, row_group_size=4)
    parts = split_sources([source], rows_per_part=3)
    assert [[r.number for r in read_pairs([part])] for part in parts] == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10]]


def test_parts_of_jsonl_keep_line_numbers_over_blank_lines(write: Write):
    source = write([b"\xef\xbb\xbf" + json.dumps(SKY).encode(), "", SKY, "{", "  ", SKY, ""])
    parts = split_sources([source], rows_per_part=2)
    assert [[r.number for r in read_pairs([part])] for part in parts] == [[1, 3], [4, 6]]


def test_a_hub_dataset_is_asked_for_its_split(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked, hub = [], datasets.Dataset.from_list(pairs(1))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or hub)
    assert len(list(read_pairs([Part("org/name"), Part("org/name:test[:5]")]))) == 2
    assert asked == [("org/name", "train"), ("org/name", "test[:5]")]


def test_the_error_names_a_hub_dataset_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"org/name: no such file or folder, and not loaded .* no network; accepted"):
        list(read_pairs([Part("org/name")]))


@pytest.mark.parametrize("name", ["missing.jsonl", "some/missing.json", "/no/such/folder", "pairs.csv"])
def test_a_missing_source_is_an_error_before_anything_is_read(name: str):
    with pytest.raises(ValueError, match=rf"{name}: no such file or folder; accepted are \.json"):
        read_pairs([Part(name)])


def test_a_file_of_another_format_is_an_error(tmp_path: Path):
    (tmp_path / "pairs.xlsx").write_text("prompt,chosen\n")
    with pytest.raises(ValueError, match=r"a file ending in '\.xlsx' is not supported; accepted"):
        read_pairs([Part(str(tmp_path / "pairs.xlsx"))])


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_damaged_table_is_an_error_that_names_the_file(suffix: str, tmp_path: Path):
    path = tmp_path / f"pairs.{suffix}"
    path.write_bytes(b"PAR1 this is not a table PAR1")
    with pytest.raises(ValueError, match=rf"pairs\.{suffix}: cannot be read as"):
        list(read_pairs([Part(str(path))]))


def test_a_folder_that_is_no_saved_dataset_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="the folder is not a saved dataset"):
        list(read_pairs([Part(str(tmp_path))]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"prompt": "a"},\n{"prompt" "b"}\n]', r"pairs\.json:3: not valid JSON: Expecting ':' .* at column 11"),
        (b'{"a": 1}\n{"a": 2}', r"pairs\.json:2: .* a file with one record per line must end in \.jsonl"),
        (b'{"a": 1}', r"found an object of 1; a \.json file must contain a list"),
        (b'[\n"\xff"]', r"pairs\.json:2: byte 4 of the file is not UTF-8"),
    ],
)
def test_a_broken_json_file_is_an_error_with_its_line(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "pairs.json").write_bytes(content)
    with pytest.raises(Unreadable, match=message) as error:
        list(read_pairs([Part(str(tmp_path / "pairs.json"))]))
    assert type(error.value) is Unreadable


def test_a_byte_order_mark_and_blank_lines_are_no_records(write: Write):
    records = list(read_pairs([Part(write([b"\xef\xbb\xbf" + json.dumps(SKY).encode(), "", "  ", SKY]))]))
    assert [(type(r), r.number) for r in records] == [(PairRecord, 1), (PairRecord, 4)]


def test_limit_counts_records_over_all_sources_and_unusable_ones_too(write: Write):
    sources = [write([SKY, "{"], "one.jsonl"), write([SKY, SKY], "two.jsonl")]
    assert [
        Path(r.source).name + f":{r.number}" for r in read_pairs(split_sources(sources, rows_per_part=9, limit=3))
    ] == [
        "one.jsonl:1",
        "one.jsonl:2",
        "two.jsonl:1",
    ]


def test_the_digest_of_a_source_follows_its_content_and_not_its_name(write: Write):
    one, same, other = write([SKY], "1.jsonl"), write([SKY], "2.jsonl"), write([SKY, SKY], "3.jsonl")
    assert source_digest(one) == source_digest(same) != source_digest(other)


# ----------------------------------------------------------------------------------------------------------- problems


HELLO = [user("hello")]
PROBLEMS = [
    ("not_json", "{'prompt': 1}", "Expecting property name"),
    ("not_json", b'{"prompt": "\xff"}', "byte 13 is not UTF-8"),
    ("not_json", "[" * 100_000, "recursion"),
    ("not_a_record", "[1, 2]", "found a list of 2"),
    ("not_a_record", '"text"', 'found "text"'),
    ("missing_field", {"prompt": "a", "chosen": "b"}, "rejected: found chosen, prompt; accepted are prompt/"),
    ("missing_field", {"topic": "a", "chosen": "b", "rejected": "c"}, "prompt: found chosen, rejected, topic"),
    ("missing_field", {"chosen": [assistant("b")], "rejected": [assistant("c")]}, "prompt: found chosen, rejected"),
    ("missing_field", {"prompt": "a", "chosen": None, "rejected": "c"}, "chosen: found"),
    ("missing_field", {"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}, "prompt[0].content: found role"),
    ("empty_field", {**SKY, "chosen": ""}, 'chosen: ""'),
    ("empty_field", {**SKY, "prompt": " \n"}, r'prompt: " \n"'),
    ("empty_field", {**SKY, "chosen": []}, "chosen: an empty list"),
    ("empty_field", {"prompt": [user(" ")], "chosen": "b", "rejected": "c"}, "prompt[0].content"),
    ("bad_field", {**SKY, "chosen": 3}, "chosen: found 3; accepted: text or a list of messages"),
    (
        "bad_field",
        {**SKY, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]},
        'prompt[0].content[0]: found a part of type "image"; accepted: parts of type text',
    ),
    ("bad_field", {**SKY, "prompt": [{"role": "robot", "content": "a"}]}, 'prompt[0].role: found "robot"; accepted'),
    ("bad_field", {**SKY, "chosen": [assistant("a")]}, "found text and messages"),
    ("bad_field", '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "prompt: found half of a surrogate pair"),
    (
        "bad_field",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "conversations without a shared start",
    ),
    (
        "bad_field",
        {"chosen": [user("a"), assistant("b"), user("c")], "rejected": [user("a"), assistant("d")]},
        "chosen: found a turn by 'user' after the prompt",
    ),
    (
        "bad_field",
        {"prompt": "x", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("d")]},
        "whole conversations without the prompt",
    ),
    ("bad_field", {"messages": HELLO, "completions": ["a"], "scores": [1]}, "completions: found a list of 1"),
    ("identical", {**SKY, "rejected": "blue"}, 'both "blue"'),
    ("identical", {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}, 'both "b"'),
    ("identical", {"messages": HELLO, "completions": ["a", "a"], "scores": [1, 2]}, 'both "a"'),
    ("tie", {"messages": HELLO, "completions": ["a", "b"], "scores": [1, 1.0]}, "all 2 completions score 1"),
    ("bad_score", {"messages": HELLO, "completions": ["a", "b"], "scores": [1, math.nan]}, "completions[1]: found"),
    ("bad_score", {"messages": HELLO, "completions": ["a", "b"], "scores": [math.inf, 1]}, "score Infinity"),
    ("bad_score", {"messages": HELLO, "completions": ["a", "b"], "scores": [10**400, 1]}, "completions[0]"),
    ("bad_score", {"messages": HELLO, "completions": ["a", "b"], "scores": [1]}, "a list of 1 for 2 completions"),
    ("bad_score", {"messages": HELLO, "completions": ["a", "b"]}, "completions: no scores; accepted are"),
    (
        "bad_score",
        {"messages": HELLO, "completions": [{"content": "a", "score": 1}, {"content": "b"}]},
        "[1]: found score null",
    ),
]


@pytest.mark.parametrize(("reason", "line", "detail"), PROBLEMS)
def test_an_unusable_record_is_reported_and_the_next_one_is_read(reason: str, line: Any, detail: str, write: Write):
    source = write([line, SKY])
    problem, next_record = read_pairs([Part(source)])
    assert isinstance(problem, Problem), problem
    assert (problem.reason, problem.source, problem.number) == (reason, source, 1)
    assert detail in problem.detail
    assert isinstance(next_record, PairRecord)


def test_an_empty_system_turn_is_kept(write: Write):
    record = only(write([{**SKY, "prompt": [{"role": "system", "content": ""}, user("sky?")]}]))
    assert record.prompt[0] == {"role": "system", "content": ""}


# ------------------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [user("sky?")]},
        {"messages": [user("sky?"), assistant("blue")]},
        {"conversations": [{"from": "human", "value": "sky?"}, {"from": "gpt", "value": "blue"}]},
        {"chosen": [user("sky?"), assistant("blue")], "rejected": [user("sky?"), assistant("green")]},
        {**SKY, "prompt": [user("sky?")]},
    ],
)
def test_a_prompt_ends_before_the_last_answer(record: dict[str, Any], write: Write):
    source = write([record])
    (prompt,) = read_prompts([source])
    assert isinstance(prompt, PromptRecord)
    assert prompt.prompt == (user("sky?"),)


def test_bad_prompts_carry_a_reason(write: Write):
    source = write([{"text": "a"}, {"prompt": ""}, {"messages": [assistant("a")]}])
    problems = [problem for problem in read_prompts([source]) if isinstance(problem, Problem)]
    assert [problem.reason for problem in problems] == ["missing_field", "empty_field", "bad_field"]
