"""A round on disk: the content of its files, that it reads back exactly, and that damage is reported."""

import json
import math

import pytest

from dpo_ray.rollout.collect import select_pairs
from dpo_ray.rollout.records import LINE_KEYS, RoundStore
from dpo_ray.rollout.selectors import best_vs_worst
from dpo_ray.types import TokenPair, TokenSample


@pytest.fixture
def store(tmp_path) -> RoundStore:
    return RoundStore(tmp_path)


@pytest.fixture
def written(store, group) -> RoundStore:
    """Round 3: one pair, one tie, one group with a single score; 15 tokens in 7 candidates."""
    groups = [
        group("a", "a a", "a a", index=0, policy_version=3),  # 2 + 3 + 3 tokens with the end of turn
        group("a", "b", index=1, policy_version=3),  # 2 + 2
        group("", "é", index=2, policy_version=2, finished=False),  # 1 + 2
    ]
    write(store, 3, groups, [[1.0, 3.0, 2.0], [0.5, 0.5], [math.nan, 1.0]])
    return store


def write(store, index, groups, scores):
    store.write(
        index,
        groups,
        scores,
        select_pairs(groups, scores, best_vs_worst),
        timings={"generate_s": 5.0, "judge_s": 0.5},
        weights_digest="abc",
        seed=11,
        sampling={"temperature": 1.0},
    )


def pairs_file(store, index=3):
    return store.path(index) / "pairs.jsonl"


def test_each_prompt_is_one_line_with_every_candidate_and_score(written):
    lines = [json.loads(text) for text in pairs_file(written).read_text().splitlines()]
    assert [line["prompt_index"] for line in lines] == [0, 1, 2]
    assert all(tuple(line) == (*LINE_KEYS, "fields") for line in lines)
    assert lines[0] == {
        "prompt": [{"role": "user", "content": "question 0"}],
        "prompt_index": 0,
        "prompt_token_ids": [100, 0],
        "candidates": [
            {"text": "a", "token_ids": [1, 0], "finished": True},
            {"text": "a a", "token_ids": [1, 2, 0], "finished": True},
            {"text": "a a", "token_ids": [1, 2, 0], "finished": True},
        ],
        "scores": [1.0, 3.0, 2.0],
        "chosen": 1,
        "rejected": 0,
        "dropped": None,
        "policy_version": 3,
        "seed": 7,
        "fields": {},
    }
    assert [line["dropped"] for line in lines] == [None, "tie", "bad_score"]
    assert lines[2]["scores"] == [None, 1.0]


def test_the_manifest_counts_candidates_and_dropped_groups_by_reason(written):
    assert json.loads((written.path(3) / "manifest.json").read_text()) == {
        "round": 3,
        "policy_version": 2,  # the oldest of the groups
        "counts": {
            "prompts": 3,
            "candidates": 7,
            "pairs": 1,
            "dropped": {"bad_score": 1, "tie": 1},
            "duplicates": 1,
            "empty": 1,
            "bad_scores": 1,
            "truncated": 2,
            "tokens": 15,  # 8 + 4 + 3
        },
        "scores": {"mean": pytest.approx(8 / 6), "chosen": 3.0, "rejected": 1.0},  # 1 + 3 + 2 + 0.5 + 0.5 + 1 over 6
        "timings": {"generate_s": 5.0, "judge_s": 0.5},
        "weights_digest": "abc",
        "seed": 11,
        "sampling": {"temperature": 1.0},
    }


def test_a_round_reads_back_as_the_sampled_tokens(written):
    data = written.read(3)
    assert data.index == 3
    assert data.policy_version == 2
    assert data.pairs == (TokenPair(prompt=(100, 0), chosen=(1, 2, 0), rejected=(1, 0)),)


def test_a_round_reports_its_scores_counts_and_timings(written):
    assert written.read(3).metrics == {
        "judge/mean_score": pytest.approx(8 / 6),
        "judge/chosen_score": 3.0,
        "judge/rejected_score": 1.0,
        "rollout/kept": 1,
        "rollout/dropped_tie": 1,
        "rollout/dropped_bad_score": 1,
        "rollout/duplicates": 1,
        "rollout/empty": 1,
        "rollout/bad_scores": 1,
        "rollout/mean_tokens": 15 / 7,
        "rollout/truncated_share": 2 / 7,
        "rollout/tokens_per_s": 3.0,
        "perf/generate_s": 5.0,
        "perf/judge_s": 0.5,
    }


def test_a_round_without_a_pair_has_no_mean_score_of_pairs(store, group):
    write(store, 0, [group("a", "b")], [[math.nan, math.nan]])
    data = store.read(0)
    assert data.pairs == ()
    assert not any(name.startswith("judge/") for name in data.metrics)


def test_there_is_one_sample_per_prompt(written):
    assert [sample.prompt for sample in written.read(3).samples] == [(100, 0), (100, 1), (100, 2)]


def test_samples_do_not_depend_on_the_scores(store, group):
    groups = [group("a", "a a", "a a a", index=index, seed=index) for index in range(20)]
    write(store, 0, groups, [[1.0, 2.0, 3.0]] * 20)
    write(store, 1, groups, [[3.0, 1.0, math.nan]] * 20)
    assert store.read(0).samples == store.read(1).samples


def test_every_candidate_is_sampled_equally_often(store, group):
    write(store, 0, [group("a", "a a", "a a a", index=i, seed=i) for i in range(300)], [[1.0, 2.0, 3.0]] * 300)
    lengths = [len(sample.completion) for sample in store.read(0).samples]
    assert all(70 <= lengths.count(n) <= 130 for n in (2, 3, 4))  # 100 each, standard deviation 8
    assert store.read(0).samples[0] in [TokenSample((100, 0), (*range(1, n), 0)) for n in (2, 3, 4)]


def test_texts_with_line_separators_and_quotes_survive(store, group):
    texts = ('line\u2028sep "quoted"\r\n\ttab', "日本語 🙂")
    write(store, 0, [group(*texts)], [[0.0, 1.0]])
    [line] = store.lines(0)
    assert tuple(candidate["text"] for candidate in line["candidates"]) == texts


def test_a_round_is_finished_once_it_has_a_manifest(written):
    assert written.finished(3)
    (written.path(3) / "manifest.json").unlink()
    assert not written.finished(3)


def test_an_unfinished_attempt_is_replaced_and_leaves_nothing_behind(store, group):
    store.path(0).mkdir(parents=True)
    pairs_file(store, 0).write_text('{"trunc')
    (store.path(0) / "pairs.jsonl.tmp").write_text("left by a crash")
    write(store, 0, [group("a", "b")], [[0.0, 1.0]])
    assert len(store.read(0).pairs) == 1
    assert sorted(path.name for path in store.path(0).iterdir()) == ["manifest.json", "pairs.jsonl"]


def test_a_finished_round_is_never_overwritten(written, group):
    with pytest.raises(FileExistsError, match="000003: the round is finished"):
        write(written, 3, [group("a", "b")], [[0.0, 1.0]])


def test_a_round_with_a_prompt_twice_or_without_groups_is_rejected(store, group):
    with pytest.raises(ValueError, match="round 0 has prompt 5 more than once"):
        write(store, 0, [group("a", "b", index=5), group("c", "d", index=5)], [[0.0, 1.0]] * 2)
    with pytest.raises(ValueError, match="round 0 has no group"):
        write(store, 0, [], [])


def test_a_truncated_line_is_reported(written):
    path = pairs_file(written)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"000003/pairs.jsonl:3: damaged: not valid JSON.*delete the folder"):
        written.read(3)


def test_bytes_that_are_not_text_are_reported(written):
    path = pairs_file(written)
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\xff" + second[1:] + third)
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: damaged"):
        written.read(3)


def test_a_missing_line_is_detected_by_the_count(written):
    path = pairs_file(written)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: damaged: .* prompts 2, the manifest counted prompts 3"):
        written.read(3)


def test_a_line_without_a_key_is_reported(written):
    path = pairs_file(written)
    path.write_text(path.read_text().replace('"scores"', '"score"', 1))
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: damaged: has no 'scores'"):
        written.read(3)


def test_a_damaged_manifest_is_reported(written):
    (written.path(3) / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json: damaged"):
        written.read(3)


def test_an_unfinished_round_cannot_be_read(store):
    with pytest.raises(FileNotFoundError, match="000009"):
        store.read(9)
