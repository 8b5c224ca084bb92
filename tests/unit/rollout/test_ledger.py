"""A round on disk: its files, that it reads back exactly, and that an interrupted one is continued."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from dpo_ray.data.loader import BatchShape, PairLoader, checked_gaps
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.rollout.open_round import LINE_KEYS, Outcome
from dpo_ray.rollout.selectors import best_vs_worst, select_pairs
from dpo_ray.types import Dropped, Judgement, Prompt, ScoredPair, TokenPair


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path)


def outcome(group, scores, position=None):
    choice = select_pairs(best_vs_worst, group, scores)
    return Outcome(
        group.prompt, group.prompt.index if position is None else position, choice, group, Judgement(tuple(scores))
    )


def failed(index):
    prompt = Prompt(index, ({"role": "user", "content": "?"},), (100, index))
    return Outcome(prompt, index, Dropped("failed_judge"), error="RuntimeError: no")


def write(ledger, index, outcomes, oldest=0, finish=True):
    with_lines = ledger.open(index, oldest=oldest)
    for each in outcomes:
        with_lines.append(each)
    if finish:
        with_lines.finish(timings={"generate_s": 5.0, "judge_s": 0.5}, seed=11)
    return with_lines


@pytest.fixture
def written(ledger, group) -> Ledger:
    """Round 3: one pair, one tie, one group with a single score; 15 tokens in 7 candidates."""
    outcomes = [
        outcome(group("a", "a a", "a a", index=0, policy_version=3), [1.0, 3.0, 2.0]),  # 2 + 3 + 3 tokens
        outcome(group("a", "b", index=1, policy_version=3), [0.5, 0.5]),  # 2 + 2
        outcome(group("", "é", index=2, policy_version=2, finished=False), [math.nan, 1.0]),  # 1 + 2
    ]
    write(ledger, 3, outcomes)
    return ledger


def pairs_file(ledger, index=3):
    return ledger.path(index) / "pairs.jsonl"


def test_the_gaps_of_a_round_are_in_the_order_of_its_pairs(ledger, group):
    three, two = group("a", "b", "c", index=0), group("d", "e", index=1)
    pairs = (ScoredPair(2, 0), ScoredPair(2, 1))
    several = Outcome(three.prompt, 1, pairs, three, Judgement((0.0, 1.0, 4.0)))
    adjusted = Outcome(two.prompt, 0, (ScoredPair(0, 1, gap=0.25),), two, Judgement((1.0, 2.0)))
    write(ledger, 0, [several, adjusted])
    pairs_of_round = ledger.read(0).pairs
    gaps = checked_gaps(pairs_of_round)
    assert gaps.tolist() == [0.25, 4.0, 3.0], "positions 0, 1 and 1"
    step = next(
        PairLoader(pairs_of_round, BatchShape(0, 1, 64, 0.0), pairs_per_step=3, seed=0, shuffle=False, gaps=gaps)
    )
    (micro,) = step.micro_batches
    assert micro.row.weights.tolist() == pytest.approx([3 * gaps[pair] / 7.25 for pair in micro.pairs])
    assert [line["pairs"][0].get("gap") for line in ledger.lines(0)] == [None, 0.25]


def test_the_gaps_of_an_interrupted_round_survive(ledger, group):
    write(ledger, 0, [outcome(group("a", "b", index=0), [0.0, 1.5])], finish=False).close()
    write(ledger, 0, [outcome(group("a", "b", index=1), [0.5, 0.25])])
    assert ledger.read(0).pairs.gaps.tolist() == [1.5, 0.25]


@pytest.mark.parametrize("last", range(4), ids=["texts", "gaps", "pairs", "manifest"])
def test_a_round_whose_late_judging_was_killed_at_any_file_is_judged_again(ledger, group, monkeypatch, last):
    groups, rename, renamed = [group("a", "b", index=index) for index in range(3)], Path.replace, count()

    def killed(draft, target):
        if next(renamed) == last:
            raise KeyboardInterrupt
        return rename(draft, target)

    opened = ledger.open(0, oldest=0)
    for each in groups:
        opened.append(Outcome(each.prompt, each.prompt.index, (), each))
    opened.finish(judged=False)
    judge = partial(ledger.judge, 0, [0.0, 1.0] * 3, partial(select_pairs, best_vs_worst), max_failed_share=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            judge()
    assert not ledger.read(0).judged
    judge()
    assert (ledger.read(0).judged, len(ledger.read(0).pairs)) == (True, 3)
    assert ledger.read(0).pairs.gaps.tolist() == [1.0] * 3


def test_a_round_with_other_gaps_than_pairs_is_damaged(written):
    with (written.path(3) / "gaps.f64").open("ab") as file:
        file.write(bytes(8))
    with pytest.raises(ValueError, match=r"damaged: 2 gaps of scores for 1 pairs; delete the folder of this round"):
        _ = written.read(3).pairs.gaps


def test_each_prompt_is_one_line_with_every_candidate_score_and_pair(written):
    lines = [json.loads(text) for text in pairs_file(written).read_text().splitlines()]
    assert [line["prompt_index"] for line in lines] == [0, 1, 2]
    assert all(set(LINE_KEYS) <= set(line) for line in lines)
    assert lines[0] == {
        "prompt": [{"role": "user", "content": "question 0"}],
        "prompt_index": 0,
        "position": 0,
        "tokens": {"start": 0, "prompt": 2},
        "candidates": [
            {"text": "a", "tokens": 2, "finished": True, "versions": [3, 3]},
            {"text": "a a", "tokens": 3, "finished": True, "versions": [3, 3]},
            {"text": "a a", "tokens": 3, "finished": True, "versions": [3, 3]},
        ],
        "scores": [1.0, 3.0, 2.0],
        "judge": {},
        "pairs": [{"chosen": 1, "rejected": 0, "chosen_score": 3.0, "rejected_score": 1.0}],
        "left_out": {},
        "dropped": None,
        "error": None,
        "seed": 7,
        "fields": {},
    }
    assert [line["dropped"] for line in lines] == [None, "tie", "bad_score"]
    assert lines[2]["scores"] == [None, 1.0]


def test_the_manifest_counts_candidates_versions_and_dropped_groups_by_reason(written):
    assert json.loads((written.path(3) / "manifest.json").read_text()) == {
        "round": 3,
        "policy_version": 2,  # the oldest of the groups
        "policy_versions": {"2": 2, "3": 5},
        "counts": {
            "prompts": 3,
            "candidates": 7,
            "pairs": 1,
            "kept": 1,
            "dropped": {"bad_score": 1, "tie": 1},
            "left_out": {},
            "stale": 0,
            "duplicates": 1,
            "empty": 1,
            "bad_scores": 1,
            "truncated": 2,
            "tokens": 15,  # 8 + 4 + 3
            "tokens_stored": 21,  # and three prompts of two
            "tokens_generated": 15,
        },
        # 1 + 3 + 2 + 0.5 + 0.5 + 1 over 6; 3 + 0.5 + 1 over 3
        "scores": {"mean": pytest.approx(8 / 6), "best": 1.5, "chosen": 3.0, "rejected": 1.0},
        "weights_digests": {},
        "judge": {"length_correlation": pytest.approx(math.sqrt(3) / 2)},  # scores 1, 3, 2 of 2, 3, 3 tokens
        "timings": {"generate_s": 5.0, "judge_s": 0.5},
        "seed": 11,
    }


def test_a_round_reads_back_as_the_sampled_tokens_with_its_metrics(written):
    data = written.read(3)
    assert (data.index, data.policy_version, len(data.pairs)) == (3, 2, 1)
    assert data.pairs[0] == TokenPair(prompt=(100, 0), chosen=(1, 2, 0), rejected=(1, 0))
    assert data.pairs.tokens(0).tolist() == [100, 0, 1, 2, 0, 1, 0]
    assert data.pairs.lengths.tolist() == [[2, 3, 2]]
    assert data.pairs.members is None
    assert data.metrics == {
        "judge/mean_score": pytest.approx(8 / 6),
        "judge/best_score": 1.5,
        "judge/length_correlation": pytest.approx(math.sqrt(3) / 2),
        "judge/chosen_score": 3.0,
        "judge/rejected_score": 1.0,
        "rollout/kept": 1,
        "rollout/dropped_tie": 1,
        "rollout/dropped_bad_score": 1,
        "rollout/duplicates": 1,
        "rollout/empty": 1,
        "rollout/bad_scores": 1,
        "rollout/stale": 0,
        "rollout/mean_tokens": 15 / 7,
        "rollout/truncated_share": 2 / 7,
        "rollout/tokens_per_s": 3.0,
        "perf/generate_s": 5.0,
        "perf/judge_s": 0.5,
    }


def test_pairs_that_were_left_out_of_groups_with_others_are_counted_by_reason(ledger, group):
    groups = [outcome(group("a", "b", "c", index=index), [0.0, 1.0, 1.0]) for index in range(2)]
    write(ledger, 0, [*groups, outcome(group("a", "b", "c", index=2), [1.0, 1.0, 1.0])])
    assert next(ledger.lines(0))["left_out"] == {"tie": 1, "not_picked": 1}
    assert ledger.manifest(0)["counts"]["left_out"] == {"not_picked": 2, "tie": 2}
    metrics = ledger.read(0).metrics
    assert (metrics["rollout/left_out_tie"], metrics["rollout/left_out_not_picked"]) == (2, 2)
    assert metrics["rollout/dropped_tie"] == 1


def test_pairs_are_in_the_order_of_the_prompts_however_the_groups_finished(ledger, group):
    groups = [outcome(group("a", "b b", index=index), [0.0, 1.0], position=9 - index) for index in (4, 0, 7)]
    write(ledger, 0, groups)
    pairs = ledger.read(0).pairs
    assert [pairs[i].prompt for i in range(3)] == [(100, 7), (100, 4), (100, 0)]  # positions 2, 5 and 9


def test_several_pairs_of_a_prompt_share_its_tokens(ledger, group):
    three = group("a", "b b", "c c c")
    choice = (ScoredPair(2, 0), ScoredPair(2, 1))
    write(ledger, 0, [Outcome(three.prompt, 0, choice, three, Judgement((0.0, 1.0, 2.0)))])
    pairs = ledger.read(0).pairs
    assert [pairs[0].chosen, pairs[1].chosen] == [(1, 2, 3, 0)] * 2
    assert [pairs[0].rejected, pairs[1].rejected] == [(1, 0), (1, 2, 0)]
    prompts, chosen, rejected = np.array(pairs.members).T
    assert prompts[0] == prompts[1]
    assert chosen[0] == chosen[1]
    assert rejected[0] != rejected[1]


def test_a_round_without_a_pair_has_no_mean_score_of_pairs(ledger, group):
    write(ledger, 0, [outcome(group("a", "b"), [math.nan, math.nan])])
    data = ledger.read(0)
    assert len(data.pairs) == 0
    assert not any(name.startswith("judge/") for name in data.metrics)


def test_fields_that_json_does_not_have_are_null_or_text(ledger, group):
    plain = group("a", "b")
    fields = {"weights": (1.0, math.nan), "nested": {"x": math.inf}, "half": "\ud83d"}
    prompt = Prompt(0, plain.prompt.messages, plain.prompt.token_ids, fields)
    write(ledger, 0, [outcome(replace(plain, prompt=prompt), [0.0, 1.0])])
    [line] = ledger.lines(0)
    assert line["fields"] == {"weights": [1.0, None], "nested": {"x": None}, "half": "?"}


def test_texts_with_line_separators_and_quotes_survive(ledger, group):
    texts = ('line\u2028sep "quoted"\r\n\ttab', "日本語 🙂")
    write(ledger, 0, [outcome(group(*texts), [0.0, 1.0])])
    [line] = ledger.lines(0)
    assert tuple(candidate["text"] for candidate in line["candidates"]) == texts


@pytest.mark.parametrize("torn", [0, 1, 40], ids=["between groups", "before the line end", "in a line"])
def test_an_interrupted_round_is_continued_and_equals_an_undisturbed_one(ledger, tmp_path, group, torn):
    outcomes = [outcome(group("a", "b " * (i + 1), index=i), [0.0, 1.0]) for i in range(6)]
    write(ledger, 0, outcomes[:4], finish=False)
    if torn:
        text = pairs_file(ledger, 0).read_bytes()
        pairs_file(ledger, 0).write_bytes(text[:-torn])
    assert not ledger.finished(0)
    opened = ledger.open(0, oldest=0)
    assert opened.done == set(range(3 if torn else 4))
    for each in outcomes:
        if each.prompt.index not in opened.done:
            opened.append(each)
    opened.finish(timings={"generate_s": 5.0, "judge_s": 0.5}, seed=11)
    undisturbed = Ledger(tmp_path / "other")
    write(undisturbed, 0, outcomes)
    assert pairs_file(ledger, 0).read_bytes() == pairs_file(undisturbed, 0).read_bytes()
    assert (ledger.path(0) / "tokens.i32").read_bytes() == (undisturbed.path(0) / "tokens.i32").read_bytes()
    continued, whole = ledger.manifest(0), undisturbed.manifest(0)
    generated = sum(
        candidate["tokens"] for line in list(ledger.lines(0))[3 if torn else 4 :] for candidate in line["candidates"]
    )
    assert continued["counts"].pop("tokens_generated") == generated < whole["counts"].pop("tokens_generated")
    assert continued == whole


@pytest.mark.parametrize(("before", "named"), [(0, ["again"]), (1, ["first", "again"])])
def test_the_digests_of_a_version_that_was_trained_again_are_those_that_may_have_generated_groups_of_the_round(
    ledger, group, before, named
):
    for digest, of_process in (("first", range(before)), ("again", range(1, 3))):
        opened = ledger.open(0, oldest=0)
        opened.note_digests({3: digest, 4: "not used"})
        for index in of_process:
            opened.append(outcome(group("a", "b", index=index, policy_version=3), [0.0, 1.0]))
        opened.close()
    ledger.open(0, oldest=0).finish()
    assert ledger.manifest(0)["weights_digests"] == {"3": named}


def test_lines_whose_tokens_did_not_reach_the_disk_are_collected_again(ledger, group):
    write(ledger, 0, [outcome(group("a", "b", index=i), [0.0, 1.0]) for i in range(3)], finish=False)
    tokens = ledger.path(0) / "tokens.i32"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    assert ledger.open(0, oldest=0).done == {0, 1}


def test_groups_that_failed_are_counted_and_collected_again_if_their_round_is_continued(ledger, group):
    opened = write(ledger, 0, [failed(0), outcome(group("a", "b", index=1), [0.0, 1.0])], finish=False)
    assert opened.failed == 1
    again = ledger.open(0, oldest=0)
    assert again.done == {1}
    again.append(failed(0))
    again.finish()
    assert ledger.read(0).metrics["rollout/dropped_failed_judge"] == 1
    assert next(line for line in ledger.lines(0) if line["error"])["error"] == "RuntimeError: no"


def test_groups_of_too_old_a_policy_are_dropped_counted_and_collected_again(written, group):
    assert not written.stale(3, oldest=2)
    assert written.stale(3, oldest=3)
    opened = written.open(3, oldest=3)
    assert not written.finished(3)
    assert (opened.done, opened.stale) == ({0, 1}, 1)
    opened.append(outcome(group("a", "b b", index=2, policy_version=3), [0.0, 1.0]))
    opened.finish()
    data = written.read(3)
    assert (data.policy_version, len(data.pairs), data.metrics["rollout/stale"]) == (3, 2, 1)
    assert [pair.chosen for pair in map(data.pairs.__getitem__, range(2))] == [(1, 2, 0), (1, 2, 0)]


def test_a_prompt_is_appended_once(ledger, group):
    opened = write(ledger, 0, [outcome(group("a", "b", index=5), [0.0, 1.0])], finish=False)
    with pytest.raises(ValueError, match=r"prompt 5 occurs twice in .*000000"):
        opened.append(outcome(group("c", "d", index=5), [0.0, 1.0]))


def test_bytes_that_are_not_text_and_lines_without_a_key_are_reported(written):
    path = pairs_file(written)
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\xff" + second[1:] + third)
    with pytest.raises(ValueError, match=r"000003/pairs.jsonl:2: damaged: not valid JSON.*delete the folder"):
        written.open(3, oldest=0)
    path.write_bytes(first.replace(b'"scores"', b'"score"') + second + third)
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: damaged: has no 'scores'"):
        list(written.lines(3))


def test_files_that_do_not_match_the_manifest_are_reported(written):
    tokens = written.path(3) / "tokens.i32"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"000003: damaged: 1 pairs and 20 tokens, the manifest counted 1 and 21"):
        written.read(3)
    (written.path(3) / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json: damaged"):
        written.read(3)


def test_a_round_whose_groups_all_failed_has_no_completions(ledger):
    write(ledger, 0, [failed(0), failed(1)])
    assert ledger.samples(0).lengths.shape == (0, 2)


def test_an_unfinished_round_cannot_be_read(ledger):
    with pytest.raises(FileNotFoundError, match="000009"):
        ledger.read(9)


def test_a_run_with_other_prompts_under_the_same_path_is_rejected(ledger):
    ledger.validate_prompts("abc", 10)
    ledger.validate_prompts("abc", 10)
    with pytest.raises(ValueError, match=r"online.prompts: 12 usable prompts, which are not the 10 that .* started"):
        ledger.validate_prompts("def", 12)


def test_texts_and_tokens_of_old_rounds_are_deleted_and_their_manifests_kept(ledger, group):
    for index in range(5):
        write(ledger, index, [outcome(group("a", "b"), [0.0, 1.0])])
    ledger.forget(before=4, keep=1)  # rounds 0 to 3 are trained; the last of them stays
    assert [(ledger.path(index) / "manifest.json").exists() for index in range(5)] == [True] * 5
    assert [ledger.finished(index) for index in range(5)] == [False, False, False, True, True], "others are no data"
    assert [pairs_file(ledger, index).exists() for index in range(5)] == [False, False, False, True, True]
