"""Wire formats of the judge ``http``, byte for byte, against a real HTTP server."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dpo_ray.config import Component
from dpo_ray.data.tokenizer import load_tokenizer
from dpo_ray.rollout.judges import JudgeContext, bind_judge
from dpo_ray.rollout.judges.columns import columns_of
from dpo_ray.rollout.judges.endpoint import RequestFailed
from dpo_ray.rollout.judges.wire_formats import parse_vllm
from dpo_ray.types import Completion, CompletionGroup, Prompt
from tests.unit.rollout.reward_server import Reply, classified, judge_groups, length, serve
from tests.unit.rollout.test_reward_model import save_tokenizer


@pytest.fixture
def context(tmp_path: Path, tiny_model: Path) -> JudgeContext:
    async def complete(*_: Any) -> str:
        raise NotImplementedError

    tokenizer = load_tokenizer(str(tiny_model))
    return JudgeContext(tmp_path, complete, lambda ids: str(tokenizer.decode(list(ids))))


@pytest.mark.parametrize("field", ["answer", "ground_truth", "label"])
def test_openrlhf_gets_the_text_of_the_policys_tokens_with_prompts_and_labels(context, tiny_model, field):
    """As OpenRLHF's SingleTurnAgentExecutor sends them, for all completions of a group at once."""
    tokenizer: Any = load_tokenizer(str(tiny_model))
    prompt_ids = tuple(tokenizer("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    prompt = Prompt(0, ({"role": "user", "content": "1+1?"},), prompt_ids, {field: "2", "other": 1})
    completions = [("2", True), ("It is 3", False)]
    group = CompletionGroup(
        prompt,
        tuple(
            Completion(text, tuple(tokenizer(text + "<|im_end|>" * ended)["input_ids"]), ended)
            for text, ended in completions
        ),
        0,
    )
    answer = {
        "rewards": [0.25, -1],
        "scores": [1, 0],
        "extra_logs": {"dummy_scores": [1.0, 2.0], "speed": 7, "note": "hello", "seconds": 99, "broken": [1, "x"]},
    }
    with serve(lambda number, body: (200, answer)) as server:
        (judgement,) = judge_groups([group], context, url=f"{server.url}/get_reward", format="openrlhf")
    assert server.paths == ["/get_reward"]
    assert server.bodies == [
        b'{"query": ["<|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n2<|im_end|>", '
        b'"<|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\nIt is 3"], '
        b'"prompts": ["<|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n", '
        b'"<|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n"], "labels": ["2", "2"]}'
    ]
    assert server.headers[0]["content-type"] == "application/json"
    assert judgement.scores == (0.25, -1.0)
    assert {name: judgement.means[name] for name in judgement.means if name != "seconds"} == {
        "dummy_scores": 1.5,
        "speed": 7.0,
    }
    assert 0 < judgement.means["seconds"] < 5
    assert judgement.totals == {"requests": 1, "retries": 0, "rejected": 0}


def test_openrlhf_gets_an_empty_label_for_a_record_without_an_answer(group, context):
    with serve(lambda number, body: (200, {"rewards": [1.0] * len(body["query"])})) as server:
        judge_groups([group("a", "b")], context, url=server.url, format="openrlhf")
    assert json.loads(server.bodies[0])["labels"] == ["", ""]


def records(group, *fields: dict[str, Any]) -> list[CompletionGroup]:
    groups = [group("a", "b", index=index) for index in range(len(fields))]
    return [replace(g, prompt=replace(g.prompt, fields=own)) for g, own in zip(groups, fields, strict=True)]


def ones(number: int, body: Any) -> Reply:
    return 200, {"rewards": [1.0] * len(body["query"])}


def test_openrlhf_gets_the_column_that_is_named(group, context):
    groups = records(group, {"solution": 7, "answer": "no"}, {"answer": "no"})
    with serve(ones) as server:
        judge_groups(groups, context, calls=2, url=server.url, format="openrlhf", column="solution")
    assert [json.loads(body)["labels"] for body in server.bodies] == [[7, 7], ["", ""]]
    named = Component(use="http", args={"url": "http://rm", "format": "openrlhf", "column": "target"})
    with pytest.raises(ValueError, match=r"needs the column 'target' of the prompts' records, .*: answer, solution"):
        bind_judge(named, columns=columns_of([group.prompt for group in groups]))


def test_records_without_any_label_are_noted_once(group, context, caplog):
    groups = records(group, {"solution": 7}, {"solution": 7})
    with serve(ones) as server:
        for columns, warned in (({"solution"}, 1), ({"solution", "label"}, 0)):
            caplog.clear()
            judge_groups(groups, replace(context, columns=columns), calls=2, url=server.url, format="openrlhf")
            messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            assert messages == warned * [
                "no record has a field answer, ground_truth or label; labels are empty strings"
            ]


@pytest.mark.parametrize("path", ["", "/", "/classify", "/v1"])
def test_vllm_gets_a_request_per_completion_with_messages_and_without_activation(group, path):
    with serve(length) as server:
        (judgement,) = judge_groups([group("yes", "")], url=server.url + path, concurrency=1)
    assert server.paths == ["/classify"] * 2
    assert server.bodies == [
        b'{"messages": [{"role": "user", "content": "question 0"}, {"role": "assistant", "content": "yes"}], '
        b'"use_activation": false}',
        b'{"messages": [{"role": "user", "content": "question 0"}, {"role": "assistant", "content": ""}], '
        b'"use_activation": false}',
    ]
    assert judgement.scores == (3.0, 0.0)
    assert judgement.totals == {"requests": 2, "retries": 0, "rejected": 0}


def test_vllm_is_told_the_name_of_the_model_if_it_is_set(group):
    with serve(length) as server:
        judge_groups([group("yes")], url=server.url, model="my-rm")
    assert json.loads(server.bodies[0])["model"] == "my-rm"


def test_sglang_gets_rendered_texts_to_which_its_tokenizer_adds_the_only_bos_token(group, tmp_path):
    save_tokenizer(tmp_path)

    def answer(number: int, body: Any) -> Reply:
        rows = [{"object": "embedding", "embedding": [i + 0.5], "index": i} for i in range(len(body["input"]))]
        return 200, {"object": "list", "data": rows[::-1], "model": "rm", "usage": {}}

    with serve(answer) as server:
        (judgement,) = judge_groups(
            [group("yes", "no")], url=server.url, format="sglang", tokenizer=str(tmp_path), model="rm"
        )
    assert server.paths == ["/v1/embeddings"]
    assert server.bodies == [
        b'{"model": "rm", "input": ["<|im_start|>user\\nquestion 0<|im_end|><|im_start|>assistant\\nyes<|im_end|>", '
        b'"<|im_start|>user\\nquestion 0<|im_end|><|im_start|>assistant\\nno<|im_end|>"]}'
    ]
    assert judgement.scores == (0.5, 1.5), "by index, not by position"
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(json.loads(server.bodies[0])["input"][0])["input_ids"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("format", "answer", "message"),
    [
        ("openrlhf", {"rewards": [1]}, 'expected an object with 2 numbers in rewards; response: {"rewards": [1]}'),
        ("openrlhf", [1.0, 2.0], "expected an object with 2 numbers in rewards"),
        ("openrlhf", {"rewards": [1.0, "high"]}, "expected numbers in rewards and found 'high'"),
        ("vllm", classified(), "expected an object with 1 entries in data"),
        ("vllm", {"data": [{"index": 0, "probs": [0.4, 0.6]}]}, "one number in data[].probs and found 2 numbers"),
        ("vllm", {"data": [{"index": 3, "probs": [0.4]}]}, "expected the indices 0 to 0 in data"),
        ("vllm", {"data": [{"index": 0, "label": "a"}]}, "one number in data[].probs and found none"),
        ("vllm", "I would rate this answer highly.", "not JSON; response: I would rate this answer highly."),
    ],
)  # fmt: skip
def test_an_answer_of_another_form_is_an_error_that_shows_it(group, context, format, answer, message):
    with serve(lambda number, body: (200, answer)) as server, pytest.raises(RequestFailed, match=re.escape(message)):
        judge_groups([group("a", "b")], context, url=server.url, format=format, concurrency=1)
    assert len(server.bodies) <= 2, "it is not asked again"


def test_a_null_reward_and_one_that_is_not_finite_are_no_score(group, context):
    with serve(lambda number, body: (200, '{"rewards": [null, Infinity, 1]}')) as server:
        (judgement,) = judge_groups([group("a", "b", "c")], context, url=server.url, format="openrlhf")
    assert [math.isnan(score) for score in judgement.scores] == [True, True, False]


def test_an_openrlhf_server_may_answer_a_single_query_with_a_bare_number(group, context):
    with serve(lambda number, body: (200, {"rewards": 0.5})) as server:
        (judgement,) = judge_groups([group("a")], context, url=server.url, format="openrlhf")
    assert judgement.scores == (0.5,)


def test_rewards_of_more_than_ten_completions_are_in_the_order_of_their_indices():
    rows = [{"index": str(i), "probs": [float(i)]} for i in reversed(range(12))]
    assert parse_vllm({"data": rows}, 12).scores == tuple(map(float, range(12)))
