"""Chat templates: rendering a conversation, and what a template writes or leaves out."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_ray.types import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>")
"""The spelling of a special token."""


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
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
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
        raise ChatTemplateError(f"the chat template raised: {error}") from None


def unrendered_texts(text: str, messages: Messages, names: Sequence[str], tools: Sequence[Any] = ()) -> Iterator[str]:
    """Names of the texts of a conversation that its rendered ``text`` lacks, white space at their ends aside."""
    for message, name in zip(messages, names, strict=True):
        for key in ("content", "reasoning_content", "thinking", "name"):
            if message.get(key) and not _occurs(message[key], text):
                yield f"{name}.{key}"
        if not all(_occurs(leaf, text) for leaf in _leaves(message.get("tool_calls") or [])):
            yield f"{name}.tool_calls"
    if not all(_occurs(leaf, text) for leaf in _leaves(tools)):
        yield "tools"


def _occurs(part: str, text: str) -> bool:
    part = part.strip()
    return part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (True, False))


def _leaves(value: Any) -> Iterator[str]:
    """Texts that tools and tool calls are made of: names, descriptions and arguments."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            yield value
        else:
            yield from _leaves(parsed) if isinstance(parsed, dict | list) else [value]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("type", "id"):
                yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)


def validate_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise a ValueError if the chat template writes a special token that the tokenizer splits."""
    if tokenizer.chat_template is None:
        return
    probe: Messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    try:
        text = render(probe, tokenizer) + render(probe[:1], tokenizer, answer_follows=True)
    except ValueError:  # a template may demand other conversations
        return
    for marker in dict.fromkeys(SPECIAL_TOKEN.findall(text)):
        count = len(tokenizer(marker, add_special_tokens=False)["input_ids"])
        if count > 1:
            raise ValueError(
                f"model.chat_template: the template writes {marker}, which the tokenizer of model.path splits into "
                f"{count} tokens; use a template with special tokens of the tokenizer, or add {marker} to the "
                "tokenizer and the model"
            )
