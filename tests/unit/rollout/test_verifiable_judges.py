"""Judges that check completions against a column of the record."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from dpo_ray.config import Component
from dpo_ray.config.rounds import OnlineConfig
from dpo_ray.rollout.judges import bind_judge, check_scores, columns_by_judge, validate_columns
from dpo_ray.rollout.judges.math_client import MathClient
from dpo_ray.types import Completion, CompletionGroup, Prompt

ENDLESS = "$9^{9^{9^{9}}}$"
"""The comparison of this tower of powers with a number does not end."""


def group(*texts: str, index: int = 0, **fields: Any) -> CompletionGroup:
    completions = tuple(Completion(text, (1,), finished=True) for text in texts)
    return CompletionGroup(Prompt(index, ({"role": "user", "content": "?"},), (1,), fields), completions, 0)


def scores(use: str, *groups: CompletionGroup, **args: Any) -> list[tuple[float, ...]]:
    built: Any = bind_judge(Component(use=use, args=args))()
    return [judgement.scores for judgement in check_scores(groups, built(groups))]


@pytest.mark.parametrize(
    ("args", "gold", "text", "score"),
    [
        ({}, "42", " 42\n", 1.0),
        ({}, 42, "42", 1.0),
        ({}, 42.0, "42", 1.0),
        ({}, "42", "It is 42", 0.0),
        ({"strip": False}, "42", " 42", 0.0),
        ({}, "Paris", "paris", 0.0),
        ({"ignore_case": True}, "Paris", "paris", 1.0),
        ({}, ["Paris", "Lutetia"], "Lutetia", 1.0),
        ({"pattern": r"####\s*(.*)"}, "42", "6 x 7 is\n#### 41, no\n#### 42", 1.0),
        ({"pattern": r"####\s*(.*)"}, "42", "42", 0.0),
        ({"pattern": r"\d+"}, "42", "6 times 7 is 42.", 1.0),
    ],
)
def test_exact_compares_the_completion_or_its_final_answer(args, gold, text, score):
    assert scores("exact", group(text, answer=gold), **args) == [(score,)]


@pytest.mark.parametrize("name", ["answer", "ground_truth", "label"])
def test_the_gold_column_has_three_names(name):
    made = group("42", "41")
    named = replace(made, prompt=replace(made.prompt, fields={name: "42"}))
    assert scores("exact", named) == [(1.0, 0.0)]


def test_a_record_without_the_column_has_no_score():
    first, second = scores("exact", group("42", answer="42"), group("42", "41", index=1, topic="x"))
    assert first == (1.0,)
    assert len(second) == 2
    assert all(map(math.isnan, second))
    assert all(map(math.isnan, scores("exact", group("42", answer="42"), group("42", answer=[]))[1]))


@pytest.mark.parametrize(
    ("use", "args", "column"),
    [
        ("exact", {"column": "solution"}, "'solution'"),
        ("regex", {"pattern": "x"}, r"'answer' \(or ground_truth or label\)"),
        ("json_schema", {}, "'schema'"),
        ("math", {}, "'answer'"),
        ("weighted", {"judges": [{"use": "length"}, {"use": "exact"}]}, "'answer'"),
    ],
)
def test_prompts_that_all_lack_the_column_are_an_error_with_the_columns_there_are_before_anything_starts(
    use, args, column
):
    prompts = [
        group("a", index=i, answer=None, **fields).prompt for i, fields in enumerate([{"id": 1}, {"topic": "x"}])
    ]
    config = OnlineConfig.model_validate({"prompts": "p.jsonl", "judge": {"use": use, "args": args}})
    with pytest.raises(ValueError, match=rf"online\.prompts: .*needs the column {column}.*no record.*: id, topic$"):
        validate_columns(config, columns_by_judge(prompts, []))
    validate_columns(config, columns_by_judge([*prompts, group("a", answer="b", solution="c", schema={}).prompt], []))


def test_held_out_prompts_need_the_column_of_their_judge_and_no_other():
    config = OnlineConfig.model_validate(
        {"prompts": "p.jsonl", "eval_prompts": "e.jsonl", "eval_judge": {"use": "exact"}}
    )
    bare, answered = group("a").prompt, group("a", answer="b").prompt
    validate_columns(config, columns_by_judge([bare], [bare, answered]))
    with pytest.raises(ValueError, match=r"^online\.eval_prompts: judge 'exact' needs .*; available columns: none$"):
        validate_columns(config, columns_by_judge([answered], [bare]))


def test_a_record_without_the_column_has_no_score_in_any_order_of_the_calls():
    built: Any = bind_judge(Component(use="exact"), columns={"answer"})()
    for made, expected in ((group("42"), math.nan), (group("42", answer="42"), 1.0), (group("42"), math.nan)):
        assert built([made]) == [[pytest.approx(expected, nan_ok=True)]]


@pytest.mark.parametrize(
    ("args", "fields", "text", "score"),
    [
        ({"pattern": r"answer is (\w+)"}, {"answer": "b"}, "The answer is a. No, the answer is b.", 1.0),
        ({"pattern": r"answer is (\w+)"}, {"answer": "b"}, "b", 0.0),
        ({"pattern": r"ANSWER: (\w+)", "ignore_case": True}, {"answer": "B"}, "answer: b", 1.0),
        ({"pattern": r"\A<think>.+</think>", "column": None}, {}, "<think>so</think> 42", 1.0),
        ({"pattern": r"\A<think>.+</think>", "column": None}, {}, "42", 0.0),
    ],
)
def test_regex_compares_its_match_with_the_column_or_only_looks_for_one(args, fields, text, score):
    assert scores("regex", group(text, **fields), **args) == [(score,)]


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"age": 3}', 1.0),
        ('```json\n{"age": 3}\n```', 1.0),
        ('{"age": "3"}', 0.0),
        ("{}", 0.0),
        ('{"age": 3', 0.0),
        ('{"age": NaN}', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_schema_accepts_json_that_satisfies_the_schema(text, score):
    assert scores("json_schema", group(text), schema=SCHEMA) == [(score,)]


def test_json_schema_may_be_a_column_as_object_or_as_text():
    as_text = group('{"age": 3}', "3", schema='{"type": "integer"}')
    assert scores("json_schema", group('{"age": 3}', "3", schema=SCHEMA), as_text) == [(1.0, 0.0), (0.0, 1.0)]
    assert scores("json_schema", group("3", format={"type": "integer"}), column="format") == [(1.0,)]


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("exact", {"pattern": "("}, r"pattern '\(' is not a regular expression"),
        ("regex", {}, "missing a required argument: 'pattern'"),
        ("regex", {"pattern": 3}, "pattern 3 is not a regular expression"),
        ("json_schema", {"schema": {"type": "integre"}}, "is not a JSON schema: 'integre' is not valid"),
        ("json_schema", {"schema": "{", "column": None}, "'{' is not a JSON schema"),
        ("json_schema", {"schema": {}, "column": "format"}, "args have schema and column"),
        ("math", {"timeout_s": 0}, "timeout_s is 0; it must be a number of seconds above 0"),
        ("math", {"timeout_s": True}, "timeout_s is True; it must be a number of seconds above 0"),
    ],
)
def test_wrong_arguments_are_rejected_where_the_judge_is_bound(use, args, message):
    with pytest.raises(ValueError, match=message):
        bind_judge(Component(use=use, args=args))


# ---------------------------------------------------------------------------------------------------------------- math


@pytest.fixture(scope="module")
def client() -> Iterator[MathClient]:
    pytest.importorskip("math_verify")
    client = MathClient(timeout_s=1.0)
    yield client
    client.close()


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        ("42", r"So it is $\boxed{42}$.", 1.0),
        ("42", "6 x 7 = 42", 1.0),
        ("42", "41", 0.0),
        ("42", "I do not know.", 0.0),
        (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", 1.0),
        (r"$\frac{1}{2}$", "0.5", 1.0),
        (r"2\sqrt{3}", r"$\sqrt{12}$", 1.0),
        (r"2\sqrt{3}", "3", 0.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("(1,2)", r"\boxed{(1, 2)}", 1.0),
    ],
)
def test_math_compares_expressions_and_not_their_text(client, answer, completion, score):
    assert client.compare(answer, completion) == score


def test_math_has_no_score_where_the_answer_is_no_expression(client):
    assert math.isnan(client.compare("", "42"))


def test_a_comparison_that_does_not_end_has_no_score_and_the_process_is_replaced(client, caplog):
    assert client.compare("42", "42") == 1.0
    first = client.pid
    assert math.isnan(client.compare("2", ENDLESS))
    assert "took more than 1 s" in caplog.text
    assert client.pid is None
    assert client.compare("42", "42") == 1.0
    assert client.pid != first
    second = client.pid
    assert client.compare("42", "42") == 1.0
    assert client.pid == second, "one process for all comparisons"


def test_math_scores_the_others_of_a_group_with_an_endless_completion():
    pytest.importorskip("math_verify")
    ((right, endless, wrong),) = scores("math", group("42", ENDLESS, "41", answer="42"), timeout_s=1.0)
    assert (right, wrong) == (1.0, 0.0)
    assert math.isnan(endless)


def test_math_accepts_any_of_several_answers():
    pytest.importorskip("math_verify")
    assert scores("math", group("1/2", "3", "4", ground_truth=["0.5", "3"])) == [(1.0, 1.0, 0.0)]


def test_math_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("dpo_ray.rollout.judges.verifiable.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"dpo-ray\[math\]"):
        bind_judge(Component(use="math"))
