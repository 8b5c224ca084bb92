import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_ray.config.losses import Examples
from dpo_ray.config.schema import DataConfig
from dpo_ray.data import store as store_module
from dpo_ray.data.examples import _with_one_prompt
from dpo_ray.data.formats import Part
from dpo_ray.data.loader import checked_gaps
from dpo_ray.data.records import PairRecord, Problem, read_pairs
from dpo_ray.data.store import PairStore, prepare_pairs
from dpo_ray.data.tokenize import RecordTokenizer, TokenizedPair
from dpo_ray.data.tokenizer import ModelLimits
from dpo_ray.types import TokenPair

Write = Callable[..., str]
GOOD = [{"prompt": f"question {i}?", "chosen": " yes" * (i + 1), "rejected": " no"} for i in range(5)]
LIMITS = DataConfig(max_prompt_tokens=1024, max_completion_tokens=1024)


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Path) -> Callable[..., PairStore]:
    def prepare_sources(*sources: str, config: DataConfig = LIMITS, **kwargs: Any) -> PairStore:
        return prepare_pairs(sources, RecordTokenizer(tokenizer, config), folder=tmp_path / "stores", **kwargs)

    return prepare_sources


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The record numbers tokenized so far."""
    numbers, pair = [], RecordTokenizer.pair

    def counting(self: RecordTokenizer, record: Any) -> Any:
        numbers.append(record.number)
        return pair(self, record)

    monkeypatch.setattr(RecordTokenizer, "pair", counting)
    return numbers


def built(tmp_path: Path) -> list[Path]:
    """What lies in the folder of stores, besides the notes on sources."""
    return [path for path in (tmp_path / "stores").iterdir() if path.name != "sources"]


def test_the_store_gives_back_every_pair_and_where_it_came_from(prepare: Any, write: Write, tokenizer: Any):
    sources = [write(GOOD[:3], "one.jsonl"), write(["{", *GOOD[3:]], "two.jsonl")]
    store = prepare(*sources)
    direct: list[Any] = [
        RecordTokenizer(tokenizer, LIMITS).pair(record).pair  # pyrefly: ignore[bad-argument-type, missing-attribute]
        for record in read_pairs([Part(sources[0]), Part(write(GOOD[3:], "rest.jsonl"))])
    ]
    assert [store[i] for i in range(len(store))] == direct
    assert store[-1] == direct[-1]
    assert [store.record_of(i) for i in range(5)] == [
        *((sources[0], n) for n in (1, 2, 3)),
        *((sources[1], n) for n in (2, 3)),
    ]
    np.testing.assert_array_equal(store.lengths, [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in direct])
    assert store.lengths.dtype == np.int32
    with pytest.raises(IndexError):
        store[5]


@pytest.mark.parametrize(
    ("record", "gaps"),
    [
        ({"chosen": "yes", "rejected": "no", "score_chosen": 8.5, "score_rejected": 2}, [6.5]),
        ({"chosen": "yes", "rejected": "no", "rating_chosen": "5", "rating_rejected": "4"}, [1.0]),
        ({"response1": "no", "response2": "yes", "overall_preference": 3}, [3.0]),
        ({"completions": [{"text": "no", "score": 1}, {"text": "yes", "score": 5}, {"text": "perhaps", "score": 3}]},
         [4.0, 2.0]),
        ({"answers": ["yes", "no"], "ranks": [1, 4]}, [3.0]),
    ],
)  # fmt: skip
def test_pairs_with_scores_have_the_difference_of_the_two(record: Any, gaps: list[float], prepare: Any, write: Write):
    store = prepare(write([{"prompt": "question?"} | record]), config=LIMITS.model_copy(update={"pairs_per_prompt": 2}))
    assert checked_gaps(store).tolist() == gaps


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"chosen": "yes", "rejected": "no"}, "has none"),
        ({"chosen": "yes", "rejected": "no", "score_chosen": None, "score_rejected": 2}, "has none"),
        ({"response_0": "yes", "response_1": "no", "better_response_id": 0}, "has none"),
        ({"chosen": "yes", "rejected": "no", "score_chosen": 1, "score_rejected": 2}, "has a gap of -1"),
    ],
)
def test_a_pair_that_cannot_be_weighted_is_named_with_its_file_and_number(
    record: Any, found: str, prepare: Any, write: Write
):
    scored = {"chosen": "yes", "rejected": "no", "score_chosen": 2, "score_rejected": 1}
    store = prepare(file := write([{"prompt": "a?"} | scored, {"prompt": "b?"} | record]))
    with pytest.raises(ValueError, match=re.escape(f"{file}:2 {found}; set loss.weighting: none")):
        checked_gaps(store)


def test_the_pairs_of_a_ranked_list_know_that_they_share_their_prompt_and_completions(prepare: Any, write: Write):
    ranked = {"prompt": "sky?", "completions": [" red", " blue", " green"], "scores": [1, 3, 2]}
    source = write([GOOD[0], ranked, GOOD[1], ranked])
    assert prepare(source).members is None, "one pair per prompt"
    store = prepare(source, config=LIMITS.model_copy(update={"pairs_per_prompt": 2}))
    prompts, *completions = store.members.T.tolist()
    assert prompts == [1, 2, 2, 3, 4, 4], "records, not texts"
    # Blue and red differ by 2, blue and green by 1, green and red too: of equal differences the first counts.
    assert [of_pair[1:3] for of_pair in completions] == [[1, 1], [0, 2]], "of the first ranked list"


@pytest.mark.parametrize("examples", ["unpaired", "unpaired_kl"])
def test_completions_without_a_pair_stand_beside_the_next_ones_or_alone(
    tokenizer: Any, write: Write, tmp_path: Path, examples: Examples
):
    records = [{"prompt": f"q{i}?", "completion": " a" * (i + 1), "label": i != 1} for i in range(3)]
    made = RecordTokenizer(tokenizer, LIMITS, examples=examples)
    store = prepare_pairs([write(records)], made, folder=tmp_path / "stores")
    pairs = [store[i] for i in range(3)]
    assert [pair.unpaired for pair in pairs] == [1, -1, 1]
    own = [pair.chosen if pair.unpaired > 0 else pair.rejected for pair in pairs]
    assert len(set(own)) == 3
    beside = [pair.rejected if pair.unpaired > 0 else pair.chosen for pair in pairs]
    assert beside == ([()] * 3 if examples == "unpaired" else [own[1], own[2], own[0]])


def test_both_completions_of_a_pair_stand_beside_one_of_the_next_record(tokenizer: Any, write: Write, tmp_path: Path):
    made = RecordTokenizer(tokenizer, LIMITS, examples="unpaired_kl")
    store = prepare_pairs([write(GOOD[:3])], made, folder=tmp_path / "stores")
    pairs = [store[i] for i in range(6)]
    assert [pair.unpaired for pair in pairs] == [1, -1] * 3
    good = [pair.chosen for pair in pairs[::2]]
    assert [pair.rejected for pair in pairs[::2]] == [good[1], good[2], good[0]]
    assert [pair.chosen for pair in pairs[1::2]] == [good[1], good[2], good[0]]
    assert (store.report.read, store.report.kept, store.report.examples) == (3, 3, 6)
    assert store.report.rejected is not None
    assert store.report.rejected.max == len(pairs[1].rejected), "the report is of the completions with a label only"


def ids_item(prompt: int, chosen: str, rejected: str, limit: int = 6) -> tuple[PairRecord, TokenizedPair]:
    """A pair of the prompt "abcd" with one token per character, and its boundary after ``prompt`` of them."""
    whole = [tuple(map(ord, f"abcd{text}"))[prompt:] for text in (chosen, rejected)]
    pair = TokenPair(tuple(b"abcd")[:prompt], whole[0][:limit], whole[1][:limit])
    removed = len(whole[0][limit:]), len(whole[1][limit:])
    return PairRecord("q", chosen, rejected, "f", 1), TokenizedPair(pair, removed=removed)


def test_all_pairs_of_a_record_have_the_prompt_before_every_completion():
    # The tokenizer merges the last token of the prompt with the first of a completion, as in the second pair.
    problems: list[Problem] = []
    items = [ids_item(4, "123456", "x"), ids_item(3, "x", "yz")]
    first, second = (result for _, result in _with_one_prompt(items, problems, 6))
    assert first.pair == TokenPair((97, 98, 99), tuple(b"d12345"), tuple(b"dx")), "six tokens, from the prompt on"
    assert second.pair == TokenPair((97, 98, 99), tuple(b"dx"), tuple(b"dyz"))
    assert (first.removed, first.notes) == ((1, 0), (("completion_cut", ""),))
    assert (second.removed, second.notes, problems) == ((0, 0), (), [])


def test_a_pair_that_the_prompt_of_another_makes_equal_is_left_out():
    problems: list[Problem] = []
    items = [ids_item(4, "12", "13", limit=2), ids_item(3, "x", "yz", limit=2)]
    ((_, result),) = _with_one_prompt(items, problems, 2)
    assert result.pair == TokenPair((97, 98, 99), tuple(b"dx"), tuple(b"dy"))
    assert [(problem.reason, problem.detail) for problem in problems] == [
        ("identical_after_truncation", "chosen and rejected: data.max_completion_tokens is 2")
    ]


def test_bad_records_are_counted_and_the_rest_is_kept(prepare: Any, write: Write):
    source = write(
        [
            GOOD[0],
            '{"prompt": "broken',
            {**GOOD[1], "chosen": ""},
            {**GOOD[2], "chosen": " no"},
            {**GOOD[3], "prompt": "sky " * 20_000},
            GOOD[4],
        ]
    )
    store = prepare(source)
    assert [store.record_of(i)[1] for i in range(len(store))] == [1, 6]
    dropped = {reason: (tally.count, tally.first[0].number) for reason, tally in store.report.dropped.items()}
    assert dropped == {"not_json": (1, 2), "empty_field": (1, 3), "identical": (1, 4), "prompt_too_long": (1, 5)}
    text = store.report.text()
    assert text.startswith("data: 6 records read, 2 kept, 4 dropped\n")
    assert re.search(rf"{re.escape(source)}:5 \(\d{{5}} tokens; data.max_prompt_tokens is 1024\)", text)


RANKED = {"prompt": "sky?", "completions": ["blue", "grey", "pink", "red"], "scores": [4, 3, 2, 1]}


@pytest.mark.parametrize(
    ("middle", "scores", "reason"),
    [
        (" ", [4, 3, 2, 1], "field empty: completions[1]"),
        ("grey", [4, None, 2, 1], "score missing or not finite: completions[1]"),
        ("\n\nHuman: Hm?\n\nAssistant: Hm.", [4, 3, 2, 1], "field not usable: completions[1]"),
        ("grey " * 400, [4, 3, 2, 1], "longer than the model's positions: completions[1]: "),
        ("blue\n", [4, 3, 2, 1], "chosen equal to rejected: completions[0] and completions[1] have the same tokens"),
    ],
)
def test_a_ranked_list_goes_on_without_a_completion_that_cannot_be_used(
    middle: str, scores: list[Any], reason: str, tokenizer: Any, write: Write, tmp_path: Path
):
    tokenizer.chat_template = tokenizer.chat_template.replace("['content'] }", "['content'] | trim }")
    made = RecordTokenizer(tokenizer, LIMITS, ModelLimits(positions=500), examples="lists")
    record = RANKED | {"completions": ["blue", middle, "pink", "red"], "scores": scores}
    store = prepare_pairs([write([record])], made, folder=tmp_path / "stores")
    texts = [
        [tokenizer.decode(ids).split("<")[0] for ids in (pair.chosen, pair.rejected)]
        for pair in map(store.__getitem__, range(2))
    ]
    assert texts == [["blue", "pink"], ["pink", "red"]]
    assert store.members is not None
    assert len({*store.members[:, 1:].ravel().tolist()}) == 3, "neighbors share pink"
    assert (store.report.read, store.report.kept, store.report.dropped) == (1, 1, {})
    assert store.report.notes["left_out"].count == 1
    assert store.report.notes["left_out"].first[0].detail.startswith(reason)


def test_a_list_of_which_one_completion_remains_is_dropped(tokenizer: Any, write: Write, tmp_path: Path):
    made = RecordTokenizer(tokenizer, LIMITS, ModelLimits(positions=500), examples="lists")
    long = RANKED | {"completions": ["blue", "grey " * 400], "scores": [2, 1]}
    report = prepare_pairs([write([long, RANKED])], made, folder=tmp_path / "stores").report
    assert (report.read, report.kept, report.examples) == (2, 1, 3)
    assert report.dropped["too_long_for_model"].first[0].detail.startswith("completions[1]: ")


def test_records_read_are_those_kept_and_dropped_whichever_pair_of_a_record_cannot_be_used(
    tokenizer: Any, write: Write, tmp_path: Path
):
    long = "grey " * 400
    records = [
        RANKED | {"completions": ["blue", "grey", "pink", long]},  # the first pair, best against worst, is too long
        RANKED | {"completions": [long, "grey", "pink", "red"]},
        RANKED | {"completions": [long, long + "!"], "scores": [2, 1]},
        RANKED,
    ]
    made = RecordTokenizer(tokenizer, LIMITS.model_copy(update={"pairs_per_prompt": 6}), ModelLimits(positions=500))
    report = prepare_pairs([write(records)], made, folder=tmp_path / "stores").report
    assert (report.read, report.kept, report.examples) == (4, 3, 3 + 3 + 6)
    assert {reason: tally.count for reason, tally in report.dropped.items()} == {"too_long_for_model": 1}
    assert report.notes["left_out"].count == 3 + 3
    assert "4 records read, 3 kept as 12 pairs or completions, 1 dropped" in report.text()


def test_tokens_are_memory_mapped(prepare: Any, write: Write):
    store = prepare(write(GOOD))
    assert isinstance(store._tokens[0], np.memmap)
    assert isinstance(store.lengths, np.memmap)
    assert not store.lengths.flags.writeable


def test_a_second_preparation_tokenizes_nothing_and_reports_the_same(prepare: Any, write: Write, tokenized: list[int]):
    source = write([*GOOD, "{"])
    first = prepare(source)
    assert tokenized == [1, 2, 3, 4, 5]
    second = prepare(source)
    assert tokenized == [1, 2, 3, 4, 5]
    assert list(second) == list(first)
    assert second.report == first.report
    assert second.digest == first.digest


def test_a_moved_file_opens_the_same_store_under_its_new_name(prepare: Any, write: Write, tokenized: list[int]):
    first = prepare(write([*GOOD, "{"]))
    moved = write([*GOOD, "{"], "moved.jsonl")
    second = prepare(moved)
    assert len(tokenized) == 5
    assert second.digest == first.digest
    assert second.record_of(0) == (moved, 1)
    assert second.report.dropped["not_json"].first[0].source == moved


def test_a_changed_file_template_or_limit_gives_another_store(prepare: Any, write: Write, tokenizer: Any):
    digests = {prepare(write(GOOD)).digest, prepare(write(GOOD[:4])).digest}
    digests.add(prepare(write(GOOD), config=DataConfig(max_completion_tokens=3)).digest)
    tokenizer.chat_template += " "
    digests.add(prepare(write(GOOD)).digest)
    assert len(digests) == 4


def test_limit_applies_to_training_records_only(prepare: Any, write: Write):
    config = DataConfig(limit=2)
    assert len(prepare(write(GOOD), config=config)) == 2
    assert len(prepare(write(GOOD), config=config, kind="eval")) == 5


def test_strict_makes_a_dropped_record_an_error_also_when_the_store_exists(prepare: Any, write: Write):
    source = write([*GOOD, "{"])
    strict = DataConfig(strict=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"data\.train: data\.strict is true[^$]*pairs\.jsonl:6 \(Expecting"):
            prepare(source, config=strict)
    assert len(prepare(source, config=DataConfig())) == 5
    assert len(prepare(write(GOOD, "clean.jsonl"), config=strict)) == 5


def test_a_data_set_of_which_nothing_is_left_leaves_no_store(prepare: Any, write: Write, tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.eval: no record .*can be used\ndata\.eval: 1 records read, 0 kept"):
        prepare(write(["{"]), kind="eval")
    assert built(tmp_path) == []


def test_of_two_concurrent_builders_the_first_to_finish_wins(
    prepare: Any, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write(GOOD)
    join = store_module._join

    def overtaken(*args: Any) -> Any:
        monkeypatch.setattr(store_module, "_join", join)
        prepare(source)
        return join(*args)

    monkeypatch.setattr(store_module, "_join", overtaken)
    assert len(prepare(source)) == 5
    (folder,) = built(tmp_path)
    assert not folder.name.startswith(".")


def test_a_failed_build_leaves_nothing_behind(
    prepare: Any, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RecordTokenizer, "pair", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(write(GOOD))
    assert built(tmp_path) == []


def test_the_error_names_a_damaged_store(prepare: Any, write: Write, tmp_path: Path):
    source = write(GOOD)
    prepare(source)
    (folder,) = built(tmp_path)
    tokens = folder / "000000.tokens.i32"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tokens\.i32: has \d+ bytes, expected \d+; delete the folder"):
        prepare(source)


def test_a_store_of_many_parts_is_that_of_one(
    prepare: Any, write: Write, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sources = [write(["{", *GOOD[:3]], "one.jsonl"), write([*GOOD[3:], "{", "{", "{"], "two.jsonl")]
    whole, told = prepare(*sources), []
    monkeypatch.setattr(store_module, "PART_RECORDS", 2)

    def backwards(function: Any, parts: Any) -> Any:
        return reversed([function(part) for part in reversed(parts)])

    parts = prepare_pairs(
        sources, RecordTokenizer(tokenizer, LIMITS), folder=tmp_path / "other", run_parts=backwards,
        on_progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert [parts[i] for i in range(5)] == [whole[i] for i in range(5)]
    assert parts.report == whole.report
    assert parts.report.dropped["not_json"].count == 4
    assert [parts.name_of(i) for i in range(5)] == [whole.name_of(i) for i in range(5)]
    assert parts.sizes == whole.sizes == (3, 2)
    assert parts.digest == whole.digest
    assert told == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


def test_the_error_names_parts_that_are_not_visible_on_this_node(prepare: Any, write: Write):
    with pytest.raises(ValueError, match=r"reference\.cache_dir: .*tokens\.i32 was written on another node"):
        prepare(write(GOOD), run_parts=lambda function, parts: [])


def test_an_unchanged_file_is_read_through_once(prepare: Any, write: Write, monkeypatch: pytest.MonkeyPatch):
    source, read = write(GOOD), []
    digest = store_module.source_digest
    monkeypatch.setattr(store_module, "source_digest", lambda name: read.append(name) or digest(name))
    first, second = prepare(source), prepare(source)
    assert read == [source]
    assert first.digest == second.digest
    changed = prepare(write([*GOOD[:4], GOOD[4] | {"rejected": " na"}]))
    assert read == [source, source]
    assert changed.digest != first.digest


def test_a_saved_dataset_is_prepared_once(prepare: Any, tmp_path: Path, tokenized: list[int]):
    import datasets

    datasets.Dataset.from_list(GOOD).save_to_disk(tmp_path / "saved")
    assert len(prepare(str(tmp_path / "saved"))) == len(prepare(str(tmp_path / "saved"))) == 5
    assert len(tokenized) == 5
