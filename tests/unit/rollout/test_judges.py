"""Judges: the built-in ones, judges from import paths, and the validation of scores."""

import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dpo_ray.config import Component
from dpo_ray.rollout.judges import bind_judge, check_scores, is_async
from dpo_ray.types import CompletionGroup, Judgement

MODULE = __name__


def words(n: int) -> str:
    return " ".join(["word"] * n)


def constant(groups: Sequence[CompletionGroup], value: float = 1.0) -> list[list[float]]:
    return [[value] * len(group.completions) for group in groups]


def make_constant(value: float):
    return lambda groups: constant(groups, value)


class Constant:
    def __init__(self, value: float = 2.0) -> None:
        self.value = value

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return constant(groups, self.value)


async def later(groups: Sequence[CompletionGroup], value: float = 1.0) -> list[list[float]]:
    return constant(groups, value)


class Later:
    async def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return constant(groups)


def half_a_judge(texts):
    return 0.0


not_a_judge = 3


def test_length_falls_from_one_at_the_target_to_zero_at_twice_it_and_stays_at_minus_one_from_three_times(group):
    judge = bind_judge(Component(use="length", args={"target_words": 4}))()
    assert judge([group(words(4), words(2), words(6), words(8), words(12), words(40))]) == [
        [1.0, 0.5, 0.5, 0.0, -1.0, -1.0]
    ]


def test_length_gives_an_empty_completion_the_lowest_score(group):
    judge = bind_judge(Component(use="length", args={"target_words": 4}))()
    assert judge([group("", " \n")]) == [[-1.0, -1.0]]


@pytest.mark.parametrize("target", [0, -3, 2.5, "60"])
def test_length_rejects_a_target_that_is_not_a_positive_integer(target):
    with pytest.raises(ValueError, match=r"target_words is .* at least 1"):
        bind_judge(Component(use="length", args={"target_words": target}))()


@pytest.mark.parametrize(
    ("use", "expected"), [("constant", False), ("Constant", False), ("later", True), ("Later", True)]
)
def test_calls_of_async_judges_overlap(use, expected):
    assert is_async(bind_judge(Component(use=f"{MODULE}:{use}"))()) == expected


def test_sentiment_is_the_compound_score_of_vader(group):
    pytest.importorskip("vaderSentiment")
    judge: Any = bind_judge(Component(use="sentiment"))()
    [[good, bad, neutral, empty]] = judge([group("I love it", "I hate it", "It is a table", "")])
    assert good == 0.6369  # s / sqrt(s * s + 15) with love's valence s = 3.2
    assert bad == -0.5719  # hate: s = -2.7
    assert neutral == 0.0
    assert empty == 0.0
    [[once, repeated]] = judge([group("I love it. It is red.", "I love it. It is red. I love it.\nI love it.")])
    assert once == repeated == good


def test_sentiment_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ValueError, match=r"dpo-ray\[demo\]"):
        bind_judge(Component(use="sentiment"))()


def test_importing_the_judges_imports_neither_vader_nor_openai_nor_torch_nor_ray():
    code = (
        "import sys, dpo_ray.rollout.judges, dpo_ray.rollout.collector, "
        "dpo_ray.rollout.fleet\n"
        "print([m for m in ('vaderSentiment', 'openai', 'torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("use", "args", "score"),
    [
        (f"{MODULE}:constant", {}, 1.0),  # a function of groups is the judge itself
        (f"{MODULE}:constant", {"value": 5.0}, 5.0),
        (f"{MODULE}:make_constant", {"value": 3.0}, 3.0),  # a function without groups is a factory
        (f"{MODULE}:Constant", {}, 2.0),  # a class is a factory
        (f"{MODULE}:Constant", {"value": 4.0}, 4.0),
    ],
)
def test_an_import_path_names_a_judge_or_a_factory(group, use, args, score):
    assert bind_judge(Component(use=use, args=args))()([group("a", "b")]) == [[score, score]]


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("lenght", {}, "no judge is called 'lenght'; did you mean 'length'"),
        ("length", {"words": 3}, "takes no argument 'words'"),
        (f"{MODULE}:make_constant", {}, "missing a required argument: 'value'"),
        (f"{MODULE}:constant", {"groups": []}, "groups cannot be set in args"),
        (f"{MODULE}:constant", {"weight": 1}, "takes no argument 'weight'"),
        (f"{MODULE}:not_a_judge", {}, "is a int; it must be a function or a class"),
        (f"{MODULE}:half_a_judge", {"texts": 1}, "must call its first parameter groups"),
    ],
)
def test_a_judge_that_cannot_be_built_is_rejected_with_the_reason(use, args, message):
    with pytest.raises(ValueError, match=message):
        bind_judge(Component(use=use, args=args))()


def test_check_scores_converts_to_floats_and_replaces_scores_that_are_not_finite_by_nan(group):
    checked = check_scores([group("a", "b", "c", "d")], [[1, math.inf, -math.inf, math.nan]])
    assert checked[0].scores[0] == 1.0
    assert isinstance(checked[0].scores[0], float)
    assert all(math.isnan(score) for score in checked[0].scores[1:])


def test_check_scores_accepts_an_array(group):
    assert check_scores([group("a", "b")], np.array([[0.5, 2.0]], dtype=np.float32)) == [Judgement((0.5, 2.0))]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "None for 1 groups"),
        ([], "a list of length 0 for 1 groups"),
        ([[1.0], [2.0]], "a list of length 2 for 1 groups"),
        ([[1.0]], r"a list of length 1 for the 2 completions of group 0 \(prompt 3\)"),
        ([1.0], "1.0 for the 2 completions"),
        ([[1.0, None]], "None as a score"),
        ([["1.0", 2.0]], "'1.0' as a score"),
    ],
)
def test_check_scores_names_the_fault_of_an_invalid_return_value(group, scores, message):
    with pytest.raises(ValueError, match=f"the judge returned {message}"):
        check_scores([group("a", "b", index=3)], scores)


def test_metrics_of_a_judge_become_floats_and_a_total_that_is_no_number_is_left_out(group):
    means: Any = {"m": np.float32(0.5)}
    totals: Any = {"n": np.int64(3), "cost": math.nan}
    given = Judgement((1.0, 2.0), means=means, totals=totals)
    (checked,) = check_scores([group("a", "b")], [given])
    assert (checked.means, checked.totals) == ({"m": 0.5}, {"n": 3.0})
    assert type(checked.means["m"]) is type(checked.totals["n"]) is float
    with pytest.raises(ValueError, match="returned 'cheap' as cost of group 0"):
        check_scores([group("a", "b")], [Judgement((1.0, 2.0), totals=totals | {"cost": "cheap"})])
