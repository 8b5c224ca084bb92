"""Layouts of public preference sets: small records in their form."""

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_ray.config.losses import Examples
from dpo_ray.data.fields import Fields
from dpo_ray.data.formats import Part
from dpo_ray.data.records import PairRecord, Problem, PromptRecord, read_answers, read_pairs, read_prompts
from dpo_ray.data.turns import transcript_turns

Write = Callable[..., str]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASK, OAK, HERRING = user("Name a tree."), assistant("An oak."), assistant("A herring.")
SYSTEM = {"role": "system", "content": "Be brief."}
STRINGS = ("Name a tree.", "An oak.", "A herring.")
MESSAGES = ((ASK,), (OAK,), (HERRING,))
HH = "\n\nHuman: Name a tree.\n\nAssistant:"
CALL = {
    "role": "assistant", "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "forecast", "arguments": {"city": "Oslo"}}}],
}  # fmt: skip
RAIN, WET, DRY = {"role": "tool", "content": "rain", "name": "forecast"}, assistant("Take a coat."), assistant("Sunny.")

# Record; prompt, chosen and rejected; fields that are not used.
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any], set[str]]] = {
    "HH-RLHF": ({"chosen": f"{HH} An oak.", "rejected": f"{HH} A herring."}, (HH, " An oak.", " A herring."), set()),
    "UltraFeedback, binarized": (
        {
            "prompt": "Name a tree.", "prompt_id": "1", "chosen": [ASK, OAK], "rejected": [ASK, HERRING],
            "messages": [ASK, OAK], "score_chosen": 8.0, "score_rejected": 2.0,
        },
        MESSAGES, {"prompt_id", "messages"},
    ),
    "UltraFeedback, raw": (
        {
            "source": "x", "instruction": "Name a tree.", "models": ["a", "b"],
            "completions": [
                {"model": "a", "response": "An oak.", "overall_score": 9.0, "custom_system_prompt": "Be kind."},
                {"model": "b", "response": "A herring.", "overall_score": 2.0, "custom_system_prompt": "Be odd."},
            ],
        },
        STRINGS, {"source", "models", "completions[].model", "completions[].custom_system_prompt"},
    ),
    "HelpSteer 2": (
        {
            "split": "train", "prompt": "Name a tree.", "response_1": "A herring.", "response_2": "An oak.",
            "preference_strength": 2, "preference_statement": "2 is right",
        },
        STRINGS, {"split", "preference_statement"},
    ),
    "HelpSteer 3": (
        {
            "domain": "general", "context": [ASK], "response1": "An oak.", "response2": "A herring.",
            "overall_preference": -3,
        },
        MESSAGES, {"domain"},
    ),
    "Nectar": (
        {
            "prompt": f"{HH} ", "turns": 1, "answers": [
                {"answer": "A bush.", "model": "m", "rank": 2.0}, {"answer": "An oak.", "model": "m", "rank": 1.0},
                {"answer": "A herring.", "model": "m", "rank": 3.0},
            ],
        },
        (f"{HH} ", "An oak.", "A herring."), {"turns", "answers[].model", "answers[] in no pair"},
    ),
    "PKU-SafeRLHF": (
        {
            "prompt": "Name a tree.", "response_0": "A herring.", "response_1": "An oak.", "better_response_id": 1,
            "safer_response_id": 0, "is_response_0_safe": True,
        },
        STRINGS, {"safer_response_id", "is_response_0_safe"},
    ),
    "Argilla, UltraFeedback": (
        {
            "instruction": "Name a tree.", "chosen_response": "An oak.", "rejected_response": "A herring.",
            "chosen_avg_rating": 5,
        },
        STRINGS, {"chosen_avg_rating"},
    ),
    "distilabel, generations": (
        {"instruction": "Name a tree.", "generations": ["A herring.", "An oak."], "ratings": [1.0, 5.0], "model": "m"},
        STRINGS, {"model"},
    ),
    "distilabel, orca": (
        {"system": "Be brief.", "input": "Name a tree.", "chosen": [OAK], "rejected": [HERRING], "status": "ok"},
        ((SYSTEM, ASK), (OAK,), (HERRING,)), {"status"},
    ),
    "Skywork": (
        {"chosen": [ASK, OAK], "rejected": [ASK, HERRING], "source": "magpie"}, MESSAGES, {"source"},
    ),
    "Tulu 3 preference mixture": (
        {
            "id": "7", "source": "x", "prompt": "Name a tree.", "chosen": [ASK, OAK], "rejected": [ASK, HERRING],
            "chosen_rating": 4.5, "chosen_model": "m",
        },
        MESSAGES, {"id", "source", "chosen_rating", "chosen_model"},
    ),
    "ShareGPT with tools of text": (
        {
            "conversations": [{"from": "human", "value": "Name a tree."}],
            "chosen": {"from": "gpt", "value": "An oak."},
            "rejected": {"from": "gpt", "value": "A herring."}, "tools": "[]",
        },
        MESSAGES, set(),
    ),
    "Alpaca with input and history": (
        {
            "instruction": "Name a tree.", "input": "In one word.", "history": [["Hello", "Hi"]], "chosen": "Oak.",
            "rejected": "A herring.",
        },
        (
            (user("Hello"), assistant("Hi"), user("Name a tree.\nIn one word.")), (assistant("Oak."),), (HERRING,)
        ), set(),
    ),
    "OpenAI preference fine-tuning": (
        {
            "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True}, "preferred_output": [OAK],
            "non_preferred_output": [HERRING],
        },
        MESSAGES, {"input.parallel_tool_calls"},
    ),
    "Stanford Human Preferences": (
        {"history": "Name a tree.", "human_ref_A": "A herring.", "human_ref_B": "An oak.", "labels": 0, "score_A": 3},
        STRINGS, {"score_A"},
    ),
    "Stack Exchange pairs": (
        {"question": "Name a tree.", "response_j": "An oak.", "response_k": "A herring.", "qid": 4}, STRINGS, {"qid"},
    ),
    "arena battle": (
        {
            "question_id": "q", "conversation_a": [ASK, HERRING], "conversation_b": [ASK, OAK], "winner": "model_b",
            "turn": 1,
        },
        MESSAGES, {"question_id", "turn"},
    ),
    "Alpaca with a blank input": (
        {"instruction": "Name a tree.", "input": " ", "system": " ", "chosen": "An oak.", "rejected": "A herring."},
        STRINGS, {"input"},
    ),
    "messages as JSON text": (
        {"prompt": '[{"role": "user", "content": "Name a tree."}]', "chosen": "An oak.", "rejected": "A herring."},
        MESSAGES, set(),
    ),
    "messages as Python text": (
        {
            "chosen": "[{'content': 'Name a tree.', 'role': 'user'}, {'content': 'An oak.', 'role': 'assistant'}]",
            "rejected": "[{'content': 'Name a tree.', 'role': 'user'}, {'content': 'A herring.', 'role': 'assistant'}]",
        },
        MESSAGES, set(),
    ),
    "chosen and rejected beside completions without scores": (
        {"prompt": [ASK], "chosen": [OAK], "rejected": [HERRING], "completions": ["An oak.", "A bush."]},
        MESSAGES, {"completions"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_a_public_set_gives_its_pair_and_names_its_other_fields(name: str, write: Write):
    record, expected, unread = LAYOUTS[name]
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert (*pair.system, pair.prompt, pair.chosen, pair.rejected) == expected
    assert set(pair.unread) == unread


@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_of_every_layout_serve_as_prompts(name: str, write: Write):
    record, (expected, _, _), _ = LAYOUTS[name]
    (prompt,) = read_prompts([write([record])])
    assert isinstance(prompt, PromptRecord), prompt
    assert prompt.prompt == expected


def test_transcripts_that_part_early_serve_as_prompts(write: Write):
    record = {"chosen": f"{HH} No.\n\nHuman: Why?\n\nAssistant: So.", "rejected": f"{HH} Go on."}
    (prompt,) = read_prompts([write([record])])
    assert isinstance(prompt, PromptRecord)
    assert prompt.prompt == HH


def test_other_fields_of_a_prompt_are_carried_along(write: Write):
    (prompt,) = read_prompts([write([{"prompt": [user("What is 6 x 7?")], "answer": "42", "level": 3, "note": None}])])
    assert isinstance(prompt, PromptRecord)
    assert prompt.fields == {"answer": "42", "level": 3}


def test_a_ranked_list_gives_its_pairs_by_decreasing_difference_and_no_ties(write: Write):
    source = write([{"prompt": "q", "completions": ["a", "b", "c", "d"], "scores": [1, 4, 4, 2]}])

    def pairs(count: int) -> list[Any]:
        records = [pair for pair in read_pairs([Part(source)], pairs_per_prompt=count) if isinstance(pair, PairRecord)]
        return [(pair.chosen, pair.rejected, pair.number) for pair in records]

    assert pairs(1) == [("b", "a", 1)]
    assert pairs(3) == [("b", "a", 1), ("c", "a", 1), ("b", "d", 1)]
    assert pairs(99) == [("b", "a", 1), ("c", "a", 1), ("b", "d", 1), ("c", "d", 1), ("d", "a", 1)]


@pytest.mark.parametrize(
    ("record", "prompt", "completion", "label"),
    [
        ({"prompt": "sky?", "completion": "blue", "label": True}, "sky?", "blue", 1),
        ({"prompt": "sky?", "completion": "red", "label": "false"}, "sky?", "red", -1),
        ({"prompt": [ASK], "completion": [OAK], "label": 1}, (ASK,), (OAK,), 1),
        ({"messages": [SYSTEM, ASK, HERRING], "label": 0}, (SYSTEM, ASK), (HERRING,), -1),
        ({"instruction": "sky?", "output": "blue", "kto_tag": True}, "sky?", "blue", 1),
    ],
)
def test_completions_with_a_label_are_read_for_losses_without_pairs(
    record: dict[str, Any], prompt: Any, completion: Any, label: int, write: Write
):
    (found,) = read_pairs([Part(write([record]))], examples="unpaired")
    assert isinstance(found, PairRecord), found
    assert (found.prompt, found.chosen, found.rejected) == (prompt, completion, completion)
    assert found.unpaired == label
    assert found.unread == ()


def test_a_label_may_be_a_decimal_number(tmp_path: Path):
    labels = pa.array([Decimal("1"), Decimal("0")])
    table = pa.table({"prompt": ["q", "q"], "completion": ["a", "b"], "label": labels})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    records = list(read_pairs([Part(f"{tmp_path}/a.parquet")], examples="unpaired"))
    assert [record.unpaired for record in records if isinstance(record, PairRecord)] == [1, -1]


def test_a_label_that_says_neither_is_rejected(write: Write):
    (problem,) = read_pairs([Part(write([{"prompt": "q", "completion": "a", "label": 0.7}]))], examples="unpaired")
    assert isinstance(problem, Problem)
    assert problem.detail == "label: found 0.7; accepted: true, false, 1, 0, -1, desirable or undesirable"


def test_a_pair_is_a_desirable_and_an_undesirable_completion_for_losses_without_pairs(write: Write):
    source = write([{"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 4, 2]}])
    found = [
        (r.chosen, r.unpaired) for r in read_pairs([Part(source)], examples="unpaired") if isinstance(r, PairRecord)
    ]
    assert found == [("b", 1), ("a", -1)]


def test_a_completion_gets_one_label_from_several_pairs(write: Write):
    source = write([{"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, 2, 1]}])
    read = read_pairs([Part(source)], examples="unpaired", pairs_per_prompt=3)
    assert [(r.chosen, r.unpaired) for r in read if isinstance(r, PairRecord)] == [("a", 1), ("c", -1), ("b", -1)]


def test_a_ranked_list_is_read_by_decreasing_score_and_without_ties_for_losses_of_lists(write: Write):
    source = write([{"prompt": "q", "completions": ["a", "b", "c", "d", "b"], "scores": [1, 4, 4, 2, 0]}])
    pairs = [pair for pair in read_pairs([Part(source)], examples="lists") if isinstance(pair, PairRecord)]
    # "b" is as good as "c" and the worst: beside "c" it makes the longest list.
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(text, text) for text in "cdab"]
    assert [pair.completions for pair in pairs] == [(i, i) for i in (2, 3, 0, 4)]


@pytest.mark.parametrize("examples", ["pairs", "lists", "unpaired"])
def test_completions_of_a_ranked_list_that_are_in_no_pair_are_named(examples: Examples, write: Write):
    record = {"prompt": "q", "completions": ["a", "b", "b", "d"], "scores": [4, 3, 2, 1]}
    first, *_ = read_pairs([Part(write([record]))], examples=examples)
    assert isinstance(first, PairRecord)
    assert first.unread == ("completions[] in no pair",)  # between best and worst, or equal to a better one
    first, *_ = read_pairs([Part(write([record]))], pairs_per_prompt=9)
    assert isinstance(first, PairRecord)
    assert first.unread == ()


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": json.dumps(json.dumps([ASK])), "chosen": "An oak.", "rejected": "A herring."}, MESSAGES),
        (
            {
                "conversations": [{"from": "Human", "value": "Name a tree."}],
                "chosen": {"from": "bot", "value": "An oak."},
                "rejected": {"from": "Model", "value": "A herring."},
            },
            MESSAGES,
        ),
        (
            {
                "prompt": json.dumps(ASK), "chosen": '{"from":"gpt","value":"An oak."}',
                "rejected": "{'value': 'A herring.', 'from': 'gpt'}",
            },
            MESSAGES,
        ),
        (
            {
                "conversations": '[{"id": 1, "from": "human", "value": "Name a tree."}]',
                "chosen": json.dumps(json.dumps(OAK)), "rejected": json.dumps([HERRING]),
            },
            MESSAGES,
        ),
        (
            {
                "prompt": json.dumps([ASK]),
                "chosen": json.dumps([{"role": "assistant", "tool_calls": CALL["tool_calls"]}, RAIN, WET]),
                "rejected": json.dumps([DRY]),
            },
            ((ASK,), (CALL, RAIN, WET), (DRY,)),
        ),
        (
            {
                "prompt": json.dumps([ASK]), "scores": [2, 1],
                "completions": [{"text": json.dumps([OAK])}, {"text": json.dumps([HERRING])}],
            },
            MESSAGES,
        ),
        (
            {"prompt": [ASK], "chosen": [{**OAK, "reasoning": "Trees."}], "rejected": [HERRING]},
            ((ASK,), ({**OAK, "reasoning_content": "Trees."},), (HERRING,)),
        ),
    ],
    ids=[
        "JSON encoded twice", "roles of other names", "one message as text", "another key first",
        "calls without content", "text of a ranked list", "reasoning",
    ],
)  # fmt: skip
def test_messages_in_an_odd_spelling_are_read(record: dict[str, Any], turns: Any, write: Write):
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt, pair.chosen, pair.rejected) == turns
    assert set(pair.unread) <= {"conversations[].id"}


def test_a_text_in_quotes_that_is_no_conversation_stays_a_text(write: Write):
    (pair,) = read_pairs([Part(write([{"prompt": '"[{1}]" is what?', "chosen": '"[{}]"', "rejected": "b"}]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt, pair.chosen) == ('"[{1}]" is what?', '"[{}]"')


TOOLS = [{"type": "function", "function": {"name": "forecast", "description": "Weather of a city"}}]


def test_a_prompt_and_whole_conversations_keep_every_turn(write: Write):
    earlier = [user("Hello"), assistant("Hi")]
    cases = [
        # The conversations repeat the end of the prompt, the whole of it, or nothing of a system turn.
        ({"prompt": [SYSTEM, ASK], "chosen": [ASK, OAK], "rejected": [ASK, HERRING]}, (SYSTEM, ASK)),
        ({"prompt": [*earlier, ASK], "chosen": [ASK, OAK], "rejected": [ASK, HERRING]}, (*earlier, ASK)),
        ({"prompt": [SYSTEM], "chosen": [ASK, OAK], "rejected": [ASK, HERRING]}, (SYSTEM, ASK)),
        ({"prompt": [ASK], "chosen": [*earlier, ASK, OAK], "rejected": [*earlier, ASK, HERRING]}, (*earlier, ASK)),
    ]
    for record, expected in cases:
        (pair,) = read_pairs([Part(write([record]))])
        assert isinstance(pair, PairRecord), pair
        assert (pair.prompt, pair.chosen, pair.rejected) == (expected, (OAK,), (HERRING,))


BEGUN = [ASK, assistant("The name")]


@pytest.mark.parametrize(
    ("prompt", "whole", "expected", "answers"),
    [
        ([ASK, CALL, RAIN], [[ASK, CALL, RAIN, WET], [ASK, CALL, RAIN, DRY]], [ASK, CALL, RAIN], [[WET], [DRY]]),
        (
            [SYSTEM, ASK, CALL, RAIN], [[ASK, CALL, RAIN, WET], [ASK, CALL, RAIN, CALL, RAIN, DRY]],
            [SYSTEM, ASK, CALL, RAIN], [[WET], [CALL, RAIN, DRY]],
        ),
        ([CALL, RAIN], [[ASK, CALL, RAIN, WET], [ASK, CALL, RAIN, DRY]], [ASK, CALL, RAIN], [[WET], [DRY]]),
        ([SYSTEM, ASK, RAIN], [[RAIN, WET], [RAIN, DRY]], [SYSTEM, ASK, RAIN], [[WET], [DRY]]),
        (
            BEGUN, [[ASK, assistant("The name is oak.")], [ASK, assistant("The name?")]],
            BEGUN, [[assistant(" is oak.")], [assistant("?")]],
        ),
        (
            BEGUN[1:], [[SYSTEM, ASK, CALL | {"content": "The name"}, RAIN, WET], [SYSTEM, ASK, BEGUN[1], WET]],
            [SYSTEM, *BEGUN], [[CALL | {"content": ""}, RAIN, WET], [assistant(""), WET]],
        ),
        (
            BEGUN, [[ASK, assistant("The name is oak."), ASK, OAK], [ASK, assistant("The name is oak."), ASK, HERRING]],
            [ASK, assistant("The name is oak."), ASK], [[OAK], [HERRING]],
        ),
        ([OAK, ASK], [[OAK, ASK, WET], [OAK, ASK, DRY]], [OAK, ASK], [[WET], [DRY]]),
        ([ASK], [[ASK, OAK, user("More?"), WET], [ASK, OAK, user("More?"), DRY]], [ASK, OAK, user("More?")],
         [[WET], [DRY]]),
        ([ASK, OAK], [[user("More?"), WET], [user("More?"), DRY]], [ASK, OAK, user("More?")], [[WET], [DRY]]),
        (BEGUN, [[assistant(" is")], [assistant("?")]], BEGUN, [[assistant(" is")], [assistant("?")]]),
    ],
)  # fmt: skip
def test_a_prompt_that_whole_conversations_repeat_is_read_once(
    prompt: Any, whole: Any, expected: Any, answers: Any, write: Write
):
    verdict = {"prompt": prompt, "response_1": whole[0], "response_2": whole[1], "preference_strength": -1}
    source = write([{"prompt": prompt, "chosen": whole[0], "rejected": whole[1]}, verdict])
    for pair, online in zip(read_pairs([Part(source)]), read_prompts([source]), strict=True):
        assert isinstance(pair, PairRecord), pair
        assert isinstance(online, PromptRecord), online
        assert (pair.prompt, pair.chosen, pair.rejected) == (tuple(expected), *map(tuple, answers))
        assert online.prompt == pair.prompt


def test_a_prompt_that_a_completion_with_a_label_repeats_is_read_once(write: Write):
    record = {"prompt": BEGUN, "completion": [ASK, assistant("The name is oak.")], "label": True}
    (pair,) = read_pairs([Part(write([record]))], examples="unpaired")
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt, pair.chosen) == (tuple(BEGUN), (assistant(" is oak."),))


def test_completions_may_be_trajectories_and_start_where_the_model_answers(write: Write):
    record = {"tools": TOOLS, "chosen": [ASK, CALL, RAIN, WET], "rejected": [ASK, CALL, RAIN, DRY]}
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASK,), (CALL, RAIN, WET), (CALL, RAIN, DRY))
    assert pair.tools == tuple(TOOLS)


PROBLEMS = [
    ({"images": ["wren.png"], "prompt": "Which?", "chosen": "a", "rejected": "b"}, "images: found a list of 1"),
    (
        {"prompt": [{**ASK, "images": ["wren.png"]}], "chosen": "a", "rejected": "b"},
        "prompt[0].images: found a list of 1; accepted: text records only",
    ),
    (
        {"prompt": [{**ASK, "content": [{"text": "Which?", "image": "wren.png"}]}], "chosen": "a", "rejected": "b"},
        'prompt[0].content[0].image: found "wren.png"; accepted: text records only',
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": [{"type": "text", "text": "Which?", "image_url": {"url": "wren.png"}}]}
            ],
            "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"},
        },
        "conversations[0].value[0].image_url: found an object of 1",
    ),
    (
        {
            "prompt": "q", "scores": [1, 0],
            "completions": [{"text": "a", "audio": "a.wav"}, {"text": "b", "audio": "b.wav"}],
        },
        'completions[0].audio: found "a.wav"',
    ),
    ({"prompt": " <image>\nWhich bird?", "chosen": "a", "rejected": "b"}, "prompt: found the placeholder <image>"),
    *(
        ({"prompt": prompt, "chosen": "a", "rejected": "b"}, f"found the placeholder {placeholder};")
        for prompt, placeholder in (
            ("<image><image>\nWhat differs?", "<image>"),
            ("Look at these.\n<image> <image>\nWhat differs?", "<image>"),
            ("Picture 1: <image>\nPicture 2: <image>\nWhat differs?", "<image>"),
            ("\n\nHuman: <image> Which bird?\n\nAssistant:", "<image>"),
            ("User: <audio>\nWhich bird?\nAssistant:", "<audio>"),
            ([ASK, OAK, user("And here?\n<video>\nWhich?")], "<video>"),
            ("What is in <image_1> and <image_2>?", "<image_1>"),
            ("<image 1> Which bird?", "<image 1>"),
            ("[IMG] Which bird?", "[IMG]"),
            ("See <image_placeholder>, please.", "<image_placeholder>"),
            ("<start_of_image>Which bird?", "<start_of_image>"),
            ("<|vision_start|><|image_pad|><|vision_end|>Which bird?", "<|vision_start|>"),
        )
    ),
    ({"prompt": "q", "chosen": "A wren:\n<image>\n", "rejected": "b"}, "chosen: found the placeholder <image>"),
    (
        {"prompt": [ASK], "chosen": [OAK], "rejected": [assistant("<image> A wren.")]},
        "rejected[0].content: found the placeholder <image>",
    ),
    (
        {"prompt": "q", "completions": ["<image>\nA wren.", "b"], "scores": [1, 0]},
        "completions[0]: found the placeholder <image>",
    ),
    ({"prompt": [user("See <|image_pad|>")], "chosen": "a", "rejected": "b"}, "the placeholder <|image_pad|>"),
    ({"prompt": "q", "chosen": [OAK, RAIN], "rejected": [HERRING]}, "chosen: found a tool turn at the end"),
    (
        {"prompt": [ASK, CALL], "completions": [[RAIN, WET], [RAIN, DRY]], "scores": [1, 0]},
        "completions[0]: found a tool turn at the start; accepted: an assistant turn",
    ),
    (
        {"prompt": BEGUN, "chosen": "The name is oak.", "rejected": "The name?"},
        "chosen and rejected: found answers that start with the end of the prompt",
    ),
    (
        {"prompt": [ASK, CALL, RAIN], "chosen": [CALL, RAIN, WET], "rejected": [CALL, RAIN, DRY]},
        "chosen and rejected: found answers that start with the end of the prompt",
    ),
    (
        {"prompt": BEGUN, "completions": ["The name is oak.", "The name?"], "scores": [1, 0]},
        "completions[0] and completions[1]: found answers that start with the end of the prompt",
    ),
    (
        {"prompt": [ASK, CALL, RAIN], "chosen": [ASK, WET], "rejected": [ASK, DRY]},
        "chosen and rejected: found whole conversations without the prompt",
    ),
    (
        {"prompt": [ASK, OAK], "chosen": [SYSTEM, user("More?"), WET], "rejected": [SYSTEM, user("More?"), DRY]},
        "chosen and rejected: found whole conversations without the prompt",
    ),
    ({"prompt": [SYSTEM, ASK], "system": "Be long.", "chosen": "a", "rejected": "b"}, 'system: found "Be long."'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": "{"}, "tools: found text that is not JSON"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"name": "f", "description": "\ud83d"}]},
        "tools[0].description: found half of a surrogate pair",
    ),
    (
        {
            "prompt": [ASK], "rejected": [OAK],
            "chosen": [CALL | {"tool_calls": [{"name": "f", "arguments": {"x": ["\ud83d"]}}]}],
        },
        "chosen[0].tool_calls[0].arguments.x[0]: found half of a surrogate pair",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "\ud83d": 1}, 'a key "\\ud83d": found half of a surrogate pair'),
    (
        {"prompt": "[{'role': 'user', 'content': array(1)}]", "chosen": "a", "rejected": "b"},
        "which starts like a list of messages",
    ),
    (
        {"prompt": '[{"role": "ipython", "content": "rain"}]', "chosen": "a", "rejected": "b"},
        'prompt[0].role: found "ipython"; accepted',
    ),
    (
        {"prompt": "q", "chosen": '[{"content": "a", "role": "function"}]', "rejected": json.dumps([HERRING])},
        'chosen[0].role: found "function"; accepted',
    ),
    ({"prompt": "q", "chosen": '[{"role": "assistant"}]', "rejected": json.dumps([OAK])}, "chosen[0].content"),
    ({"prompt": json.dumps([ASK, None]), "chosen": "a", "rejected": "b"}, "prompt[1]: found null"),
    ({"prompt": "{'role': 'user', 'content': array(1)}", "chosen": "a", "rejected": "b"}, "which starts like a"),
    ({"prompt": "q", "chosen": json.dumps(OAK), "rejected": "b"}, "chosen and rejected: found text and messages"),
    (
        {"prompt": "q", "response_1": json.dumps(OAK), "response_2": "b", "preference_strength": 1},
        "response_1 and response_2: found text and messages",
    ),
    ({"prompt": "q", "completion": "a", "label": True}, "one completion and a label, for loss.use: kto or bco"),
    (
        {"chosen": f"{HH} No.\n\nHuman: Why?\n\nAssistant: So.", "rejected": f"{HH} Go on."},
        "chosen: found a turn by 'Human' after the prompt",
    ),
    *(
        (
            {"prompt": prompt, "chosen": f" An oak.{further}And?", "rejected": " A herring."},
            f"chosen: found a turn by {speaker!r} after the prompt",
        )
        for prompt, further, speaker in (
            (f"A talk with an assistant.{HH}", "\n\nHuman: ", "Human"),
            ("User: Name a tree.\nAssistant:", "\nUser: ", "User"),
            ("A chat. USER: Name a tree. ASSISTANT:", "</s>USER: ", "User"),
            ("### Human: Name a tree.### Assistant:", "### Human: ", "Human"),
            ("Name a tree.\n<extra_id_1>Assistant\nOak.\n<extra_id_1>User\nMore?", "\n<extra_id_1>User\n", "User"),
        )
    ),
    (
        {"chosen": f"Talk.{HH} No.\n\nHuman: Why?\n\nAssistant: So.", "rejected": f"Talk.{HH} Go on."},
        "chosen: found a turn by 'Human' after the prompt",
    ),
    (
        {"prompt": [ASK], "completions": [[OAK, ASK, OAK], [HERRING]], "scores": [1, 0]},
        "completions[0]: found a turn by 'user' after the prompt",
    ),
    ({"messages": [ASK, OAK], "chosen": [OAK], "rejected": [HERRING]}, "messages: found an assistant turn at the end"),
    ({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "?"}, 'strength: found "?"'),
]  # fmt: skip


@pytest.mark.parametrize(("record", "detail"), PROBLEMS)
def test_a_record_whose_content_would_be_lost_is_rejected_by_field(record: dict[str, Any], detail: str, write: Write):
    (problem,) = read_pairs([Part(write([record]))])
    assert isinstance(problem, Problem), problem
    assert detail in problem.detail


@pytest.mark.parametrize(
    "texts",
    [
        ("How do I use the <video> tag?", "Use <video> or <audio>.", "No."),
        ("Which tag shows a film?", "<video>", "`<image>`"),
        ("<video>\n<source>\n</video>\nWhat is wrong?", "```html\n<video>\n```", "[IMG]a.png[/IMG]"),
        ("What does this do?\n```\n<image>\n```", "It is\n```\n<image_1>\n```", "`<|image_pad|>`"),
        ('[{"role": "user", "content": "x"}] <- why does this fail?', '[{"value": 1}]', "No."),
        ("Answer as JSON.", '[{"role": "admin", "name": "Ada"}]', '{"from": "Oslo", "to": "Bergen"}'),
        ("Answer as JSON.", '{"name": "Ada", "role": "user"}', "I do not know."),
        ("Answer as JSON.", '{"value": "admin"', "{'role'}: a set in Python, not {'role': 1}"),
        ("Human: an essay on what it means to be one", "So.", "No."),
        ("Write a dialogue.", "User: Hi\nAssistant: Hello\nUser: Bye", "Human: Hi"),
        ("Continue.\nAssistant: Hi\nUser:", " Hello\nAssistant: And?\nUser: Bye", " No"),
    ],
)
def test_text_that_resembles_another_form_stays_text(texts: tuple[str, str, str], write: Write):
    (pair,) = read_pairs([Part(write([dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt, pair.chosen, pair.rejected) == texts
    assert transcript_turns(texts[0]) is None


def test_odd_values_are_reported_and_raise_nothing(write: Write):
    records: list[Any] = [
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": [1]},
        {"prompt": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": {"a": 1}},
        {"prompt": '[{"role": ' + "[" * 100_000 + "]", "chosen": "a", "rejected": "b"},
        {"prompt": "[{'role': {[]: 1}}]", "chosen": "a", "rejected": "b"},
    ]
    assert [type(record) for record in read_pairs([Part(write(records))])] == len(records) * [Problem]
    (prompt,) = read_prompts([write([{"prompt": "q", "x": float("nan"), "y": {"z": [float("inf"), 1.0]}}])])
    assert isinstance(prompt, PromptRecord)
    assert prompt.fields == {"x": None, "y": {"z": [None, 1.0]}}


def test_a_field_with_half_of_a_surrogate_pair_is_no_field_for_judges_and_named(write: Write):
    (prompt,) = read_prompts([write([{"prompt": "q", "answer": {"texts": ["a", "\ud83d"]}, "level": 3}])])
    assert isinstance(prompt, PromptRecord)
    assert prompt.fields == {"level": 3}
    detail = "answer.texts[1]: found half of a surrogate pair at character 1; accepted: Unicode text"
    assert prompt.notes == (("unreadable_cell", detail),)


def test_fields_that_a_prompt_was_not_built_from_are_carried_along(write: Write):
    records = [
        {"question": "Who wrote it?", "context": "The book is Emma."},
        {"messages": [ASK, OAK]},
        {"prompt": [{**ASK, "weight": 1}], "input": "more"},
    ]
    prompts = [prompt for prompt in read_prompts([write(records)]) if isinstance(prompt, PromptRecord)]
    assert [dict(prompt.fields) for prompt in prompts] == [
        {"context": "The book is Emma."}, {"messages": [ASK, OAK]}, {"input": "more"}
    ]  # fmt: skip
    assert prompts[2].unread == ("prompt[].weight",)


def test_context_messages_are_the_prompt_and_the_same_text_as_context_is_carried_along(write: Write):
    """As in the prompt sets of RLHFlow and OpenRLHF."""
    conversation = [ASK, OAK, user("Name another.")]
    records = [
        {"context": "user: Name a tree. ...", "context_messages": conversation, "dataset": "x", "id": 7},
        {"context_messages": conversation, "chosen": "A beech.", "rejected": "A herring."},
        {"context_messages": conversation, "chosen": [*conversation, OAK], "rejected": [*conversation, HERRING]},
    ]
    prompts = list(read_prompts([write(records)]))
    assert [prompt.prompt for prompt in prompts if isinstance(prompt, PromptRecord)] == 3 * [tuple(conversation)]
    assert isinstance(prompts[0], PromptRecord)
    assert dict(prompts[0].fields) == {"context": "user: Name a tree. ...", "dataset": "x", "id": 7}
    _, text, messages = read_pairs([Part(write(records))])
    assert isinstance(text, PairRecord)
    assert isinstance(messages, PairRecord)
    assert (text.prompt, text.chosen) == (tuple(conversation), (assistant("A beech."),))
    assert (messages.prompt, messages.chosen, messages.rejected) == (tuple(conversation), (OAK,), (HERRING,))


def test_unusable_completions_of_a_ranked_list_are_left_out_and_reported(write: Write):
    record = {"prompt": "q", "generations": ["a", " ", "b", "c"], "ratings": [1, 9, None, 2]}
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.chosen, pair.rejected) == ("c", "a")
    assert [(problem.reason, problem.detail.partition(":")[0]) for problem in pair.left_out] == [
        ("empty_field", "generations[1]"),
        ("bad_score", "generations[2]"),
    ]


def test_null_and_empty_fields_are_no_content(write: Write):
    record = {
        "prompt": [{"role": "system", "content": None}, {**ASK, "tool_calls": None, "name": None}], "system": None,
        "images": [], "tools": None, "chosen": "An oak.", "rejected": "A herring.", "extra": None,
    }  # fmt: skip
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt, pair.unread) == ((ASK,), ())


def test_calls_of_tools_that_are_json_text_of_none_are_none(write: Write):
    prompt = [ASK | {"tool_calls": "null"}]
    record = {"prompt": prompt, "chosen": [OAK | {"tool_calls": "[]"}], "rejected": [HERRING | {"tool_calls": "[]"}]}
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt, pair.chosen, pair.rejected) == MESSAGES


def test_scores_in_messages_and_ranks_beside_scores_are_reported(write: Write):
    records = [
        {"prompt": [ASK], "chosen": [{**OAK, "score": 9}], "rejected": [{**HERRING, "rating": 2}]},
        {"prompt": [ASK], "completions": [{**OAK, "score": 9, "rank": 2}, {**HERRING, "score": 2, "rank": 1}]},
        {"prompt": "q", "completions": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]},
    ]
    pairs = [pair for pair in read_pairs([Part(write(records))]) if isinstance(pair, PairRecord)]
    assert [set(pair.unread) for pair in pairs] == [
        {"chosen[].score", "rejected[].rating"}, {"completions[].rank"}, set()
    ]  # fmt: skip


def test_null_fields_are_missing_in_the_message_too(write: Write):
    record = {"prompt": "q", "response_1": "a", "response_2": None, "preference_strength": 1}
    (problem,) = read_pairs([Part(write([record]))])
    assert isinstance(problem, Problem)
    assert problem.detail.startswith("chosen: found preference_strength, prompt, response_1; accepted are ")


def test_the_input_of_openai_may_be_json_text(write: Write):
    call_for = {"type": "function", "function": {"name": "forecast"}}
    record = {
        "input": json.dumps({"messages": [ASK], "tools": [call_for]}),
        "preferred_output": json.dumps([OAK]), "non_preferred_output": json.dumps([HERRING]),
    }  # fmt: skip
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt, pair.chosen, pair.rejected) == MESSAGES
    assert pair.tools == (call_for,)
    assert pair.unread == ()


def test_tools_of_an_input_that_is_no_prompt_are_not_read(write: Write):
    inner = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "f"}]}
    alpaca = {"instruction": "Sort it.", "input": json.dumps(inner), "chosen": "a", "rejected": "b"}
    beside = {"prompt": [ASK], "input": inner, "chosen": [OAK], "rejected": [HERRING]}
    for record, unread in ((alpaca, ()), (beside, ("input",))):
        (pair,) = read_pairs([Part(write([record]))])
        assert isinstance(pair, PairRecord), pair
        assert (pair.tools, pair.unread) == ((), unread)
    damaged = alpaca | {"input": json.dumps(inner | {"tools": 3})}
    (pair,) = read_pairs([Part(write([damaged]))])
    assert isinstance(pair, PairRecord), pair


def test_a_system_prompt_beside_a_transcript_with_a_system_turn_is_read_once_or_rejected(write: Write):
    prompt = "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nName a tree.\n<extra_id_1>Assistant\n"
    record = {"prompt": prompt, "chosen": "An oak.", "rejected": "A herring."}
    same, other = read_pairs([Part(write([record | {"system": text} for text in ("Be brief.", "Be kind.")]))])
    assert isinstance(same, PairRecord), same
    assert (same.prompt, same.system) == (prompt, ())
    assert isinstance(other, Problem), other
    assert other.detail == 'system: found "Be kind." beside a system turn in the conversation; accepted: one of the two'


def test_self_play_reads_a_text_with_earlier_exchanges_and_its_answer(write: Write):
    (item,) = read_answers([write([{"conversations": "Name it.", "history": [["Hi", "Hello"]], "output": "A"}])])
    assert not isinstance(item, Problem), item
    prompt, answered = item
    assert (prompt.prompt, answered.chosen) == ((user("Hi"), assistant("Hello"), user("Name it.")), "A")


def test_unknown_keys_of_messages_are_reported(write: Write):
    record = {"prompt": [{**ASK, "weight": 0}], "chosen": [OAK], "rejected": [{**HERRING, "model": "m"}]}
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert set(pair.unread) == {"prompt[].weight", "rejected[].model"}


def test_other_keys_of_content_parts_are_reported(write: Write):
    cached = {"type": "text", "text": "Name a tree.", "cache_control": {"type": "ephemeral"}, "image": None}
    answers = [{"content": [{**OAK, "content": [{"text": "An oak.", "id": 1}]}], "score": 1}, {**HERRING, "score": 0}]
    for record, unread in (
        ({"prompt": [{**ASK, "content": [cached]}], "chosen": [OAK], "rejected": [HERRING]}, "prompt[].content[]."),
        ({"prompt": [ASK], "completions": answers}, "completions[].content[]."),
    ):
        (pair,) = read_pairs([Part(write([record]))])
        assert isinstance(pair, PairRecord), pair
        assert (pair.prompt, pair.chosen, pair.rejected) == MESSAGES
        assert pair.unread == (unread + ("cache_control" if "chosen" in record else "id"),)


@pytest.mark.parametrize(
    "empty", [{"input": ""}, {"prompt": " "}, {"prompt": []}, {"history": []}, {"instruction": "", "input": ""}]
)
@pytest.mark.parametrize(
    ("names", "verdict"), [(("chosen", "rejected"), {}), (("conversation_a", "conversation_b"), {"winner": "model_a"})]
)
def test_an_empty_prompt_beside_whole_conversations_is_none(
    names: tuple[str, str], verdict: dict[str, Any], empty: dict[str, Any], write: Write
):
    whole = ([ASK, OAK], [ASK, HERRING]), (f"{HH} An oak.", f"{HH} A herring.")
    records = [dict(zip(names, pair, strict=True)) | verdict | empty for pair in whole]
    messages, transcripts = read_pairs([Part(write(records))])
    assert isinstance(messages, PairRecord), messages
    assert isinstance(transcripts, PairRecord), transcripts
    assert (messages.prompt, messages.chosen, messages.rejected) == MESSAGES
    assert (transcripts.prompt, transcripts.chosen) == (HH, " An oak.")
    assert [prompt.prompt for prompt in read_prompts([write(records)]) if isinstance(prompt, PromptRecord)] == [
        (ASK,), HH
    ]  # fmt: skip


def test_an_empty_prompt_field_does_not_replace_a_filled_one(write: Write):
    record = {"prompt": "", "question": "Name a tree.", "chosen": "An oak.", "rejected": "A herring."}
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert pair.prompt == "Name a tree."


@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_system_column_does_not_replace_a_filled_one(empty: str | None, write: Write):
    record = {"system": empty, "system_prompt": "Be brief.", "prompt": [ASK], "chosen": [OAK], "rejected": [HERRING]}
    (pair,) = read_pairs([Part(write([record]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt, pair.unread) == ((SYSTEM, ASK), ())
    (pair,) = read_pairs([Part(write([record | {"system": "Be kind."}]))])
    assert isinstance(pair, PairRecord), pair
    assert (pair.prompt[0], pair.unread) == ({"role": "system", "content": "Be kind."}, ("system_prompt",))


@pytest.mark.parametrize(
    ("turns", "prompt"),
    [
        ([ASK, CALL, RAIN, WET], (ASK,)),
        ([ASK, OAK, ASK, CALL, RAIN, WET], (ASK, OAK, ASK)),
        ([ASK, CALL, RAIN], (ASK, CALL, RAIN)),
    ],
    ids=["a trajectory", "a trajectory after an answer", "no answer yet"],
)
def test_a_prompt_ends_before_the_last_trajectory_offline_and_online(
    turns: list[dict[str, Any]], prompt: Any, write: Write
):
    source = write([{"messages": turns, "label": True}])
    (online,) = read_prompts([source])
    assert isinstance(online, PromptRecord), online
    assert online.prompt == prompt
    (offline,) = read_pairs([Part(source)], examples="unpaired")
    if turns[-1] == WET:
        assert isinstance(offline, PairRecord), offline
        assert offline.prompt == prompt
        ((played, answered),) = [item for item in read_answers([source]) if not isinstance(item, Problem)]
        assert (played.prompt, answered.chosen) == (prompt, (CALL, RAIN, WET))
    else:
        assert isinstance(offline, Problem), offline


@pytest.mark.parametrize(
    ("record", "answer", "fields"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}, "a", {
            "rejected": "b", "score_chosen": 2, "score_rejected": 1,
        }),
        ({"chosen": [ASK, OAK], "rejected": [ASK, HERRING]}, (OAK,), {"rejected": [ASK, HERRING]}),
        ({"messages": [ASK, OAK], "output": "An elm."}, (OAK,), {"output": "An elm."}),
        ({"prompt": "p", "response_1": "b", "response_2": "a", "preference_strength": 1}, "a", {
            "response_1": "b", "preference_strength": 1,
        }),
        ({"prompt": "p", "generations": ["a", "b"], "ratings": [2, 1]}, "a", {
            "generations": ["a", "b"], "ratings": [2, 1],
        }),
    ],
)  # fmt: skip
def test_self_play_carries_along_what_prompt_and_answer_were_not_built_from(
    record: dict[str, Any], answer: Any, fields: dict[str, Any], write: Write
):
    (item,) = read_answers([write([record])])
    assert not isinstance(item, Problem), item
    prompt, answered = item
    assert (answered.chosen, prompt.fields) == (answer, fields)


@pytest.mark.parametrize(
    ("prompt", "detail"),
    [
        ("Compare <image> with <image>, in <audio>.", "prompt: <image> <audio>"),
        ([user("Compare <image> and this."), OAK, user("What of <video> then?")],
         "prompt[0].content: <image>, prompt[2].content: <video>"),
        ([ASK, CALL, {"role": "tool", "content": "<image>"}], "prompt[2].content: <image>"),
        ("How do I use the <video> tag?", "prompt: <video>"),
        ("Is `<image_1>` a variable?", "prompt: <image_1>"),
        ("Name a tree.", None),
    ],
)  # fmt: skip
def test_a_placeholder_of_media_within_a_text_is_kept_and_named(prompt: Any, detail: str | None, write: Write):
    source = write([{"prompt": prompt, "chosen": "a", "rejected": "b"}])
    (pair,), (online,), (played,) = read_pairs([Part(source)]), read_prompts([source]), read_answers([source])
    notes = (("media_placeholder", detail),) if detail else ()
    assert isinstance(pair, PairRecord), pair
    assert isinstance(online, PromptRecord), online
    assert not isinstance(played, Problem), played
    assert pair.notes == online.notes == played[0].notes == notes


def test_a_turn_of_calls_by_the_user_raises_nothing(write: Write):
    odd = {**CALL, "role": "user"}
    assert all(read_pairs([Part(write([{"prompt": [odd], "chosen": "a", "rejected": "b"}]))]))


def test_transcripts_become_turns():
    assert transcript_turns(f"{HH} An oak.\n\nHuman: Thanks") == (ASK, OAK, user("Thanks"))
    assert transcript_turns(HH) == (ASK,)
    markers = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nName a tree."  # HelpSteer 2
    assert transcript_turns(markers) == (user("Hi"), assistant("Hello"), ASK)
    system = "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nName a tree.\n<extra_id_1>Assistant\n"
    assert transcript_turns(system) == (SYSTEM, ASK)
    assert transcript_turns(system.replace("Be brief.", "")) == (ASK,)
    assert transcript_turns(system.partition("brief.\n")[2]) == (ASK,)
    assert transcript_turns("Name a tree.") is None


def test_content_parts_of_text_are_joined_and_function_calls_become_tool_calls():
    parts = {"role": "user", "content": [{"type": "text", "text": "Name "}, {"type": "text", "text": "a tree."}]}
    assert Fields({"prompt": [parts]}).conversation("prompt") == (ASK,)
    call = {"from": "function_call", "value": '{"name": "forecast", "arguments": {"city": "Oslo"}}'}
    assert Fields({"conversations": [call]}).conversation("conversations") == (CALL,)
