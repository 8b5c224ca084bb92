"""The pure half of judges that are language models: comparisons, prompts, replies, scores."""

import math
from collections import Counter

import pytest

from dpo_ray.config import Component
from dpo_ray.rollout.judges import bind_judge
from dpo_ray.rollout.judges.answers import parse_score, parse_winner
from dpo_ray.rollout.judges.comparisons import Outcome, choose_pairs, swap_agreement, win_rates
from dpo_ray.rollout.judges.modes import Pairwise, Score
from dpo_ray.rollout.judges.prompts import fill, transcript

# --------------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("candidates", range(2, 11))
def test_any_number_of_comparisons_covers_the_candidates_about_equally_and_repeats_no_pair(candidates):
    for seed in range(5):
        pairs = choose_pairs(candidates, 1000, seed)
        assert len(pairs) == len(set(pairs)) == candidates * (candidates - 1) // 2
        compared = Counter({candidate: 0 for candidate in range(candidates)})
        for first, second in pairs:
            assert first < second
            compared.update((first, second))
            assert max(compared.values()) - min(compared.values()) <= 2


@pytest.mark.parametrize("candidates", range(2, 11))
def test_one_comparison_less_than_there_are_candidates_links_them_all(candidates):
    linked = {0}
    pairs = choose_pairs(candidates, candidates - 1, seed=3)
    for _ in pairs:
        linked |= {member for pair in pairs if linked & set(pair) for member in pair}
    assert linked == set(range(candidates))


def test_the_pairs_of_a_group_depend_on_its_seed_only():
    assert choose_pairs(8, 6, seed=1) == choose_pairs(8, 6, seed=1)
    assert len({tuple(choose_pairs(8, 6, seed)) for seed in range(10)}) > 5


def test_win_rates_are_means_over_comparisons_and_an_order_without_a_verdict_is_a_tie():
    outcomes = [Outcome(0, 1, 1.0, 1.0), Outcome(0, 2, 1.0, 0.0), Outcome(1, 2, None, 1.0)]
    assert win_rates(4, outcomes)[:3] == [0.75, 0.375, 0.375]  # (1 + 0.5) / 2, (0 + 0.75) / 2, (0.5 + 0.25) / 2
    assert math.isnan(win_rates(4, outcomes)[3])


def test_swap_agreement_counts_pairs_whose_orders_name_the_same_winner():
    same, other, tie, half = Outcome(0, 1, 1, 1), Outcome(0, 1, 1, 0), Outcome(0, 1, 0.5, 0.5), Outcome(0, 1, 1, None)
    assert swap_agreement([same, same, other, tie, half]) == 0.5
    assert math.isnan(swap_agreement([half]))


# -------------------------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ('{"reasoning": "{\\"winner\\": \\"B\\"}", "winner": "A"}', 1.0),
        ('```json\n{"winner": "B"}\n```', 0.0),
        ('Sure! {"winner": "a"} I hope this helps.', 1.0),
        ('{"winner": "Response B"}', 0.0),
        ('{"winner": "tie"}', 0.5),
        ('<think>{"winner": "A"}</think>{"winner": "B"}', 0.0),
        ("<think>Winner: A", None),
        ("After all, [[A]]", 1.0),
        ("[[C]]", 0.5),
        ("Both are fine.\n**Winner:** B.", 0.0),
        ("Verdict: a tie", 0.5),
        ("Winner: Response A", 1.0),
        ("**Winner:** Assistant B.", 0.0),
        ("The winner is A", 1.0),
        ("Both are good.\nThe winner is **Response B**.", 0.0),
        ("My choice is a tie.", 0.5),
        ("The winner is not A", None),
        ("The winner is A, but B is shorter", None),
        ("The answer is a", None),
        ("Answer: A good one would be shorter", None),
        ("A", 1.0),
        ("Some thoughts\n\n**B**", 0.0),
        ("Answer A is better than answer B.", None),
        ('{"winner": "both"}', None),
        ('{"winner": null}', None),
        ("", None),
    ],
)
def test_a_reply_names_a_winner_or_has_no_verdict(reply, share):
    assert parse_winner(reply) == share


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"reasoning": "good", "score": 4}', 4.0),
        ('{"score": "3.5"}', 3.5),
        ('```\n{"score": 2}\n```', 2.0),
        ('{"reasoning": "cut off, "score": 4', 4.0),
        ("I would give points.\n**Score:** 4/5", 4.0),
        ("Score: 1\nOn reflection, score: 3", 3.0),
        ("4", 4.0),
        ('{"score": "4/5"}', 4.0),
        ('{"score": "4 / 5 points"}', None),
        ("<score>4</score>", 4.0),
        ("It is fine.\n<rating> 3.5 </rating>", 3.5),
        ("Score: 5-point scale: 3", None),
        ("Score: 5 point scale: 3", None),
        ("Score: 3-4", None),
        ("Score: 1 \u2013 5", None),
        ("Score: 1 to 5", None),
        ("Score: _4_", 4.0),
        ("**Score:** __4__", 4.0),
        ("<score>**4**</score>", 4.0),
        ("Score: 4x", None),
        ("Score: 4 points", 4.0),
        ("Score: 4.5.", 4.5),
        ("Score: 4 - good", 4.0),
        ("5 / 5", 5.0),
        ('{"score": 7}', None),  # beyond the scale
        ("Score: -1", None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ("I award 3 of the 5 points", None),
        ("good", None),
        ("", None),
    ],
)
def test_a_reply_has_a_score_within_the_scale_or_none(reply, score):
    assert parse_score(reply, 0, 5) == score


# -------------------------------------------------------------------------------------------------------------- prompts


def test_braces_in_a_completion_are_no_placeholders():
    assert fill("{first} {second} {}", {"first": "{second}", "second": '{"a": 1}'}) == '{second} {"a": 1} {}'


def test_half_a_surrogate_pair_becomes_a_question_mark():
    assert fill("{first} \U0001f600", {"first": "\ud83d"}) == "? \U0001f600"


def test_a_placeholder_may_be_a_field_of_the_record_and_must_have_a_value():
    assert fill("{answer}", {"answer": 42}) == "42"
    with pytest.raises(ValueError, match=r"\{answr\}, which is no field of this prompt's record; it has answer"):
        fill("{answr}", {"answer": 42})


def test_a_transcript_is_the_question_or_all_turns_by_role():
    question = {"role": "user", "content": "Why?"}
    parts = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    assert transcript((question,)) == transcript((parts,)) == "Why?"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert transcript(({"role": "system", "content": "Be short."}, question, call)) == (
        'System: Be short.\n\nUser: Why?\n\nAssistant: [{"name": "f"}]'
    )


# ---------------------------------------------------------------------------------------------------------------- modes


def test_pairwise_asks_every_pair_in_both_orders_and_equal_texts_once(group):
    mode = Pairwise("{prompt}|{first}|{second}", "", comparisons=6)
    judged = group("a", "b", "a", index=2)
    assert {question.text for question in mode.questions(judged)} == {"question 2|a|b", "question 2|b|a"}
    assert mode.assess(judged, [1.0, 0.0]).scores == (1.0, 0.0, 1.0)
    assert mode.assess(judged, [1.0, 0.0]).means == {"swap_agreement": 1.0}


def test_pairwise_has_no_score_for_a_single_completion_and_ties_for_equal_ones(group):
    mode = Pairwise("{prompt}|{first}|{second}", "", comparisons=6)
    assert math.isnan(mode.assess(group("a"), []).scores[0])
    assert mode.assess(group("a", "a"), []).scores == (0.5, 0.5)


def test_more_candidates_than_comparisons_reach_leaves_the_others_without_a_score(group):
    mode = Pairwise("{prompt}|{first}|{second}", "", comparisons=1)
    scores = mode.assess(group("a", "b", "c"), [1.0, 0.0]).scores
    assert sorted(score for score in scores if not math.isnan(score)) == [0.0, 1.0]
    assert sum(map(math.isnan, scores)) == 1


def test_score_is_the_mean_of_the_samples_with_a_score(group):
    mode = Score("{prompt}|{completion}", "", 0, 5, samples=2)
    judged = group("a", "b", "a", "c")
    assert [(question.text[-1], question.sample) for question in mode.questions(judged)] == [
        ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1),
    ]  # fmt: skip
    scores = mode.assess(judged, [1.0, 2.0, None, 4.0, None, None]).scores
    assert scores[:3] == (1.5, 4.0, 1.5)
    assert math.isnan(scores[3])


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("llm", {}, r"online\.judge\.args\.model: is required"),
        ("llm", {"model": "m", "name": 1}, r"args\.name: no such argument; accepted are mode, template"),
        ("llm", {"model": "m", "api_key": "sk-1"}, r"api_key: keys are not read from the configuration; api_key_env"),
        ("llm", {"model": "m", "api_key_env": "sk-1"}, r"must be the name of an environment variable, not the key"),
        ("llm", {"model": "m", "comparisons": 0}, r"comparisons: found 0; input should be greater than or equal to 1"),
        ("llm", {"model": "m", "mode": "rank"}, r"mode: found 'rank'; input should be 'pairwise' or 'score'"),
        ("llm", {"model": "m", "template": "{prompt} {first}"}, r"template: lacks \{second\}; it must contain"),
        ("llm", {"model": "m", "mode": "score", "template": "{prompt}"}, r"template: lacks \{completion\}"),
        ("llm", {"model": "m", "template": "{prompt}{first}{second}", "rubric": "x"}, r"rubric: the template has no"),
        ("llm", {"model": "m", "scale": [5, 0]}, r"scale: found \[5\.0, 0\.0\]; the first number must be below"),
        ("llm", {"model": "m", "mode": "score", "samples": 3}, r"samples: 3 equal replies at temperature 0"),
        ("llm", {"model": "m", "request": {"stream": True}}, r"request: stream is not accepted there"),
        ("llm", {"model": "m", "samples": 2, "request": {"seed": 1}}, r"request: seed would make all 2 samples"),
        ("llm", {"model": "m", "usd_per_million": {"prompt": 1}}, r"usd_per_million\.completion: is required"),
        ("policy", {"model": "m"}, r"args\.model: no such argument"),
        ("policy", {"template": "{prompt}"}, r"template: lacks \{completion\}"),
    ],
)
def test_wrong_arguments_fail_when_the_judge_is_bound_and_show_no_key(use, args, message):
    with pytest.raises(ValueError, match=message) as error:
        bind_judge(Component(use=use, args=args))
    assert "sk-1" not in str(error.value)


def test_the_judges_are_bound_without_a_run():
    bind_judge(Component(use="llm", args={"model": "m"}))
    bind_judge(Component(use="policy"))
    with pytest.raises(ValueError, match="needs the engines of a run"):
        bind_judge(Component(use="policy"))()
