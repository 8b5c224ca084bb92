"""Chat templates: rendering a conversation, and what a template writes or leaves out."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_ray.types import Message, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>\s]{1,40}\uff5c>|<(?:start|end)_of_turn>")
"""The spelling of a special token: those of most models, DeepSeek's and Gemma's."""
FOREIGN_SPECIAL_TOKEN = re.compile(rf"{SPECIAL_TOKEN.pattern}|<s>(?=\s*\[INST\])|</s>(?=\s*\Z)")
"""The spelling of a special token that may be none of the tokenizer's; elsewhere in a text, <s> and </s> are HTML."""
_ROLES = "(?:system|developer|user|assistant|model|tool|human)"
RENDERED_TURN = re.compile(
    rf"<\|(?:im_start|start|turn)\|?>{_ROLES}\b"  # ChatML, gpt-oss, Gemma 4
    rf"|<start_of_turn>{_ROLES}\b"
    rf"|<\|(?:start_header_id|header_start|start_of_role)\|>\s*{_ROLES}\s*"  # Llama 3, Llama 4, Granite
    r"<\|(?:end_header_id|header_end|end_of_role)\|>"
    r"|<\|START_OF_TURN_TOKEN\|><\|(?:SYSTEM|USER|CHATBOT)_TOKEN\|>"
    r"|<(?P<bar>[|\uff5c])(?i:user|system|im_user|user_start)(?P=bar)>.*?"  # Phi, GLM, DeepSeek, Kimi
    r"<(?P=bar)(?i:assistant|end|im_middle|user_end|eot)(?P=bar)>"
    r"|\[INST\].*?\[/INST\]",
    re.DOTALL,
)
"""The start of a turn in rendered text: the marker that opens it, with the role or with the marker that closes it."""
_MARKER = re.compile(rf"{SPECIAL_TOKEN.pattern}|<\|turn>|\[INST\]")


class ChatTemplateError(ValueError):
    """A chat template rejects a conversation."""


def render(
    messages: Messages,
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    answer_follows: bool = False,
) -> str:
    """The text of a conversation.

    Args:
        messages: the conversation.
        tokenizer: has the chat template.
        tools: JSON schemas of the functions that the model may call.
        answer_follows: end where the model continues: after the generation prompt, or in the last turn if it is an
            assistant turn.

    Raises:
        ChatTemplateError: the chat template rejects the conversation.
        ValueError: the tokenizer has no chat template, or the template is not valid.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    if tokenizer.chat_template is None:
        raise ValueError(
            "model.chat_template: the data holds messages and the model's tokenizer has no chat template; "
            "give the path of a Jinja template"
        )
    continues = answer_follows and messages[-1]["role"] == "assistant"
    problem: Exception = ValueError()
    for conversation in _spellings(messages, tokenizer):
        try:
            text: Any = tokenizer.apply_chat_template(
                conversation,
                tools=list(tools) or None,  # pyrefly: ignore[bad-argument-type]
                tokenize=False,
                add_generation_prompt=answer_follows and not continues,
                continue_final_message=continues,
                return_dict=False,
            )
            return text
        except TemplateSyntaxError as error:
            raise ValueError(f"model.chat_template: line {error.lineno} of the template: {error.message}") from None
        # Templates raise TypeErrors of their own, such as the sum of a text and a null content.
        except (TemplateError, TypeError, ValueError) as error:
            problem = error
    raise ChatTemplateError(f"the chat template raised: {problem}") from None


def _spellings(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[dict[str, Any]]]:
    """The conversation as most templates take it, then as it is written.

    Most templates print a null content as text, unless they test for it, and encode the arguments of a call, which are
    then not to be JSON text already.
    """
    plain = [dict(message) for message in messages]
    if any("tool_calls" in message or message["content"] is None for message in plain):
        takes_null = re.search(r"is (not )?none", str(tokenizer.chat_template), re.IGNORECASE)
        yield [
            message
            | ({} if takes_null or message["content"] is not None else {"content": ""})
            | ({"tool_calls": _with_parsed_arguments(message["tool_calls"])} if message.get("tool_calls") else {})
            for message in plain
        ]
    yield plain


def _with_parsed_arguments(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_parsed_arguments(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _parsed(item) if key == "arguments" else _with_parsed_arguments(item) for key, item in value.items()}


def _parsed(arguments: Any) -> Any:
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def unrendered_texts(
    text: str,
    messages: Messages,
    names: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Mapping[str, Any]] = (),
    **how: Any,
) -> list[str]:
    """Names of the parts of a conversation that its rendered ``text`` lacks.

    A content is looked for in the text, white space and the tags of reasoning aside. The other parts are replaced by
    markers, all at once; a part whose marker is not rendered counts as rendered if the text changes without it.
    ``how`` has the arguments of ``render``.
    """

    def is_same(*conversation: Any) -> bool:
        try:
            return render(conversation[0], tokenizer, conversation[1], **how) == text
        except ValueError:
            return False

    squeezed = "".join(text.split())
    lost = [
        f"{name}.content"
        for message, name in zip(messages, names, strict=True)
        for piece in re.split(r"</?think>", message["content"] or "")
        if "".join(piece.split()) not in squeezed
    ]
    parts = [(i, key) for i, message in enumerate(messages) for key in _MARKED_KEYS if key in message]
    if parts:
        try:
            marked = render(tuple(_marked(message, i) for i, message in enumerate(messages)), tokenizer, tools, **how)
        except ValueError:
            marked = ""
        parts = [
            (i, key)
            for i, key in parts
            if marked.count(_marker(i, key)) < (len(messages[i][key]) if key == "tool_calls" else 1)
        ]
    if parts and not is_same(_without(messages, parts), tools):
        parts = [part for part in parts if is_same(_without(messages, [part]), tools)]
    lost += [f"{names[i]}.{key}" for i, key in parts]
    return [*dict.fromkeys(lost), *(["tools"] if tools and is_same(messages, ()) else [])]


_MARKED_KEYS = ("reasoning_content", "thinking", "name", "tool_calls")


def _marker(i: int, key: str) -> str:
    return f"[marker {i} {key}]"


def _marked(message: Message, i: int) -> Message:
    """The message with markers for its parts other than the content; of a call, for its name."""
    marked = {key: _marker(i, key) if key in _MARKED_KEYS else value for key, value in message.items()}
    if "tool_calls" in message:
        name = {"name": _marker(i, "tool_calls")}
        marked["tool_calls"] = [
            call | ({"function": call["function"] | name} if isinstance(call.get("function"), dict) else name)
            for call in message["tool_calls"]
        ]
    return marked


def _without(messages: Messages, parts: Sequence[tuple[int, str]]) -> Messages:
    return tuple(
        {key: value for key, value in message.items() if (i, key) not in parts} for i, message in enumerate(messages)
    )


def probe_texts(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """A small conversation as the chat template renders it, whole and up to its answer; empty if it renders neither."""
    probe: Messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    if tokenizer.chat_template is None:
        return "", ""
    try:
        return render(probe, tokenizer), render(probe[:1], tokenizer, answer_follows=True)
    except ValueError:  # a template may demand other conversations
        return "", ""


def turn_markers(text: str) -> list[str]:
    """The markers of the first turn that a chat template rendered; empty for other text."""
    turn = RENDERED_TURN.search(text)
    return _MARKER.findall(turn[0]) if turn else []


def validate_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise a ValueError if the chat template writes a special token that the tokenizer splits.

    For a template of the user's choice. Some models are trained with such text in their own template.
    """
    for marker in dict.fromkeys(SPECIAL_TOKEN.findall("".join(probe_texts(tokenizer)))):
        count = len(tokenizer(marker, add_special_tokens=False)["input_ids"])
        if count > 1:
            raise ValueError(
                f"model.chat_template: the template writes {marker}, which the tokenizer of model.path splits into "
                f"{count} tokens; use a template with special tokens of the tokenizer, or add {marker} to the "
                "tokenizer and the model"
            )
