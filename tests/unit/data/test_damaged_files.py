"""Whatever stands in a file of pairs: it is counted in the report or ends in a clear error, never in a traceback."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_ray.config.schema import DataConfig
from dpo_ray.data.store import PairStore, prepare_pairs
from dpo_ray.data.tokenize import RecordTokenizer

LIMITS = DataConfig(max_prompt_tokens=200, max_completion_tokens=200)
GOOD: dict[str, Any] = {"prompt": "question?", "chosen": " yes", "rejected": " no"}
USER, ASSISTANT = {"role": "user", "content": "question?"}, {"role": "assistant", "content": "yes"}


def lines(*rows: Any) -> bytes:
    """Rows as JSON lines; bytes stand for a line as it is."""
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n"


DAMAGED_RECORDS: dict[str, tuple[Any, str]] = {
    "cut JSON": (b'{"prompt": "que', "not_json"),
    "two objects on a line": (b'{"prompt": "a"} {"prompt": "b"}', "not_json"),
    "not UTF-8": (b'{"prompt": "\xff\xfe", "chosen": "a", "rejected": "b"}', "not_json"),
    "a NUL byte": (b"\x00\x00\x00", "not_json"),
    "a number": (17, "not_a_record"),
    "a list": ([GOOD], "not_a_record"),
    "null": (None, "not_a_record"),
    "no fields": ({}, "missing_field"),
    "other fields": ({"question": "q", "answer": "a"}, "missing_field"),
    "no rejected": ({"prompt": "q", "chosen": "a"}, "missing_field"),
    "null chosen": (GOOD | {"chosen": None}, "missing_field|empty_field|bad_field"),
    "empty chosen": (GOOD | {"chosen": ""}, "empty_field"),
    "blank rejected": (GOOD | {"rejected": " \n"}, "empty_field"),
    "empty list": (GOOD | {"chosen": []}, "empty_field"),
    "a number for a text": (GOOD | {"chosen": 3.5}, "bad_field"),
    "a message without content": (
        {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [ASSISTANT]},
        "field",
    ),
    "a content of parts": (
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": [ASSISTANT]},
        "bad_field",
    ),
    "identical": (GOOD | {"rejected": " yes"}, "identical"),
    "identical messages": ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, "identical"),
    "a tie": ({"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]}, "tie"),
    "a score too few": ({"prompt": "q", "completions": ["a", "b"], "scores": [1]}, "bad_score"),
    "a NaN score": (b'{"prompt": "q", "completions": ["a", "b"], "scores": [1, NaN]}', "bad_score"),
    "a long prompt": (GOOD | {"prompt": "long " * 20_000}, "prompt_too_long"),
    "alike up to the limit": (
        GOOD | {"chosen": " same" * 300 + " yes", "rejected": " same" * 300 + " no"},
        "identical_after_truncation",
    ),
}

DAMAGED_FILES: dict[str, tuple[str, bytes]] = {
    "empty": ("pairs.jsonl", b""),
    "blank": ("pairs.jsonl", b"\n\n  \n"),
    "all records damaged": ("pairs.jsonl", lines({}, 3)),
    "JSON cut in the middle": ("pairs.json", json.dumps([GOOD, GOOD])[:-20].encode()),
    "JSON of no list": ("pairs.json", b"3"),
    "not JSON at all": ("pairs.json", b"\x89PNG\r\n\x1a\n"),
    "Parquet cut in the middle": ("pairs.parquet", b"PAR1" + bytes(50)),
    "Parquet by name only": ("pairs.parquet", lines(GOOD)),
    "Arrow by name only": ("pairs.arrow", lines(GOOD)),
    "an unknown ending": ("pairs.csv", b"prompt,chosen,rejected\n"),
}


def prepared(folder: Path, tokenizer: Any, name: str, content: bytes) -> PairStore:
    """The pairs of a file with that content."""
    file = folder / name
    file.write_bytes(content)
    shutil.rmtree(folder / "stores", ignore_errors=True)
    return prepare_pairs([str(file)], RecordTokenizer(tokenizer, LIMITS), folder=folder / "stores")


@pytest.mark.parametrize("kind", DAMAGED_RECORDS)
def test_damaged_records_are_reported_and_the_rest_is_kept(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    record, reason = DAMAGED_RECORDS[kind]
    store = prepared(tmp_path, tokenizer, "pairs.jsonl", lines(GOOD, record, GOOD | {"chosen": " perhaps"}))
    assert (store.report.read, len(store)) == (3, 2)
    ((dropped, tally),) = store.report.dropped.items()
    assert any(word in dropped for word in reason.split("|")), dropped
    assert f"{tmp_path / 'pairs.jsonl'}:2" in store.report.text("data.train"), tally


@pytest.mark.parametrize("kind", DAMAGED_FILES)
def test_a_damaged_file_is_a_clear_error(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    name, content = DAMAGED_FILES[kind]
    with pytest.raises(ValueError, match=r"data\.train") as error:
        prepared(tmp_path, tokenizer, name, content)
    assert name in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON, "content": JSON}
)
FIELD = JSON | st.lists(MESSAGE | JSON, max_size=3)
NAMES = ["prompt", "chosen", "rejected", "messages", "completions", "scores", "conversations", "system", "question"]
RECORD = st.dictionaries(st.sampled_from(NAMES), FIELD, max_size=6).map(json.dumps).map(str.encode)
LINE = RECORD | JSON.map(json.dumps).map(str.encode) | st.binary(max_size=40)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINE, min_size=1, max_size=4))
def test_arbitrary_lines_are_counted_or_rejected(tmp_path: Path, tokenizer: Any, noise: list[bytes]) -> None:
    content = lines(GOOD, *noise)
    store = prepared(tmp_path, tokenizer, "pairs.jsonl", content)
    written = sum(1 for line in content.split(b"\n") if line.strip())
    assert store.report.read == written
    assert len(store) + sum(tally.count for tally in store.report.dropped.values()) == written
    store.report.text("data.train")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["pairs.json", "pairs.parquet", "pairs.arrow"]), st.binary(max_size=200))
def test_arbitrary_bytes_are_counted_or_rejected(tmp_path: Path, tokenizer: Any, name: str, content: bytes) -> None:
    with pytest.raises(ValueError, match=f"data.train.*{name}"):
        prepared(tmp_path, tokenizer, name, content)
