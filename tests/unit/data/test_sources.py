"""Files, compressed files, folders and patterns as sources."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_ray.data.formats import Part, Unreadable, table_rows
from dpo_ray.data.records import PairRecord, Problem, PromptRecord, read_answers, read_pairs, read_prompts
from dpo_ray.data.sources import expand_source, source_digest, split_sources

ROWS = [{"prompt": f"q{i}", "chosen": "a, b\nc", "rejected": 'say "d"'} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_csv() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ROWS[0])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


FILES: dict[str, Callable[[], bytes]] = {
    "pairs.jsonl": lambda: LINES,
    "pairs.ndjson": lambda: LINES,
    "pairs.jsonl.gz": lambda: gzip.compress(LINES),
    "pairs.jsonl.zst": lambda: zstd(LINES),
    "pairs.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "pairs.csv": as_csv,
    "pairs.csv.gz": lambda: gzip.compress(as_csv()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_has_the_same_records_whole_and_in_parts(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(FILES[name]())
    source = str(tmp_path / name)
    expected = [PairRecord(**row, source=source, number=i) for i, row in enumerate(ROWS, start=1)]
    assert list(read_pairs([Part(source)])) == expected
    parts = split_sources([source], rows_per_part=2)
    assert list(read_pairs(parts)) == expected
    assert sum(part.rows or 0 for part in parts) == 5
    assert list(read_pairs(split_sources([source], rows_per_part=2, limit=3))) == expected[:3]


def test_the_error_names_a_damaged_gzip_file(tmp_path: Path):
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(LINES)[:-20])
    with pytest.raises(Unreadable, match=r"pairs\.jsonl\.gz: cannot be read"):
        list(read_pairs([Part(str(tmp_path / "pairs.jsonl.gz"))]))


def test_a_csv_row_with_too_many_cells_is_reported(tmp_path: Path):
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nq,a,b,c\nq,a,b\n")
    problem, record = read_pairs([Part(str(tmp_path / "pairs.csv"))])
    assert isinstance(problem, Problem)
    assert (problem.number, problem.detail) == (1, "more cells than the header's 3")
    assert isinstance(record, PairRecord)


def test_a_csv_column_without_a_name_is_named_by_its_place(tmp_path: Path):
    (tmp_path / "indexed.csv").write_text(",prompt,chosen,rejected, \n0,q,a,b,\n,q,a,b,c\n")
    pairs = [pair for pair in read_pairs([Part(str(tmp_path / "indexed.csv"))]) if isinstance(pair, PairRecord)]
    assert [pair.unread for pair in pairs] == [("column 1 without a name",), ("column 5 without a name",)]


def as_repeating_csv(path: Path) -> None:
    path.write_text("prompt,chosen,chosen,rejected\nq,a,b,c\n")


def as_repeating_parquet(path: Path) -> None:
    pa.parquet.write_table(repeating_table(), path)


def as_repeating_arrow(path: Path) -> None:
    table = repeating_table()
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def as_repeating_stream(path: Path) -> None:
    table = repeating_table()
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def repeating_table() -> pa.Table:
    return pa.table([["q"], ["a"], ["b"], ["c"]], names=["prompt", "chosen", "chosen", "rejected"])


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.csv", as_repeating_csv),
        ("a.parquet", as_repeating_parquet),
        ("a.arrow", as_repeating_arrow),
        ("a.arrow", as_repeating_stream),
    ],
)
def test_a_file_with_two_columns_of_one_name_is_an_error(name: str, save: Callable[[Path], None], tmp_path: Path):
    save(tmp_path / name)
    message = rf"{name}: columns 2 and 3 are both named 'chosen'; accepted: columns of different names"
    with pytest.raises(Unreadable, match=message):
        list(read_pairs([Part(str(tmp_path / name))]))
    with pytest.raises(Unreadable, match=message):
        split_sources([str(tmp_path / name)], rows_per_part=9)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_a_record_with_two_keys_of_one_name_is_rejected(name: str, tmp_path: Path):
    lines = [
        '{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}',
        '{"prompt": [{"role": "user", "content": "q", "content": "p"}], "chosen": "a", "rejected": "c"}',
        '{"prompt": "q", "chosen": "a", "rejected": "b"}',
    ]
    (tmp_path / name).write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    one, other, record = read_pairs([Part(str(tmp_path / name))])
    assert isinstance(one, Problem), one
    assert isinstance(other, Problem), other
    assert (one.number, one.reason) == (1, "bad_field")
    assert one.detail == "chosen: found 2 times in one object; accepted: once"
    assert other.detail == "content: found 2 times in one object; accepted: once"
    assert isinstance(record, PairRecord), record


def test_json_text_with_two_keys_of_one_name_is_rejected_by_field(tmp_path: Path):
    texts = {
        "prompt": '[{"role": "user", "content": "q", "content": "p"}]',
        "tools": '[{"name": "f", "name": "g"}]',
    }
    for field, text in texts.items():
        record = {"prompt": "q", "chosen": "a", "rejected": "b"} | {field: text}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(record))
        (problem,) = read_pairs([Part(str(tmp_path / "pairs.jsonl"))])
        assert isinstance(problem, Problem), problem
        key = "content" if field == "prompt" else "name"
        assert problem.detail == f"{field}: {key}: found 2 times in one object; accepted: once"


def test_a_folder_or_pattern_is_its_files_in_order(tmp_path: Path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.csv", "README.md", ".cache/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    folder = str(tmp_path)
    assert expand_source(folder) == [f"{folder}/{name}" for name in ("a.jsonl.gz", "b.jsonl", "sub/c.csv")]
    assert expand_source(f"{folder}/*.jsonl") == [f"{folder}/b.jsonl"]
    assert expand_source(f"{folder}/**/*.csv") == [f"{folder}/sub/c.csv"]
    assert expand_source(f"{folder}/b.jsonl") == [f"{folder}/b.jsonl"]


def test_a_pattern_takes_files_and_saved_datasets_or_folders_and_leaves_out_none_with_data(tmp_path: Path):
    import datasets

    for name in ("a.jsonl", "c/d.csv", "c/e/f.jsonl", "g/train/h.jsonl", "g/test/i.jsonl", "p/_hidden/j.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "p/0.png").touch()  # a folder without data beside the files is nobody's loss
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "b")
    folder = str(tmp_path)
    assert expand_source(f"{folder}/[abp]*") == [f"{folder}/a.jsonl", f"{folder}/b"]
    assert len(list(read_pairs(split_sources(expand_source(f"{folder}/[ab]*"), rows_per_part=9)))) == 10
    with pytest.raises(Unreadable, match=rf"matches files and the folder {folder}/c, which holds data too; accepted"):
        expand_source(f"{folder}/[ac]*")
    assert expand_source(f"{folder}/[cp]*") == [f"{folder}/c/d.csv", f"{folder}/c/e/f.jsonl"]
    # A pattern that reaches into a folder decides which of its files are meant.
    assert expand_source(f"{folder}/c/**/*.jsonl") == [f"{folder}/c/e/f.jsonl"]
    assert expand_source(f"{folder}/g/**") == [f"{folder}/g/test/i.jsonl", f"{folder}/g/train/h.jsonl"]
    with pytest.raises(Unreadable, match=rf"{folder}/g: the folder holds several splits; accepted are {folder}/g:test"):
        expand_source(f"{folder}/g*")


def test_a_folder_of_several_splits_needs_one_of_them(tmp_path: Path):
    for name in ("train_prefs-00000-of-00001", "train_sft-00000-of-00001", "test_prefs-00000-of-00001"):
        (tmp_path / f"{name}.jsonl").write_bytes(LINES)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert expand_source(f"{tmp_path}:train_prefs") == [f"{tmp_path}/train_prefs-00000-of-00001.jsonl"]
    splits = ", ".join(f"{tmp_path}:{name}" for name in ("test_prefs", "train_prefs", "train_sft"))
    with pytest.raises(Unreadable, match=rf"holds several splits; accepted are {splits}"):
        expand_source(str(tmp_path))
    with pytest.raises(Unreadable, match=r"no split 'train'; found test_prefs, train_prefs, train_sft"):
        expand_source(f"{tmp_path}:train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/*.parquet", "no file matches the pattern; accepted are .json"),
        ("{}", "notes.xlsx is not supported; accepted are .json"),
        ("{}/empty", "the folder has no data files; accepted are .json"),
        ("{}/pairs.tsv", "no such file or folder; accepted are .json"),
    ],
)
def test_whatever_is_not_read_is_rejected_with_the_formats_that_are(source: str, message: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.xlsx").touch()
    with pytest.raises(Unreadable, match=message):
        expand_source(source.format(tmp_path))


def test_a_column_that_python_has_no_type_for_does_not_end_the_reading(tmp_path: Path):
    far = pa.array([2**40, None, 5, 6, 7], pa.timestamp("s"))
    table = pa.Table.from_pylist(ROWS).append_column("created", far)
    pa.parquet.write_table(table, tmp_path / "far.parquet")
    records = [record for record in read_pairs([Part(f"{tmp_path}/far.parquet")]) if isinstance(record, PairRecord)]
    assert [record.prompt for record in records] == ["q0", "q1", "q2", "q3", "q4"]
    assert [record.unread for record in records] == [("created",), (), ("created",), ("created",), ("created",)]
    pa.parquet.write_table(
        table.drop(["chosen"]).rename_columns(["prompt", "rejected", "chosen"]), tmp_path / "x.parquet"
    )
    first, *_ = read_pairs([Part(f"{tmp_path}/x.parquet")])
    assert isinstance(first, Problem)
    assert first.detail.startswith("chosen: a value of type timestamp[ms] cannot be read: ")


def test_a_cell_that_cannot_be_read_is_no_field_for_judges_and_named(tmp_path: Path):
    far = pa.array([2**40, None, 5, 6, 7], pa.timestamp("s"))
    pa.parquet.write_table(pa.Table.from_pylist(ROWS).append_column("created", far), tmp_path / "far.parquet")
    prompts = [p for p in read_prompts([f"{tmp_path}/far.parquet"]) if isinstance(p, PromptRecord)]
    assert ["created" in prompt.fields for prompt in prompts] == [False, False, True, True, True]
    detail = "created: a value of type timestamp[ms] cannot be read: "
    assert [[(reason, text[: len(detail)]) for reason, text in prompt.notes] for prompt in prompts] == [
        [("unreadable_cell", detail)], [], [], [], []
    ]  # fmt: skip
    answers = [item for item in read_answers([f"{tmp_path}/far.parquet"]) if not isinstance(item, Problem)]
    assert [prompt.notes for prompt, _ in answers] == [prompt.notes for prompt in prompts]


def test_nulls_that_arrow_pads_structs_with_are_no_fields(tmp_path: Path):
    messages: list[Any] = [{"role": "user", "content": "q"}]
    call = {"role": "assistant", "content": "a", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = [{"prompt": messages, "chosen": [call], "rejected": [{"role": "assistant", "content": "b"}], "at": None}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (record,) = read_pairs([Part(f"{tmp_path}/pairs.parquet")])
    assert isinstance(record, PairRecord), record
    assert (record.prompt, record.chosen, record.unread) == (tuple(messages), (call,), ())


def test_maps_are_objects_and_decimals_are_numbers(tmp_path: Path):
    calls = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(calls))])
    call = {"name": "f", "arguments": [("city", "Oslo")]}
    columns = {
        "prompt": pa.array([[[("role", "user"), ("content", "q")]]], pa.list_(pa.map_(pa.string(), pa.string()))),
        "completions": pa.array(
            [[{"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "content": "b"}]], pa.list_(message)
        ),
        "scores": pa.array([[Decimal("0.5"), Decimal("1.5")]]),
    }
    pa.parquet.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    (record,) = read_pairs([Part(f"{tmp_path}/pairs.parquet")])
    assert isinstance(record, PairRecord), record
    assert record.prompt == ({"role": "user", "content": "q"},)
    assert record.chosen == ({"role": "assistant", "content": "b"},)
    calls_of_rejected: Any = record.rejected[0]
    assert calls_of_rejected["tool_calls"] == [{"name": "f", "arguments": {"city": "Oslo"}}]
    assert record.gap == 1.0


def test_columns_without_maps_are_converted_as_a_whole():
    class Column:
        type = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

        def to_pylist(self, **how: Any) -> list[Any]:
            assert not how  # pyarrow converts cell by cell where it is given a way to convert maps
            return [[{"role": "user", "content": "q"}]]

    batch: Any = SimpleNamespace(num_rows=1, columns=[Column()], schema=SimpleNamespace(names=["prompt"]))
    batch.slice = lambda *_: batch
    assert list(table_rows([batch], 0, 0)) == [(1, {"prompt": [{"role": "user", "content": "q"}]})]


def test_keys_of_maps_become_text_and_those_that_cannot_be_keys_make_a_cell_unreadable(tmp_path: Path):
    days = pa.array([[(date(2026, 1, day), "rain")] for day in range(1, 6)], pa.map_(pa.date32(), pa.string()))
    places = pa.array([[({"x": 1}, "Oslo")]] * 5, pa.map_(pa.struct([("x", pa.int32())]), pa.string()))
    table = pa.Table.from_pylist(ROWS).append_column("days", days).append_column("places", places)
    pa.parquet.write_table(table, tmp_path / "maps.parquet")
    pairs = [pair for pair in read_pairs([Part(f"{tmp_path}/maps.parquet")]) if isinstance(pair, PairRecord)]
    assert [pair.unread for pair in pairs] == [("days", "places")] * 5
    first, *_ = read_prompts([f"{tmp_path}/maps.parquet"])
    assert isinstance(first, PromptRecord), first
    assert first.fields["days"] == {"2026-01-01": "rain"}
    assert "places" not in first.fields
    assert first.notes[0][1].startswith("places: a value of type map<struct<x: int32>, string")


def test_a_map_with_a_key_twice_is_rejected_by_field(tmp_path: Path):
    twice = pa.array([[("city", "Oslo"), ("city", "Bergen")]], pa.map_(pa.string(), pa.string()))
    table = pa.Table.from_pylist(ROWS[:1]).drop(["chosen"]).append_column("chosen", twice)
    pa.parquet.write_table(table, tmp_path / "pairs.parquet")
    (problem,) = read_pairs([Part(f"{tmp_path}/pairs.parquet")])
    assert isinstance(problem, Problem), problem
    assert problem.detail.startswith("chosen: a value of type map<string, string")
    assert "duplicate key was 'city'" in problem.detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'q,"a"x,b\n', r"x.csv:3: cannot be read as CSV: "),
        (b'q,"a,b\n', r"x.csv:3: cannot be read as CSV: unexpected end of data"),
        (b"q,\xe9,b\n", r"x.csv:3: byte 32 of the file is not UTF-8 text"),
    ],
)
def test_the_error_names_the_line_of_a_damaged_csv_file(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "x.csv").write_bytes(b"prompt,chosen,rejected\nq,a,b\n" + content)
    with pytest.raises(Unreadable, match=message):
        list(read_pairs([Part(f"{tmp_path}/x.csv")]))


def test_the_error_counts_the_bytes_of_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\nq,\xe9,b\n")
    with pytest.raises(Unreadable, match=r"x\.csv:2: byte 29 of the file is not UTF-8 text"):
        list(read_pairs([Part(f"{tmp_path}/x.csv")]))


def test_a_folder_may_hold_saved_datasets_of_its_splits(tmp_path: Path):
    import datasets

    for name in ("train", "test"):
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "sets" / name)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "other" / "all")
    assert expand_source(f"{tmp_path}/sets:train") == [f"{tmp_path}/sets/train"]
    assert expand_source(f"{tmp_path}/other") == [f"{tmp_path}/other/all/train"]
    pairs = list(read_pairs([Part(f"{tmp_path}/sets/train")]))
    assert len(pairs) == len(ROWS)
    assert all(isinstance(pair, PairRecord) for pair in pairs)
    with pytest.raises(Unreadable, match=rf"several splits; accepted are {tmp_path}/sets:test, {tmp_path}/sets:train"):
        expand_source(f"{tmp_path}/sets")


def test_the_digest_of_a_compressed_file_differs_from_the_plain_one(tmp_path: Path):
    for name in ("a.jsonl", "b.ndjson", "c.jsonl.gz"):
        (tmp_path / name).write_bytes(LINES)
    assert len({source_digest(f"{tmp_path}/{name}") for name in ("a.jsonl", "b.ndjson", "c.jsonl.gz")}) == 3
