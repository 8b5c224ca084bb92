"""Reward functions of TRL, OpenRLHF and verl as judges: their arguments and their results."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Component
from dpo_ray.rollout.judges import JudgeContext, bind_judge, check_scores, is_async
from dpo_ray.rollout.judges.columns import columns_of
from dpo_ray.types import Completion, CompletionGroup, Judgement, Prompt
from tests.conftest import save_tokenizer

MODULE = __name__
TURNS = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 x 7?"})


def group(*texts: str, text: str | None = None, index: int = 0, **fields: Any) -> CompletionGroup:
    """Completions for a prompt; each has one token per character and an end-of-turn token."""
    completions = tuple(Completion(t, (*map(ord, t), 0), finished=True) for t in texts)
    return CompletionGroup(Prompt(index, TURNS, (1, 2), fields, text=text), completions, 0)


def with_fields(made: CompletionGroup, fields: dict[str, Any]) -> CompletionGroup:
    return replace(made, prompt=replace(made.prompt, fields=fields))


def judge(use: str, groups: Sequence[CompletionGroup], context: JudgeContext | None = None, **args: Any) -> Any:
    built = bind_judge(Component(use=f"{MODULE}:{use}", args=args), context)()
    result: Any = built(groups)
    return check_scores(groups, asyncio.run(result) if is_async(built) else result)


def scores(judgements: Sequence[Judgement]) -> list[tuple[float, ...]]:
    return [judgement.scores for judgement in judgements]


# ----------------------------------------------------------------------------------------------------------------- TRL


def trl_echo(prompts, completions, completion_ids, **columns):
    trl_echo.calls.append((prompts, completions, completion_ids, columns))  # pyrefly: ignore
    return [float(len(ids)) for ids in completion_ids]


def trl_gold(completions, answer):
    return [float(answer[i] == c[0]["content"]) for i, c in enumerate(completions)]


async def trl_later(prompts, completions, ground_truth=(), **kwargs):
    await asyncio.sleep(0)
    return [float(g == c[0]["content"]) if g else None for g, c in zip(ground_truth, completions, strict=True)]


class TrlLater:
    async def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)


def trl_scaled(completions, scale, *, offset=0.0):
    return [scale * len(c[0]["content"]) + offset for c in completions]


def trl_logs(completions, log_metric, log_extra, **kwargs):
    log_metric("mean_length", 2.0)
    log_metric("mean_length", 4.0)
    log_extra("length", [len(c[0]["content"]) for c in completions])
    log_extra("extracted", [c[0]["content"] for c in completions])
    log_extra("maybe", [None, True, 2.5][: len(completions)])
    return [None] * len(completions)


def trl_trainer(completions, trainer_state):
    return [0.0] * len(completions)


def trl_short(completions):
    return [0.0]


def trl_number(completions):
    return 1.0


def test_trl_functions_are_called_once_with_all_completions_in_order():
    trl_echo.calls = []  # pyrefly: ignore
    first = group("ab", "c", answer="42", facts={"n": 1})
    second = group("def", text="6 x 7 =", index=1, answer="43")
    assert scores(judge("trl_echo", [first, second])) == [(3.0, 2.0), (4.0,)]
    ((prompts, completions, ids, columns),) = trl_echo.calls  # pyrefly: ignore
    # A record whose prompt is a string gets text, as from TRL.
    assert prompts == [list(TURNS), list(TURNS), "6 x 7 ="]
    assert completions == [
        [{"role": "assistant", "content": "ab"}],
        [{"role": "assistant", "content": "c"}],
        "def",
    ]
    assert ids == [[97, 98, 0], [99, 0], [100, 101, 102, 0]]
    assert {n: v for n, v in columns.items() if not callable(v)} == {
        "answer": ["42", "42", "43"],
        "facts": [{"n": 1}, {"n": 1}, None],
    }
    assert set(columns) == {"answer", "facts", "log_metric", "log_extra"}


@pytest.mark.parametrize("column", ["answer", "ground_truth", "label"])
@pytest.mark.parametrize("use", ["trl_gold", "trl_later"])
def test_a_function_gets_the_gold_column_by_any_of_its_names(use, column):
    assert scores(judge(use, [with_fields(group("42", "41"), {column: "42"})])) == [(1.0, 0.0)]


def test_an_exact_name_wins_over_its_synonyms():
    assert scores(judge("trl_gold", [group("a", "b", label="a", answer="b")])) == [(0.0, 1.0)]


def test_a_column_that_no_record_has_is_an_error_where_the_function_is_bound_or_made():
    said = r"needs the column 'answer' \(or ground_truth or label\).*: id, topic"
    with pytest.raises(ValueError, match=f"trl_gold' {said}"):
        bind_judge(Component(use=f"{MODULE}:trl_gold"), columns={"topic", "id"})
    made = bind_judge(Component(use=f"{MODULE}:make_gold"), columns={"topic", "id"})
    with pytest.raises(ValueError, match=f"make_gold' {said}"):
        made()
    bind_judge(Component(use=f"{MODULE}:trl_scaled", args={"scale": 1.0}), columns=())


def test_a_record_without_the_column_has_none():
    built: Any = bind_judge(Component(use=f"{MODULE}:trl_gold"), columns={"answer"})()
    assert scores(built([group("a")])) == [(0.0,)]
    assert scores(built([group("a", answer="a"), group("a")])) == [(1.0,), (0.0,)]


def test_none_is_no_score():
    (known,), (unknown,) = scores(judge("trl_later", [group("a", answer="a"), group("a")]))
    assert known == 1.0
    assert math.isnan(unknown)


@pytest.mark.parametrize(
    ("use", "expected"), [("trl_gold", False), ("trl_later", True), ("make_trl", False), ("make_later", True)]
)
def test_an_async_function_is_an_async_judge(use, expected):
    assert is_async(bind_judge(Component(use=f"{MODULE}:{use}"))()) == expected


def make_trl(bonus: float = 1.0):
    return lambda completions, **kwargs: [bonus] * len(completions)


def make_gold():
    return trl_gold


def make_later():
    return TrlLater()


def test_a_factory_may_return_a_reward_function():
    assert scores(judge("make_trl", [group("a", "b")], bonus=2.0)) == [(2.0, 2.0)]
    assert scores(judge("make_later", [group("a", "b")])) == [(1.0, 1.0)]


def test_args_are_bound_to_the_other_parameters_and_win_over_columns():
    assert scores(judge("trl_scaled", [group("ab", scale=7.0, offset=9.0)], scale=2.0, offset=0.5)) == [(4.5,)]


def test_logged_metrics_and_numeric_columns_are_in_the_judgement():
    (judgement,) = judge("trl_logs", [group("a", "bc", "def")])
    assert all(map(math.isnan, judgement.scores))
    assert judgement.means == {"mean_length": 3.0}
    assert set(judgement.parts) == {"length", "maybe"}, "texts are not numbers"
    assert judgement.parts["length"] == (1.0, 2.0, 3.0)
    assert judgement.parts["maybe"][1:] == (1.0, 2.5)
    assert math.isnan(judgement.parts["maybe"][0])


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("trl_short", "returned 1 values for 2 completions"),
        ("trl_number", "returned 1.0 for 2 completions"),
    ],
)
def test_a_return_value_of_another_length_is_rejected(use, message):
    with pytest.raises(ValueError, match=message):
        judge(use, [group("a", "b")])


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("trl_gold", {"completions": []}, "completions cannot be set in args"),
        ("trl_gold", {"weight": 1}, "takes no argument 'weight'"),
        ("trl_trainer", {}, "reward function of TRL and needs 'trainer_state'"),
        ("openrlhf", {"labels": []}, "labels cannot be set in args"),
        ("openrlhf_strict", {}, "of OpenRLHF and needs 'threshold'"),
        ("verl_score", {"solution_str": ""}, "solution_str cannot be set in args"),
    ],
)
def test_wrong_arguments_are_rejected_where_the_judge_is_bound(use, args, message):
    with pytest.raises(ValueError, match=message):
        bind_judge(Component(use=f"{MODULE}:{use}", args=args))


# ------------------------------------------------------------------------------------------------------------ OpenRLHF


def openrlhf(queries, prompts, labels):
    import torch

    openrlhf.calls.append((queries, prompts, labels))  # pyrefly: ignore
    answers = [query.removeprefix(prompt) for query, prompt in zip(queries, prompts, strict=True)]
    rewards = torch.tensor([float(a.startswith(label)) for a, label in zip(answers, labels, strict=True)])
    return {"rewards": rewards, "scores": rewards / 2, "extra_logs": {"twice": 2 * rewards, "count": len(queries)}}


def openrlhf_tensor(queries, prompts, labels, **kwargs):
    import torch

    return torch.arange(len(queries))


def openrlhf_strict(queries, prompts, labels, threshold):
    return [0.0] * len(queries)


@pytest.fixture
def chat(tmp_path: Path) -> tuple[Any, JudgeContext]:
    """A real tokenizer with a chat template, and a context that decodes with it."""
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)

    async def no_engines(*_: Any) -> str:
        raise AssertionError

    return tokenizer, JudgeContext(tmp_path, no_engines, tokenizer.decode)


def tokenized(tokenizer: Any, made: CompletionGroup) -> CompletionGroup:
    """The group with its token ids by the tokenizer, as a run has them."""
    rendered = tokenizer.apply_chat_template([*TURNS], tokenize=False, add_generation_prompt=True)
    prompt = replace(made.prompt, token_ids=tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"]))
    ids = [tuple(tokenizer(c.text + "<|im_end|>", add_special_tokens=False)["input_ids"]) for c in made.completions]
    return replace(
        made,
        prompt=prompt,
        completions=tuple(replace(c, token_ids=i) for c, i in zip(made.completions, ids, strict=True)),
    )


def test_records_without_labels_are_pointed_out_once(chat, caplog):
    tokenizer, context = chat
    for columns, times in (({"label"}, 0), ({"topic"}, 1)):
        built: Any = bind_judge(Component(use=f"{MODULE}:openrlhf_tensor"), context, columns)()
        for _ in range(2):
            built([tokenized(tokenizer, group("a"))])
        assert caplog.text.count("no record has a field answer, ground_truth or label") == times


def test_openrlhf_functions_get_the_rendered_conversation_with_special_tokens(chat):
    tokenizer, context = chat
    openrlhf.calls = []  # pyrefly: ignore
    groups = [tokenized(tokenizer, group("42", "41", answer="42")), tokenized(tokenizer, group("?", index=1))]
    first, second = judge("openrlhf", groups, context)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n6 x 7?<|im_end|>\n<|im_start|>assistant\n"
    ((queries, prompts, labels),) = openrlhf.calls  # pyrefly: ignore
    assert prompts == [prompt] * 3
    assert queries == [f"{prompt}{text}<|im_end|>" for text in ("42", "41", "?")]
    assert labels == ["42", "42", ""], "OpenRLHF passes an empty string where there is no label"
    assert (first.scores, second.scores) == ((1.0, 0.0), (1.0,))
    assert first.parts == {"twice": (2.0, 0.0), "scores": (0.5, 0.0)}
    assert first.means == {"count": 3.0}


def test_a_tensor_from_an_openrlhf_function_is_its_scores(chat):
    tokenizer, context = chat
    assert scores(judge("openrlhf_tensor", [tokenized(tokenizer, group("a", "b"))], context)) == [(0.0, 1.0)]


def test_an_openrlhf_function_without_a_tokenizer_is_an_error():
    with pytest.raises(ValueError, match="JudgeContext that has decode"):
        judge("openrlhf", [group("a")])


# ---------------------------------------------------------------------------------------------------------------- verl


def verl_score(data_source, solution_str, ground_truth, extra_info, strict=True):
    assert data_source == "arithmetic"
    correct = solution_str == ground_truth if strict else ground_truth in solution_str
    return {"score": float(correct), "acc": correct, "split": extra_info["split"], "length": len(solution_str)}


async def verl_later(solution_str, ground_truth, **kwargs):
    await asyncio.sleep(0)
    assert set(kwargs) == {"data_source", "extra_info"}
    return float(solution_str == ground_truth)


def verl_echo(solution_str, ground_truth, extra_info, expected):
    return float(extra_info == expected)


def verl_chosen(solution_str, ground_truth):
    return {"score": 1.0, "chosen": 0, "rank": 3}


def trl_reserved(completions, log_metric, **kwargs):
    log_metric("mean_score", 7.0)
    return [1.0] * len(completions)


def verl_bad(solution_str, ground_truth):
    return {"reward": 1.0}


VERL_RECORD = {
    "data_source": "arithmetic",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train"},
}


def test_verl_functions_score_each_completion_of_a_record_of_verl():
    (judgement,) = judge("verl_score", [group("42", "it is 42", **VERL_RECORD)])
    assert judgement.scores == (1.0, 0.0)
    assert judgement.parts == {"acc": (1.0, 0.0), "length": (2.0, 8.0)}, "numbers of the dictionary"


def test_arguments_of_verl_functions_may_be_set():
    record = {"answer": "42", "extra_info": {"split": "train"}}
    judgements = judge("verl_score", [group("42", "it is 42", **record)], data_source="arithmetic", strict=False)
    assert scores(judgements) == [(1.0, 1.0)]


@pytest.mark.parametrize(("value", "seen"), [('{"split": "train"}', '{"split": "train"}'), (None, {}), ({}, {})])
def test_verl_functions_get_extra_info_as_it_stands_in_the_record(value, seen):
    (judgement,) = judge("verl_echo", [group("42", ground_truth="42", extra_info=value)], expected=seen)
    assert judgement.scores == (1.0,)


def test_numbers_with_the_name_of_a_score_of_every_round_are_stored_under_another():
    (judgement,) = judge("verl_chosen", [group("42", **VERL_RECORD)])
    assert judgement.parts == {"own_chosen": (0.0,), "rank": (3.0,)}
    (logged,) = judge("trl_reserved", [group("42")])
    assert logged.means == {"own_mean_score": 7.0}


def test_an_async_verl_function_is_an_async_judge():
    assert is_async(bind_judge(Component(use=f"{MODULE}:verl_later"))())
    assert scores(judge("verl_later", [group("42", "41", **VERL_RECORD)])) == [(1.0, 0.0)]


def test_verl_functions_without_their_columns_fail_with_the_fields_there_are():
    component = Component(use=f"{MODULE}:verl_score")
    with pytest.raises(ValueError, match=r"needs the column 'data_source' .*: answer"):
        bind_judge(component, columns={"answer"})
    nested = columns_of([group("a", data_source="d", reward_model={"ground_truth": "a"}).prompt])
    assert nested == {"data_source", "reward_model", "reward_model.ground_truth"}
    bind_judge(component, columns=nested)


def test_a_dictionary_without_a_score_is_rejected():
    with pytest.raises(ValueError, match="returned the keys reward; score must be one of them"):
        judge("verl_bad", [group("a", answer="a")])
