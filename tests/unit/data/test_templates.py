"""Chat templates, special tokens and limits: the record reaches the model as written, or is named."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config.schema import DataConfig
from dpo_ray.data.records import PairRecord, Problem, PromptRecord
from dpo_ray.data.template import turn_markers, validate_template
from dpo_ray.data.tokenize import RecordTokenizer, TokenizedPair, TokenizedPrompt
from dpo_ray.data.tokenizer import ModelLimits
from dpo_ray.types import Messages

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "Name a tree."}
TOOLS = ({"type": "function", "function": {"name": "forecast", "description": "Weather of a city"}},)
CALL = {
    "role": "assistant", "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "forecast", "arguments": {"city": "Oslo"}}}],
}  # fmt: skip
RAIN = {"role": "tool", "content": "rain all day"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def llama(trained_tokenizer: Any) -> Any:
    """A tokenizer whose end of turn is not its end of sequence, and that adds a BOS to text, as Llama 3's."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(trained_tokenizer.backend_tokenizer.to_str())
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens(names)
    bos = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[(names[0], bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[1])
    tokenizer.chat_template = LLAMA
    return tokenizer


def pair(tokenizer: Any, prompt: Any, chosen: Any, rejected: Any, limits: Any = None, **record: Any) -> Any:
    data = DataConfig(**record.pop("data", {}))
    return RecordTokenizer(tokenizer, data, limits).pair(PairRecord(prompt, chosen, rejected, "f", 1, **record))


def answer(text: str, **keys: Any) -> Messages:
    return ({"role": "assistant", "content": text, **keys},)


def reasons(result: TokenizedPair) -> list[str]:
    return [reason for reason, _ in result.notes]


# ------------------------------------------------------------------------------------------------------ special tokens


def test_text_with_and_without_a_bos_has_one(llama: Any):
    turn = "<|start_header_id|>user<|end_header_id|>\n\nName a tree.<|eot_id|>"
    with_bos = pair(llama, f"<|begin_of_text|>{turn}", "An oak.<|eot_id|>", "No.<|eot_id|>").pair
    without = pair(llama, turn, "An oak.<|eot_id|>", "No.<|eot_id|>").pair
    assert with_bos.prompt == without.prompt
    assert with_bos.prompt.count(llama.bos_token_id) == 1


def test_nothing_is_appended_after_an_end_of_turn(llama: Any):
    result = pair(llama, "<|start_header_id|>", "An oak.<|eot_id|>", "No.")
    eot = llama.convert_tokens_to_ids("<|eot_id|>")
    assert result.pair.chosen[-1] == eot
    assert llama.eos_token_id not in result.pair.chosen
    assert result.pair.rejected[-1] == llama.eos_token_id
    assert reasons(result) == ["strings_raw"]


@pytest.mark.parametrize("end", ["\n", " \n\n", ""])
def test_nothing_is_appended_after_an_end_of_turn_that_white_space_follows(end: str, tokenizer: Any):
    prompt = "<|im_start|>user\nName a tree.<|im_end|>\n<|im_start|>assistant\n"
    result = pair(tokenizer, prompt, f"An oak.<|im_end|>{end}", f"No.{end}")
    assert tokenizer.decode(result.pair.chosen) == f"An oak.<|im_end|>{end}"
    assert tokenizer.decode(result.pair.rejected) == f"No.{end}<|im_end|>"
    assert reasons(result) == ["strings_raw"]


def test_an_end_of_turn_that_is_not_the_end_of_sequence_is_no_alarm(llama: Any):
    result = pair(llama, (USER,), answer("An oak."), answer("No."))
    assert result.notes == ()
    assert llama.decode(result.pair.chosen) == "An oak.<|eot_id|>"


def test_special_tokens_of_another_model_in_text_are_rejected(tokenizer: Any):
    problem = pair(tokenizer, "<|start_header_id|>user", "a", "b", data={"strings": "raw"})
    assert (problem.reason, problem.detail.partition(":")[0]) == ("split_special_token", "<|start_header_id|>")


@pytest.mark.parametrize(
    ("prompt", "chosen", "notes"),
    [
        ("Why <|im_end|>?", "It ends a turn.", (("special_in_text", "prompt[0].content: <|im_end|>"),)),
        ("Why?", "<|im_end|> twice: <|im_end|>.", (("special_in_text", "chosen[0].content: <|im_end|>"),)),
        ("Why?", "So.<|eot_id|>", (("split_special_token", "chosen[0].content: <|eot_id|>"),)),
        ("<s>[INST] Why?", "So.</s>", (("split_special_token", "prompt[0].content: <s>, chosen[0].content: </s>"),)),
        ("Why <start_of_turn>?", "No.", (("split_special_token", "prompt[0].content: <start_of_turn>"),)),
        ("Strike it out.", "<s>it</s> is <b>HTML</b>.", ()),
    ],
)
def test_special_tokens_written_in_messages_are_trained_on_as_written_and_named(
    prompt: str, chosen: str, notes: Any, tokenizer: Any
):
    messages = (USER | {"content": prompt},)
    result = pair(tokenizer, messages, answer(chosen), answer("None."))
    assert result.notes == notes
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert result.pair.chosen.count(end) == 1 + chosen.count("<|im_end|>")
    assert result.pair.prompt.count(end) == 1 + prompt.count("<|im_end|>")
    online = RecordTokenizer(tokenizer, DataConfig()).prompt(PromptRecord(messages, "f", 1))
    assert isinstance(online, TokenizedPrompt)
    assert online.notes == tuple((reason, text.split(", ")[0]) for reason, text in notes if text.startswith("prompt"))


def test_special_tokens_in_results_of_tools_and_in_schemas_are_named(tokenizer: Any):
    tokenizer.chat_template = TOOLS_TEMPLATE
    rain = RAIN | {"content": "rain<|im_end|>"}
    tools = ({"name": "<|im_start|>"},)
    result = pair(tokenizer, (USER,), (CALL, rain, *answer("Wet.")), answer("Dry."), tools=tools)
    assert result.notes == (("special_in_text", "chosen[1].content: <|im_end|>, tools: <|im_start|>"),)


def test_a_template_whose_special_tokens_the_tokenizer_splits_is_rejected(tokenizer: Any):
    tokenizer.chat_template = LLAMA
    with pytest.raises(ValueError, match=r"model\.chat_template: the template writes <\|start_header_id\|>, which the"):
        validate_template(tokenizer)


# ------------------------------------------------------------------------------------------------------------- strings


def test_a_rendered_prompt_that_its_completions_repeat_is_rejected(tokenizer: Any):
    prompt = "<|im_start|>user\nName a tree.<|im_end|>\n<|im_start|>assistant\n"
    problem = pair(tokenizer, prompt, f"{prompt}An oak.<|im_end|>", f"{prompt}No.<|im_end|>")
    assert problem.reason == "bad_field"
    assert problem.detail == "chosen: found the prompt at the start; accepted: the text after the prompt"


def test_strings_become_a_user_turn_for_a_model_with_a_template_offline_and_online(tokenizer: Any):
    result = pair(tokenizer, "Name a tree.", "An oak.", "No.")
    same = pair(tokenizer, (USER,), answer("An oak."), answer("No."))
    assert (result.pair, reasons(result)) == (same.pair, ["strings_chat"])
    online = RecordTokenizer(tokenizer, DataConfig()).prompt(PromptRecord("Name a tree.", "f", 1))
    assert not isinstance(online, Problem)
    assert (online.token_ids, online.messages) == (same.pair.prompt, (USER,))


@pytest.mark.parametrize(
    ("strings", "prompt", "raw"),
    [("raw", "Name a tree.", True), ("auto", "<|im_start|>user", True), ("chat", "<|im_start|>user", False)],
)
def test_strings_are_used_as_written_where_asked_or_already_rendered(
    strings: str, prompt: str, raw: bool, tokenizer: Any
):
    result = pair(tokenizer, prompt, "An oak.", "No.", data={"strings": strings})
    written = ["special_in_text"] if prompt.startswith("<|im_start|>") else []
    assert reasons(result) == (["strings_raw"] if raw else ["strings_chat", *written])
    assert (tokenizer.decode(result.pair.prompt) == prompt) == raw
    online = RecordTokenizer(tokenizer, DataConfig.model_validate({"strings": strings})).prompt(
        PromptRecord(prompt, "f", 1)
    )
    assert not isinstance(online, Problem)
    assert online.token_ids == result.pair.prompt


RENDERED = {
    "Llama 3": ("<|start_header_id|>user<|end_header_id|>\n\nName a tree.<|eot_id|>", "<|start_header_id|>"),
    "Llama 3.1, a tool": ("<|start_header_id|>ipython<|end_header_id|>\n\nrain<|eot_id|>", "<|start_header_id|>"),
    "Llama 4": ("<|header_start|>user<|header_end|>\n\nName a tree.<|eot|>", "<|header_start|>"),
    "Gemma 3": ("<bos><start_of_turn>user\nName a tree.<end_of_turn>\n<start_of_turn>model\n", "<start_of_turn>"),
    "Gemma 4": ("<|turn>user\nName a tree.<turn|>\n<|turn>model\n", "<|turn>"),
    "Mistral": ("<s>[INST] Name a tree. [/INST]", "[INST]"),
    "Phi 3": ("<|user|>\nName a tree.<|end|>\n<|assistant|>\n", "<|user|>"),
    "GLM 4": ("[gMASK]<sop><|user|>\nName a tree.<|assistant|>\n", "<|user|>"),
    "DeepSeek": ("<\uff5cUser\uff5c>Name a tree.<\uff5cAssistant\uff5c>", "<\uff5cUser\uff5c>"),
    "Cohere": ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Name a tree.<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>"),
    "Granite": ("<|start_of_role|>user<|end_of_role|>Name a tree.<|end_of_text|>", "<|start_of_role|>"),
    "gpt-oss": ("<|start|>user<|message|>Name a tree.<|end|><|start|>assistant", "<|start|>"),
    "Kimi": ("<|im_user|>user<|im_middle|>Name a tree.<|im_end|>", "<|im_user|>"),
}  # fmt: skip


@pytest.mark.parametrize("model", RENDERED)
def test_text_that_the_template_of_another_model_rendered_is_dropped_and_its_token_named(model: str, tokenizer: Any):
    text, marker = RENDERED[model]
    for prompt, chosen in ((text, "An oak."), ("Name a tree.", f"Name one.\n{text}")):
        problem = pair(tokenizer, prompt, chosen, "No.")
        assert (problem.reason, problem.detail) == (
            "split_special_token",
            f"{marker}: the tokenizer of model.path splits it into several tokens, in text that the template of "
            "another model rendered",
        )
    online = RecordTokenizer(tokenizer, DataConfig()).prompt(PromptRecord(text, "f", 1))
    assert isinstance(online, Problem)
    assert online.reason == "split_special_token"
    assert reasons(pair(tokenizer, text, "An oak.", "No.", data={"strings": "chat"}))[0] == "strings_chat"


@pytest.mark.parametrize("marker", ["<|user|>", "[INST]", "<|im_start|>", "<|start_header_id|> "])
def test_markers_are_found_in_linear_time(marker: str):
    started = time.monotonic()
    assert turn_markers(marker * 30_000) == []
    assert time.monotonic() - started < 1


def test_chatml_text_is_dropped_for_a_model_with_another_template(llama: Any):
    backend = llama.backend_tokenizer.to_str().replace("<|im_start|>", "<|other|>")
    llama._tokenizer = type(llama.backend_tokenizer).from_str(backend)
    problem = pair(llama, "<|im_start|>user\nName a tree.<|im_end|>\n<|im_start|>assistant\n", "An oak.", "No.")
    assert (problem.reason, problem.detail.partition(":")[0]) == ("split_special_token", "<|im_start|>")


@pytest.mark.parametrize(
    "prompt",
    [
        "Is <s>struck</s> <b>HTML</b>?",
        "What do <|start_header_id|> and <|end_header_id|> mean?",
        "Does [INST] need a space before [/INST]?",
        "What are <|user|> and <|assistant|> for?",
    ],
)
def test_a_question_about_the_markers_of_another_model_goes_into_the_template(prompt: str, tokenizer: Any):
    result = pair(tokenizer, prompt, "So.", "No.")
    assert isinstance(result, TokenizedPair), result
    assert reasons(result)[0] == "strings_chat"


def test_text_that_the_models_own_template_of_plain_tags_rendered_is_used_as_written(tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    result = pair(tokenizer, "[INST] Name a tree. [/INST]", " An oak.", " No.")
    assert reasons(result) == ["strings_raw"]
    assert result.pair == pair(tokenizer, (USER,), answer("An oak."), answer("No.")).pair


def test_a_system_prompt_beside_raw_text_is_rejected_and_in_the_template_rendered(tokenizer: Any):
    system = ({"role": "system", "content": "Be brief."},)
    problem = pair(tokenizer, "Name a tree.", "a", "b", system=system, data={"strings": "raw"})
    assert problem.detail.startswith("system: beside a prompt used as written")
    result = pair(tokenizer, "Name a tree.", "a", "b", system=system)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in tokenizer.decode(result.pair.prompt)


def test_a_system_prompt_beside_text_for_a_model_without_a_template_needs_one(tokenizer: Any):
    tokenizer.chat_template = None
    problem = pair(tokenizer, "Name a tree.", "An oak.", "No.", system=({"role": "system", "content": "Be brief."},))
    assert problem.detail == "system: beside a prompt used as written; accepted with model.chat_template"


def test_a_transcript_becomes_its_turns(tokenizer: Any):
    result = pair(tokenizer, "\n\nHuman: Name a tree.\n\nAssistant:", " An oak.", " No.")
    assert result.pair == pair(tokenizer, (USER,), answer("An oak."), answer("No.")).pair


# ------------------------------------------------------------------------------------------------------- conversations


def test_a_begun_answer_is_continued_offline_and_online(tokenizer: Any):
    prompt = (USER, {"role": "assistant", "content": "The name is"})
    result = pair(tokenizer, prompt, answer(" oak."), answer(" unknown."))
    assert tokenizer.decode(result.pair.prompt + result.pair.chosen) == (
        "<|im_start|>user\nName a tree.<|im_end|>\n<|im_start|>assistant\nThe name is oak.<|im_end|>\n"
    )
    online = RecordTokenizer(tokenizer, DataConfig()).prompt(PromptRecord(prompt, "f", 1))
    assert not isinstance(online, Problem)
    assert tokenizer.decode(list(online.token_ids)).endswith("<|im_start|>assistant\nThe name is")
    assert online.messages == prompt


def test_a_begun_answer_is_continued_with_calls_and_after_its_reasoning(tokenizer: Any):
    tokenizer.chat_template = TOOLS_TEMPLATE
    begun = {"role": "assistant", "content": "", "reasoning_content": "It may rain."}
    looking = CALL | {"content": "Let me look."}
    result = pair(tokenizer, (USER, begun), (looking, RAIN, *answer("Wet.")), answer("Dry."), tools=TOOLS)
    assert tokenizer.decode(result.pair.prompt).endswith("<|im_start|>assistant\n<think>It may rain.</think>")
    scored = tokenizer.decode([token for token in result.pair.chosen if token >= 0])
    assert scored.startswith("Let me look.<tool_call>")
    assert result.notes == ()


@pytest.mark.parametrize("content", [None, "Let me look."])
def test_a_prompt_that_ends_with_calls_of_tools_is_dropped_offline_and_online(content: str | None, tokenizer: Any):
    tokenizer.chat_template = TOOLS_TEMPLATE
    prompt = (USER, CALL | {"content": content})
    problem = pair(tokenizer, prompt, answer("Wet."), answer("Dry."))
    assert (problem.reason, problem.detail.partition(" in ")[0]) == (
        "bad_field",
        "prompt[1].tool_calls: found a list of 1",
    )
    assert RecordTokenizer(tokenizer, DataConfig()).prompt(PromptRecord(prompt, "f", 1)) == problem


@pytest.mark.parametrize(
    ("chosen", "detail"),
    [
        ((RAIN, *answer("Wet.")), 'chosen[0].role: found "tool" in the turn that continues the prompt\'s last one; '),
        (answer("Oak.", reasoning_content="Trees."), 'chosen[0].reasoning_content: found "Trees." in the turn that'),
        (answer("Oak.", name="Ada"), 'chosen[0].name: found "Ada" in the turn that'),
    ],
)
def test_a_turn_that_cannot_continue_a_begun_answer_is_dropped_by_field(chosen: Messages, detail: str, tokenizer: Any):
    tokenizer.chat_template = TOOLS_TEMPLATE
    begun = {"role": "assistant", "content": "The name is", "reasoning_content": "Plants."}
    problem = pair(tokenizer, (USER, begun), chosen, answer("No."))
    assert problem.reason == "bad_field"
    assert problem.detail.startswith(detail)


@pytest.mark.parametrize(
    ("template", "prompt", "chosen"),
    [
        # Writes an empty thought before a begun answer, and none before one with calls.
        ("qwen3", (USER, *answer("Let me look.")), (CALL, RAIN, *answer("Wet."))),
        # Takes a thought that has begun as part of an answer, unless the end of the thought follows.
        ("qwen3", (USER, *answer("<think>\nRain,")), answer(" say.\n</think>\n\nWet.")),
        # Leaves out the thoughts before calls, and writes otherwise where no answer follows.
        ("gptoss", (USER, CALL | {"thinking": "Rain?"}, RAIN), answer("Wet.")),
    ],
)
def test_a_pair_whose_completions_would_start_within_the_prompt_is_dropped(
    template: str, prompt: Messages, chosen: Messages, tokenizer: Any
):
    model = with_tokens(tokenizer, "<|start|>", "<|message|>", "<|channel|>", "<|call|>", "<|end|>", "<|return|>")
    model.chat_template = trl_template(template)
    problem = pair(model, prompt, chosen, answer("Dry."))
    assert problem.reason == "prompt_rewritten"
    assert f"before the end of prompt[{len(prompt) - 1}]" in problem.detail


MISTRAL = (  # writes the system prompt into the last turn, if it is the user's
    "<s>{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("prompt", [(SYSTEM, USER), (SYSTEM, USER, *answer("An elm."), USER)])
def test_a_pair_whose_last_turn_is_rendered_otherwise_before_an_answer_is_dropped_with_the_lost_text(
    prompt: Messages, tokenizer: Any
):
    tokenizer.chat_template = MISTRAL
    problem = pair(tokenizer, prompt, answer("An oak."), answer("No."))
    assert problem.reason == "prompt_rewritten"
    assert f"before the end of prompt[{len(prompt) - 1}]" in problem.detail
    assert problem.detail.endswith("when they follow; the chat template leaves out prompt[0].content")
    without = pair(tokenizer, prompt[1:], answer("An oak."), answer("No.")).pair
    assert tokenizer.decode(without.prompt).endswith("[INST] Name a tree.[/INST]")
    assert tokenizer.decode(without.chosen) == " An oak.<|im_end|>"


def test_the_only_turn_of_a_prompt_carries_no_loss(tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '/think ' if loop.last and m.role == 'user' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    problem = pair(tokenizer, (USER,), answer("An oak."), answer("No."))
    assert problem.reason == "prompt_rewritten"


def test_an_answer_that_began_within_a_word_of_one_token_is_continued(tokenizer: Any):
    assert len(tokenizer(" colo")["input_ids"]) == 2
    assert len(tokenizer(" color")["input_ids"]) == 1
    result = pair(tokenizer, (USER, *answer("It is the colo")), answer("r."), answer("nel."))
    assert isinstance(result, TokenizedPair), result
    assert reasons(result) == ["boundary_moved"]
    assert tokenizer.decode(result.pair.prompt).endswith("<|im_start|>assistant\nIt is the")
    assert tokenizer.decode(result.pair.chosen) == " color.<|im_end|>\n"


def count_renders(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of messages of each conversation that the tokenizer renders."""
    rendered: list[int] = []
    render = type(model).apply_chat_template

    def count(self: Any, conversation: Any, **how: Any) -> Any:
        rendered.append(len(conversation))
        return render(self, conversation, **how)

    monkeypatch.setattr(type(model), "apply_chat_template", count)
    return rendered


@pytest.mark.parametrize("name", ["chatml", "qwen3", "gemma3", "llama3", "qwen3_6", "glm4moe", "smolvlm"])
def test_an_ordinary_pair_is_rendered_five_times(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    model = with_tokens(tokenizer, "<end_of_utterance>")
    model.bos_token = "<|im_start|>"
    model.chat_template = tokenizer.chat_template if name == "chatml" else trl_template(name)
    records = RecordTokenizer(model, DataConfig())
    first = PairRecord((USER,), answer("An oak."), answer("No."), "f", 1)
    assert isinstance(records.pair(first), TokenizedPair)
    rendered = count_renders(model, monkeypatch)
    assert isinstance(records.pair(first), TokenizedPair)
    assert rendered == [1, 2, 2, 2, 2]  # the prompt; each conversation, and with markers for its texts


def test_tools_tool_calls_and_reasoning_match_apply_chat_template_token_for_token(tokenizer: Any):
    tokenizer.chat_template = TOOLS_TEMPLATE
    chosen = (CALL, RAIN, *answer("Take a coat.", reasoning_content="It rains."))
    result = pair(tokenizer, (USER,), chosen, answer("Sunny."), tools=TOOLS)
    assert result.notes == ()
    for side, completion in (("chosen", chosen), ("rejected", answer("Sunny."))):
        ids = [token if token >= 0 else ~token for token in (*result.pair.prompt, *getattr(result.pair, side))]
        assert ids == tokenizer.apply_chat_template(
            [USER, *completion], tools=list(TOOLS), tokenize=True, return_dict=False
        )


def test_only_assistant_turns_of_a_trajectory_carry_loss(tokenizer: Any):
    tokenizer.chat_template = TOOLS_TEMPLATE
    result = pair(tokenizer, (USER,), (CALL, RAIN, *answer("Take a coat.")), answer("Sunny."), tools=TOOLS)
    scored = tokenizer.decode([token for token in result.pair.chosen if token >= 0])
    assert scored == (
        '<tool_call>{"name": "forecast", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>\nTake a coat.<|im_end|>\n'
    )
    silent = tokenizer.decode([~token for token in result.pair.chosen if token < 0])
    assert silent == "<|im_start|>tool\nrain all day<|im_end|>\n<|im_start|>assistant\n"
    assert all(token >= 0 for token in result.pair.rejected)


@pytest.mark.parametrize(
    ("chosen", "fields"),
    [
        (answer("Oak.", reasoning_content="Trees."), "chosen[0].reasoning_content"),
        (answer("<think>Trees.</think>Oak."), "chosen[0].content"),
        (answer("Oak.", name="Ada"), "chosen[0].name"),
        ((CALL, RAIN, *answer("Oak.")), "chosen[0].tool_calls"),
    ],
)
def test_text_that_the_template_leaves_out_is_reported(chosen: Messages, fields: str, tokenizer: Any):
    drops_reasoning = tokenizer.chat_template.replace(
        "message['content'] ", "(message['content'] or '').split('</think>')[-1] "
    )
    tokenizer.chat_template = drops_reasoning
    result = pair(tokenizer, (USER,), chosen, answer("No."))
    assert result.notes == (("text_not_rendered", fields),)


def test_tools_that_the_template_leaves_out_are_reported(tokenizer: Any):
    result = pair(tokenizer, (USER,), answer("Oak."), answer("No."), tools=TOOLS)
    assert result.notes == (("text_not_rendered", "tools"),)


def test_completions_that_differ_in_text_that_the_template_leaves_out_are_dropped_with_its_name(tokenizer: Any):
    problem = pair(tokenizer, (USER,), answer("Oak.", reasoning_content="Trees."), answer("Oak."))
    assert problem.reason == "identical"
    assert problem.detail.endswith("the chat template leaves out chosen[0].reasoning_content")


def test_the_reason_of_equal_completions_names_no_text_that_the_template_leaves_out_of_the_prompt(tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    )
    problem = pair(tokenizer, (SYSTEM, USER), answer("Oak."), answer("Oak. "))
    assert (problem.reason, problem.detail) == ("identical", "chosen and rejected have the same tokens with loss")


def test_text_that_the_template_leaves_out_is_reported_though_it_occurs_elsewhere(tokenizer: Any):
    tokenizer.chat_template = tokenizer.chat_template.replace("['content'] ", "['content'].split('</think>')[-1] ")
    result = pair(tokenizer, (USER,), answer("<think>42</think>The answer is 42."), answer("No."))
    assert result.notes == (("text_not_rendered", "chosen[0].content"),)
    tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}"
    result = pair(tokenizer, ({"role": "system", "content": "a tree"}, USER), answer("Oak."), answer("No."))
    assert result.notes == (("text_not_rendered", "prompt[0].content"),)


@pytest.mark.parametrize(
    "written",
    ["{{ '<think></think>' if m.reasoning_content }}", "{{ '' if m.reasoning_content else raise_exception('none') }}"],
)
def test_text_that_the_template_leaves_out_is_reported_though_the_template_tests_for_it(written: str, tokenizer: Any):
    reasoning = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    tokenizer.chat_template = TOOLS_TEMPLATE.replace(
        reasoning, f"{{% if m.role == 'assistant' and not loop.last %}}{written}{{% endif %}}"
    )
    prompt = (USER, *answer("An elm.", reasoning_content="Trees."), USER)
    result = pair(tokenizer, prompt, answer("An oak."), answer("No."))
    assert result.notes == (("text_not_rendered", "prompt[1].reasoning_content"),)


def test_few_renders_tell_the_texts_that_the_template_leaves_out_of_a_long_trajectory(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    tokenizer.chat_template = TOOLS_TEMPLATE.replace("{{ m.reasoning_content }}", "{{ m.reasoning_content[:2] }}")
    calls = [
        (CALL | {"tool_calls": [{"id": f"call{i:05d}", **call}]}, RAIN | {"tool_call_id": f"call{i:05d}"})
        for i in range(30)
        for call in CALL["tool_calls"]
    ]
    trajectory = (*(turn for turns in calls for turn in turns), *answer("Wet.", reasoning_content="It rains."))
    rendered = count_renders(tokenizer, monkeypatch)
    result = pair(tokenizer, (USER,), trajectory, answer("Dry."), data={"max_completion_tokens": None})
    ((reason, fields),) = result.notes
    assert (reason, len(fields.split(", "))) == ("text_not_rendered", 60)
    assert "reasoning_content" not in fields
    assert rendered.count(1 + len(trajectory)) < 30  # texts of which 60 are lost


WHERE = {"name": "forecast", "arguments": {"city": "Oslo", "days": 3}}


@pytest.mark.parametrize("as_text", [None, '{"city": "Oslo", "days": 3}', '{"city":"Oslo","days":3}'])
@pytest.mark.parametrize(
    ("written", "fields"),
    [
        (
            "{{ call.function.name }}{{ call.function.arguments if call.function.arguments is string "
            "else call.function.arguments | tojson }}",
            "{0}.tool_calls[0].id, {1}.tool_call_id",
        ),
        ("{{ call.function | tojson }}", "{0}.tool_calls[0].id, {1}.tool_call_id"),
        ("{{ call.function.name }}", "{0}.tool_calls[0].id, {0}.tool_calls[0].function.arguments, {1}.tool_call_id"),
        (
            "{{ call.id }}{{ call.function.name }}{{ (call.function.arguments | string)[:6] }}",
            "{0}.tool_calls[0].function.arguments",
        ),
        ("{{ call | tojson }}{{ m.tool_call_id }}", ""),
    ],
)
def test_ids_and_arguments_that_the_template_leaves_out_are_reported(
    written: str, fields: str, as_text: str | None, tokenizer: Any
):
    tokenizer.chat_template = TOOLS_TEMPLATE.replace("{{ call.function | tojson }}", written)
    arguments = as_text or WHERE["arguments"]
    call = {"id": "abc123def", "type": "function", "function": WHERE | {"arguments": arguments}}
    rain = RAIN | {"tool_call_id": "abc123def"}
    result = pair(tokenizer, (USER,), (CALL | {"tool_calls": [call]}, rain, *answer("Wet.")), answer("Dry."))
    named = fields.format("chosen[0]", "chosen[1]")
    assert result.notes == ((("text_not_rendered", named),) if named else ())


def test_texts_of_tools_that_the_template_leaves_out_are_reported(tokenizer: Any):
    city = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string", "description": "Town"}}}
    tools = ({"type": "function", "function": {"name": "forecast", "description": "Weather", "parameters": city}},)
    tokenizer.chat_template = (
        "{% for t in tools %}{{ t.function.name }}{% endfor %}" + TOOLS_TEMPLATE.partition("{% endif %}")[2]
    )
    result = pair(tokenizer, (USER,), answer("Oak."), answer("No."), tools=tools)
    assert result.notes == (("text_not_rendered", "tools[0].function.description, tools[0].function.parameters"),)


def test_results_of_tools_that_the_template_encodes_are_no_loss(tokenizer: Any):
    tokenizer.chat_template = TOOLS_TEMPLATE.replace(
        "{{ m['content'] or '' }}", "{{ m['content'] | tojson if m['role'] == 'tool' else m['content'] or '' }}"
    )
    rain = RAIN | {"content": 'A "wet"\nday.'}
    assert pair(tokenizer, (USER,), (CALL, rain, *answer("Wet.")), answer("Dry.")).notes == ()


def test_white_space_that_the_template_trims_is_no_loss(llama: Any):
    assert pair(llama, (USER,), answer("  Oak. \n"), answer("No.")).notes == ()


# -------------------------------------------------------------------------------------------------------------- limits


def test_records_longer_than_the_models_positions_are_dropped_with_the_limit(tokenizer: Any):
    kept = pair(tokenizer, (USER,), answer("Oak."), answer("No."))
    length = len(kept.pair.prompt) + max(len(kept.pair.chosen), len(kept.pair.rejected))
    assert pair(tokenizer, (USER,), answer("Oak."), answer("No."), ModelLimits(positions=length)) == kept
    problem = pair(tokenizer, (USER,), answer("Oak."), answer("No."), ModelLimits(positions=length - 1))
    assert problem.reason == "too_long_for_model"
    assert problem.detail == (
        f"{length} tokens; the model of model.path takes {length - 1} (max_position_embeddings or max_seq_len)"
    )


def test_tokens_without_an_embedding_are_dropped_with_token_and_limit(llama: Any):
    eot = llama.convert_tokens_to_ids("<|eot_id|>")
    problem = pair(llama, (USER,), answer("Oak."), answer("No."), ModelLimits(vocabulary=eot))
    assert problem.reason == "unknown_token"
    assert problem.detail == f"prompt: token <|eot_id|> has id {eot}; the model of model.path has {eot} embeddings"


# ------------------------------------------------------------------------------------------------ templates of models


def trl_template(name: str) -> str:
    """A chat template as its model has it."""
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def with_tokens(tokenizer: Any, *names: str) -> Any:
    """A copy of the tokenizer that knows these special tokens."""
    copied = copy.deepcopy(tokenizer)
    copied.add_special_tokens({"additional_special_tokens": list(names)})
    return copied


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_6", "llama3_1", "glm4moe", "lfm2_v2"]
)
def test_every_assistant_turn_of_a_trajectory_carries_loss_and_no_other_text(name: str, tokenizer: Any):
    names = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|assistant|>", "<|user|>", "<|observation|>"]
    model = with_tokens(tokenizer, *names)
    model.chat_template = trl_template(name)
    call = {"type": "function", "function": {"name": "forecast", "arguments": {"city": "Bergen"}}}
    calls = CALL, CALL | {"tool_calls": [call]}
    chosen = (calls[0], RAIN, calls[1], RAIN | {"content": "clear sky"}, *answer("Take a coat."))
    result = pair(model, (USER,), chosen, answer("Sunny."), tools=TOOLS)
    scored = model.decode([token for token in result.pair.chosen if token >= 0])
    for text in ("Oslo", "Bergen", "Take a coat."):
        assert text in scored or any(reason == "text_not_rendered" for reason, _ in result.notes)
    assert "rain all day" not in scored
    assert "clear sky" not in scored
    assert "None" not in scored


@pytest.mark.parametrize(
    "name", ["glm4moe", "lfm2", "lfm2_v2", "llama3", "qwen2_5_vl", "qwen3", "qwen3_instruct_2507", "qwen3_vl"]
)
def test_the_loss_of_a_trajectory_is_on_the_tokens_that_transformers_marks(name: str, tokenizer: Any):
    names = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|assistant|>", "<|user|>", "<|observation|>"]
    model = with_tokens(tokenizer, *names)
    model.chat_template = trl_template(f"{name}_training")  # the model's, with {% generation %} around assistant turns
    first, second = (CALL | {"content": text} for text in ("Let me look.", "And once more."))
    chosen = (first, RAIN, second, RAIN | {"content": "clear sky"}, *answer("Take a coat."))
    pairs = pair(model, (USER,), chosen, answer("Sunny."), tools=TOOLS).pair
    marked = model.apply_chat_template(
        [USER, *chosen], tools=list(TOOLS), return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [*(~token for token in pairs.prompt), *pairs.chosen]
    assert [token if token >= 0 else ~token for token in ids] == marked["input_ids"]
    assert [int(token >= 0) for token in ids] == marked["assistant_masks"]


def test_two_assistant_turns_in_a_row_are_each_trained_on_once(tokenizer: Any):
    model = with_tokens(tokenizer)
    model.chat_template = trl_template("qwen3")  # writes <think> into the last turn only
    chosen = (*answer("Look."), CALL, RAIN, *answer("Wet."))
    result = pair(model, (USER,), chosen, answer("Sunny."), tools=TOOLS).pair
    ids = [token if token >= 0 else ~token for token in (*result.prompt, *result.chosen)]
    assert ids == model.apply_chat_template([USER, *chosen], tools=list(TOOLS), return_dict=False)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1"])
def test_the_work_for_a_trajectory_is_linear_in_its_turns(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    model = with_tokens(tokenizer, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    model.chat_template = trl_template(name)
    rendered = count_renders(model, monkeypatch)
    messages = []
    for calls in (10, 20):
        rendered.clear()
        trajectory = (*(CALL, RAIN | {"name": "forecast"}) * calls, *answer("Wet."))
        pair(model, (USER,), trajectory, answer("Dry."), tools=TOOLS, data={"max_completion_tokens": None})
        messages.append(sum(rendered))
    assert messages[1] < 2.1 * messages[0]
    assert messages[1] < 20 * 20  # some twenty messages rendered per call


def test_arguments_that_are_json_text_are_encoded_once(tokenizer: Any):
    model = with_tokens(tokenizer)
    model.chat_template = trl_template("qwen2_5")
    call = {"type": "function", "function": {"name": "forecast", "arguments": '{"city": "Oslo"}'}}
    result = pair(model, (USER,), (CALL | {"tool_calls": [call]}, RAIN, *answer("Wet.")), answer("Dry."), tools=TOOLS)
    assert '"arguments": {"city": "Oslo"}' in model.decode([t for t in result.pair.chosen if t >= 0])


@pytest.mark.parametrize("name", ["qwen3", "qwen3_vl", "deepseekv3", "glm4moe", "printed"])
def test_arguments_that_are_json_text_keep_their_spelling_where_the_template_takes_text(name: str, tokenizer: Any):
    model = with_tokens(tokenizer)
    printed = TOOLS_TEMPLATE.replace("call.function | tojson", "call.function.arguments")
    model.chat_template = printed if name == "printed" else trl_template(name)
    for arguments in ('{"days":3,  "city": "Oslo"}', '{"city": "T\\u00f8nsberg"}', "{}"):
        call = {"type": "function", "function": {"name": "forecast", "arguments": arguments}}
        chosen = ({"role": "assistant", "content": "", "tool_calls": [call]}, RAIN, *answer("Wet."))
        ids = pair(model, (USER,), chosen, answer("Dry."), tools=TOOLS).pair
        expected: list[Any] = [USER, *chosen]
        if name == "glm4moe":  # takes no text
            parsed = call | {"function": call["function"] | {"arguments": json.loads(arguments)}}  # type: ignore[operator]
            expected[1] = expected[1] | {"tool_calls": [parsed]}
        assert [token if token >= 0 else ~token for token in (*ids.prompt, *ids.chosen)] == (
            model.apply_chat_template(expected, tools=list(TOOLS), return_dict=False)
        )


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_arguments_reach_a_template_that_takes_nothing_but_json_text(name: str, tokenizer: Any):
    model = with_tokens(tokenizer)
    model.chat_template = trl_template(name)
    result = pair(model, (USER,), (CALL, RAIN, *answer("Wet.")), answer("Dry."))
    assert '```json\n{"city": "Oslo"}\n```' in model.decode([t for t in result.pair.chosen if t >= 0])


def test_calls_without_content_reach_a_template_that_reads_the_content(tokenizer: Any):
    model = with_tokens(tokenizer, "<|start|>", "<|message|>", "<|channel|>", "<|call|>", "<|end|>", "<|return|>")
    model.chat_template = trl_template("gptoss")  # tests another value for null
    result = pair(model, (USER,), (CALL, RAIN, *answer("Wet.")), answer("Dry."))
    assert result.notes == ()
    assert model.decode([t for t in result.pair.chosen if t >= 0]).startswith(
        ' to=functions.forecast<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    )


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_contents_reach_a_template_that_takes_parts_only(name: str, tokenizer: Any):
    model = with_tokens(tokenizer, "<end_of_utterance>", "</s>")
    model.chat_template = trl_template(name)
    begun = answer("The name")
    for prompt in ((USER,), (USER, *begun)):
        result = pair(model, prompt, answer(" An oak."), answer(" A herring."))
        online = RecordTokenizer(model, DataConfig()).prompt(PromptRecord(prompt, "f", 1))
        assert isinstance(online, TokenizedPrompt)
        assert online.token_ids == result.pair.prompt
        assert (result.notes, online.notes) == ((), ())
        assert "Name a tree." in model.decode(result.pair.prompt)
        assert "An oak." in model.decode(result.pair.chosen)
        assert ("The name" in model.decode(result.pair.prompt)) == (prompt[-1] in begun)


def test_half_of_a_surrogate_pair_in_arguments_of_json_text_is_rejected_where_the_template_parses_them(tokenizer: Any):
    model = with_tokens(tokenizer)
    call = {"type": "function", "function": {"name": "forecast", "arguments": '{"city": "\\ud83d"}'}}
    chosen = (CALL | {"tool_calls": [call]}, RAIN, *answer("Wet."))
    for name, reason in (("qwen3", None), ("qwen3_6", "template_refused")):
        model.chat_template = trl_template(name)
        assert getattr(pair(model, (USER,), chosen, answer("Dry.")), "reason", None) == reason


def test_a_template_with_tags_of_plain_text_is_accepted(tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    assert pair(tokenizer, (USER,), answer("Oak."), answer("No.")).notes == ()


def test_text_that_only_looks_like_a_special_token_goes_into_the_template(tokenizer: Any):
    model = with_tokens(tokenizer, "<filename>")
    model.chat_template = tokenizer.chat_template
    result = pair(model, "How do I use git add <filename>?", "So.", "No.")
    assert result.notes == (("strings_chat", ""), ("special_in_text", "prompt[0].content: <filename>"))
    assert reasons(pair(model, "Compute <|x|> for me", "So.", "No.")) == ["strings_chat", "split_special_token"]
