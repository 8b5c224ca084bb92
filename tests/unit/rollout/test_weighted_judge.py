"""The weighted sum of several judges."""

import asyncio
import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from dpo_ray.config import Component
from dpo_ray.config.rounds import JudgeConfig
from dpo_ray.rollout.judges import JudgeContext, bind_judge, capacity_of, check_scores, is_async
from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.types import Completion, CompletionGroup, Judgement, JudgeUnavailable, Prompt

MODULE = __name__


def group(*texts: str, index: int = 0, **fields: Any) -> CompletionGroup:
    completions = tuple(Completion(text, (1,), finished=True) for text in texts)
    return CompletionGroup(Prompt(index, ({"role": "user", "content": "?"},), (1,), fields), completions, 0)


def characters(groups: Sequence[CompletionGroup]) -> list[list[float]]:
    return [[float(len(c.text)) for c in g.completions] for g in groups]


async def words(groups: Sequence[CompletionGroup]) -> list[Judgement]:
    return [
        Judgement(
            tuple(float(len(c.text.split())) for c in g.completions),
            {"half": tuple(0.5 * len(c.text.split()) for c in g.completions)},
            {"confidence": 0.75},
            {"tokens": 10.0},
        )
        for g in groups
    ]


def unknown_if_empty(groups: Sequence[CompletionGroup]) -> list[list[float]]:
    return [[float(len(c.text)) or math.nan for c in g.completions] for g in groups]


def never_for_x(groups: Sequence[CompletionGroup]) -> list[list[float]]:
    if any(c.text == "x" for g in groups for c in g.completions):
        raise TimeoutError("x took too long")
    return characters(groups)


class RaisesOnce:
    """Its second call fails, as that of a remote judge may, and passes when it is repeated."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        self.calls += 1
        if self.calls == 2:
            raise TimeoutError("read timed out")
        return characters(groups)


class OneAtATime:
    """Fails when two calls overlap."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        assert self.lock.acquire(blocking=False), "two calls at the same time"
        threading.Event().wait(0.02)
        self.lock.release()
        return characters(groups)


def meet(groups: Sequence[CompletionGroup]) -> list[list[float]]:
    BARRIER.wait(timeout=20)
    return characters(groups)


BARRIER = threading.Barrier(2)


class WithContext:
    def __init__(self, context: JudgeContext | None) -> None:
        self.context = context

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        assert self.context is not None
        return [[float(len(self.context.run_dir.name))] * len(g.completions) for g in groups]


def mine(use: str, **keys: Any) -> dict[str, Any]:
    return {"use": f"{MODULE}:{use}", **keys}


def build(*judges: dict[str, Any], **args: Any) -> Any:
    return bind_judge(Component(use="weighted", args={"judges": list(judges), **args}))()


def run(judge: Any, *groups: CompletionGroup) -> list[Judgement]:
    async def call() -> list[Judgement]:
        return check_scores(groups, await judge(groups))

    return asyncio.run(call())


def test_the_score_is_the_sum_of_weight_times_score_and_each_component_is_kept():
    judge = build(mine("characters", weight=0.5), mine("words", weight=2, name="w"))
    assert is_async(judge)
    (judgement,) = run(judge, group("one two", "three"))
    assert judgement.scores == (0.5 * 7 + 2 * 2, 0.5 * 5 + 2 * 1)
    assert judgement.parts == {"characters": (7.0, 5.0), "w": (2.0, 1.0), "w_half": (1.0, 0.5)}
    assert judgement.means == {"w_confidence": 0.75}
    assert judgement.totals == {"w_tokens": 10.0}


def test_built_in_and_nested_judges_and_reward_functions_are_components():
    inner = {"judges": [{"use": "exact"}, mine("characters", weight=0.1)]}
    judge = build({"use": "weighted", "args": inner, "name": "inner"}, {"use": "length", "args": {"target_words": 1}})
    (judgement,) = run(judge, group("42", "four two", answer="42"))
    assert judgement.scores == pytest.approx((1 + 0.2 + 1.0, 0 + 0.8 + 0.0))
    assert judgement.parts["inner_exact"] == (1.0, 0.0)


def test_with_skip_a_component_without_a_score_of_one_completion_is_left_out_of_the_group():
    judge = build(mine("words"), mine("unknown_if_empty", weight=3.0))
    complete, incomplete = run(judge, group("a b", "c"), group("a b", ""))
    assert complete.scores == (2 + 3 * 3, 1 + 3 * 1)
    # Only words count, scaled by all weights / those used: (1 + 3) / 1.
    assert incomplete.scores == (4 * 2.0, 4 * 0.0)
    assert incomplete.totals["unknown_if_empty_skipped"] == 1.0
    assert "unknown_if_empty_skipped" not in complete.totals
    assert math.isnan(incomplete.parts["unknown_if_empty"][1])


def test_where_no_component_is_complete_the_completions_that_all_scored_keep_their_sum():
    (judgement,) = run(build(mine("unknown_if_empty"), mine("words", weight=0.0)), group("abc", ""))
    assert judgement.scores[0] == 3.0
    assert math.isnan(judgement.scores[1])


def test_with_skip_a_component_that_raises_is_left_out_of_the_group_at_fault_only(caplog):
    judge = build(mine("never_for_x", weight=-3.0), mine("words"))
    good, bad = run(judge, group("a b", "abc"), group("x", "x y"))
    assert good.scores == (-3 * 3 + 2, -3 * 3 + 1)
    assert bad.scores == (4 * 1.0, 4 * 2.0), "the absolute weights are 3 + 1"
    assert bad.totals["never_for_x_skipped"] == 1.0
    assert all(map(math.isnan, bad.parts["never_for_x"]))
    assert "never_for_x raised TimeoutError: x took too long" in caplog.text


def test_with_skip_a_component_that_raises_once_is_asked_again():
    judge = build(mine("RaisesOnce"), mine("words", weight=0.0))
    for _ in range(3):
        (judgement,) = run(judge, group("abc"))
        assert judgement.scores == (3.0,)
        assert "RaisesOnce_skipped" not in judgement.totals


def test_a_group_over_which_all_components_raise_fails():
    with pytest.raises(TimeoutError, match="x took too long"):
        run(build(mine("never_for_x")), group("x"))


def test_with_fail_the_exception_of_a_component_is_that_of_the_call():
    judge = build(mine("words"), mine("never_for_x"), on_failure="fail")
    with pytest.raises(TimeoutError, match="x took too long"):
        run(judge, group("x"))
    assert run(judge, group("abc"))[0].scores == (4.0,)


def test_with_fail_a_completion_without_one_of_the_scores_has_none():
    (judgement,) = run(build(mine("words"), mine("unknown_if_empty"), on_failure="fail"), group("a b", ""))
    assert judgement.scores[0] == 5.0
    assert math.isnan(judgement.scores[1])


def test_components_run_at_the_same_time():
    (judgement,) = run(build(mine("meet", name="first"), mine("meet", name="second")), group("ab"))
    assert judgement.scores == (4.0,)


def test_as_many_calls_overlap_as_the_component_with_the_lowest_limit_takes():
    server = {"url": "http://rm", "format": "vllm"}
    few, many = ({"use": "http", "name": f"of_{n}", "args": server | {"concurrency": n}} for n in (3, 1000))
    assert capacity_of(build(many, few), 2) == Capacity(3, (1, 2))
    assert capacity_of(build(mine("words")), 2) == Capacity(32)


def test_a_group_costs_as_much_as_for_the_component_that_it_keeps_busiest():
    llm = {"use": "llm", "args": {"model": "m", "base_url": "http://llm/v1", "concurrency": 8}}
    http = {"use": "http", "args": {"url": "http://rm", "format": "vllm", "concurrency": 4}}
    # 2 of 8 and 6 of 8 requests of llm are 1 and 3 of 4.
    assert capacity_of(build(llm, http), 3) == Capacity(4, (1, 2, 3))
    assert capacity_of(build(llm, mine("words")), 3) == Capacity(8, (1, 2, 6))


def test_calls_do_not_overlap_where_a_component_is_not_async_because_they_would_time_out_while_they_wait_for_it():
    assert capacity_of(build(mine("words"), mine("characters")), 2) == Capacity(1)
    inner = {"use": "weighted", "args": {"judges": [{"use": "length"}]}}
    assert capacity_of(build(inner, mine("words")), 2) == Capacity(1)


def test_a_request_of_a_component_that_may_take_longer_than_the_call_is_rejected():
    http = {"use": "http", "args": {"url": "http://rm", "format": "vllm", "timeout_s": 600, "retries": 6}}
    inner = {"use": "weighted", "args": {"judges": [http]}}
    for judges, place in (
        ([mine("words"), http], r"online.judge.args.judges\[1\]"),
        ([inner], r"online.judge.args.judges\[0\].args.judges\[0\]"),
    ):
        bind_judge(JudgeConfig(use="weighted", args={"judges": judges}, timeout_s=4200))
        with pytest.raises(ValueError, match=rf"'http' \({place}\): a request may take 4200 s .* timeout_s=4199"):
            bind_judge(JudgeConfig(use="weighted", args={"judges": judges}, timeout_s=4199))


def test_calls_of_a_component_that_is_not_async_do_not_overlap():
    judge = build(mine("OneAtATime"), on_failure="fail")

    async def several() -> list[list[Judgement]]:
        return await asyncio.gather(*(judge([group("ab")]) for _ in range(4)))

    assert [judgements[0].scores for judgements in asyncio.run(several())] == [(2.0,)] * 4


def test_components_get_the_context_of_the_run(tmp_path):
    async def no_engines(*_: Any) -> str:
        raise AssertionError

    component = Component(use="weighted", args={"judges": [mine("WithContext")]})
    judge = bind_judge(component, JudgeContext(tmp_path / "seven77", no_engines, str))()
    assert run(judge, group("a"))[0].scores == (7.0,)


@pytest.mark.parametrize(
    ("judges", "args", "message"),
    [
        ([], {}, r"judges is \[\]; it must be a list of objects"),
        ("exact", {}, "judges is 'exact'; it must be a list"),
        (["exact"], {}, r"judges\[0\] is 'exact'; it must be an object"),
        ([{"use": "exact"}, {"weight": 1}], {}, r"judges\[1\] is .*; it must be an object with use"),
        (
            [{"use": "exact", "factor": 1}],
            {},
            r"judges\[0\] has the key 'factor'; accepted are use, args, weight, name",
        ),
        ([{"use": "exact", "weight": "1"}], {}, r"judges\[0\].weight is '1'; it must be a finite number"),
        ([{"use": "exact", "weight": 0}], {}, "all weights are 0"),
        ([{"use": "exact", "args": 3}], {}, r"judges\[0\].args is 3; it must be an object"),
        ([{"use": "exact"}, {"use": "exact"}], {}, "two judges are called 'exact'; give each a name"),
        ([{"use": "implicit"}], {}, r"judges\[0\] is implicit, which the training workers compute"),
        ([{"use": "exakt"}], {}, r"judges\[0\]: no judge is called 'exakt'; did you mean 'exact'"),
        ([{"use": "exact", "args": {"field": "a"}}], {}, r"judges\[0\]: judge 'exact' takes no argument 'field'"),
        ([{"use": "regex", "args": {"pattern": "("}}], {}, r"judges\[0\]: judge 'regex': pattern"),
        ([{"use": "exact"}], {"on_failure": "ignore"}, "on_failure is 'ignore'; accepted are skip and fail"),
    ],
)
def test_wrong_arguments_are_rejected_where_the_judge_is_bound(judges, args, message):
    with pytest.raises(ValueError, match=message):
        bind_judge(Component(use="weighted", args={"judges": judges, **args}))


def always_raises(groups: Sequence[CompletionGroup]) -> list[list[float]]:
    raise TypeError("a mistake in this judge")


def unavailable(groups: Sequence[CompletionGroup]) -> list[list[float]]:
    raise JudgeUnavailable("the reward server is down")


@pytest.mark.parametrize("other", ["characters", "always_raises"])
@pytest.mark.parametrize("on_failure", ["skip", "fail"])
def test_a_component_that_is_unavailable_ends_the_run_instead_of_being_left_out_from_here_on(
    on_failure: str, other: str
) -> None:
    parts = [{"use": f"{MODULE}:{other}"}, {"use": f"{MODULE}:unavailable"}]
    judge: Any = bind_judge(Component(use="weighted", args={"judges": parts, "on_failure": on_failure}))()
    with pytest.raises(JudgeUnavailable, match="server is down"):
        asyncio.run(judge([group("a", "bb")]))
