"""Chat templates: rendering a conversation, and what a template writes or leaves out."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from dpo_ray.types import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>\s]{1,40}\uff5c>|<(?:start|end)_of_turn>")
"""The spelling of a special token: those of most models, DeepSeek's and Gemma's."""
FOREIGN_SPECIAL_TOKEN = re.compile(rf"{SPECIAL_TOKEN.pattern}|<s>(?=\s*\[INST\])|</s>(?=\s*\Z)")
"""The spelling of a special token that may be none of the tokenizer's; elsewhere in a text, <s> and </s> are HTML."""
_ROLES = "(?:system|developer|user|assistant|model|tool|human)"
_START = r"(?:\A\s*|(?<=[\n>]))"
_RENDERED_TURNS = [
    (re.compile(opening), re.compile(closing))
    for opening, closing in (
        (rf"<(?:\|im_start\||\|start\||\|turn|start_of_turn)>(?:{_ROLES}\b|\w+\n)", ""),  # ChatML, gpt-oss, Gemma
        (r"<\|(?:start_header_id|header_start|start_of_role)\|>\w+<\|\w+\|>", ""),  # Llama 3 and 4, Granite
        (r"<\|START_OF_TURN_TOKEN\|><\|(?:SYSTEM|USER|CHATBOT)_TOKEN\|>", ""),  # Cohere
        # Phi, GLM, Kimi; DeepSeek; Mistral
        (rf"{_START}<\|(?i:user|system|im_user|user_start)\|>", r"<\|(?i:assistant|end|im_middle|user_end)\|>"),
        (rf"{_START}<\uff5c(?:User|System)\uff5c>", "<\uff5cAssistant\uff5c>"),
        (rf"{_START}\[INST\]", r"\[/INST\]"),
    )
]
"""Text that opens a turn in a rendered conversation, and text that comes after it."""
_MARKER = re.compile(rf"{SPECIAL_TOKEN.pattern}|<\|turn>|\[INST\]")
_PROBE: Messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


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
    problem: Exception | None = None
    for conversation, is_fit in _spellings(messages, tokenizer):
        try:
            text: Any = tokenizer.apply_chat_template(
                conversation,
                tools=list(tools) or None,  # pyrefly: ignore[bad-argument-type]
                tokenize=False,
                add_generation_prompt=answer_follows and not continues,
                continue_final_message=continues,
                return_dict=False,
            )
            text.encode("utf-8")  # arguments that are JSON text may hold half of a surrogate pair
            if is_fit(text):
                return text
        except TemplateSyntaxError as error:
            raise ValueError(f"model.chat_template: line {error.lineno} of the template: {error.message}") from None
        # Templates raise TypeErrors of their own, such as the sum of a text and a null content.
        except (TemplateError, TypeError, ValueError) as error:
            problem = problem or error
    raise ChatTemplateError(f"the chat template raised: {problem}") from None


def _spellings(
    messages: Messages, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[dict[str, Any]], Callable[[str], bool]]]:
    """The conversation as most templates take it, then as others do; with a test of the rendered text.

    Most templates print a null content as text, unless they test for it. Arguments that are JSON text are rendered as
    written by templates that take text, and would be encoded twice by the others; DeepSeek's take nothing but text.
    Templates of some vision-language models take contents in parts only.
    """
    plain = [dict(message) for message in messages]
    if _takes_parts_only(tokenizer, str(tokenizer.chat_template)):
        plain = [message | {"content": _in_parts(message["content"])} for message in plain]
    if any("tool_calls" in message or message["content"] is None for message in plain):
        takes_null = re.search(r"is (not )?none", str(tokenizer.chat_template), re.IGNORECASE)
        filled = _without_null_content(plain)
        usual = plain if takes_null else filled
        if texts := [*_argument_texts([message.get("tool_calls") for message in usual])]:
            yield (
                usual,
                lambda text: all(t.strip() in text and json.dumps(t, ensure_ascii=False) not in text for t in texts),
            )
        yield [_with_arguments(message, _parsed) for message in usual], lambda _: True
        yield [_with_arguments(message, _as_text) for message in usual], lambda _: True
        yield [_with_arguments(message, _parsed) for message in filled], lambda _: True
    yield plain, lambda _: True


def _without_null_content(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message | {"content": ""} if message["content"] is None else message for message in messages]


@lru_cache(maxsize=8)
def _takes_parts_only(tokenizer: "PreTrainedTokenizerBase", template: str) -> bool:
    """True if the tokenizer's ``template`` leaves out contents that are not in parts, as those of Idefics 3 do."""
    from jinja2 import TemplateError

    if "text" not in template:  # the key of a part
        return False

    def renders(content: Any) -> bool:
        message = {"role": "user", "content": content}
        try:
            return "Mark0x" in str(tokenizer.apply_chat_template([message], tokenize=False))
        except (TemplateError, TypeError, ValueError):
            return False

    return renders(_in_parts("Mark0x")) and not renders("Mark0x")


def _in_parts(content: str | None) -> list[dict[str, str]]:
    return [{"type": "text", "text": content or ""}]


def _argument_texts(value: Any) -> Iterator[str]:
    """Arguments of calls that are JSON text."""
    if isinstance(value, Mapping) and isinstance(value.get("arguments"), str):
        yield value["arguments"]
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _argument_texts(item)


def _with_arguments(value: Any, change: Callable[[Any], Any]) -> Any:
    """A message whose calls have ``change(arguments)`` in the place of their arguments."""
    if isinstance(value, list):
        return [_with_arguments(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: change(item) if key == "arguments" else _with_arguments(item, change) for key, item in value.items()}


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict | list) else arguments


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

    All texts get a marker at once: each piece of a content between tags, names, ids, arguments, tools. A
    text whose marker is not rendered counts as rendered if other texts in its place are rendered differently. ``how``
    has the arguments of ``render``.
    """
    markers: dict[_Path, str] = {}
    ids: dict[Any, str] = {}

    def mark(path: _Path, value: Any) -> Any:
        if path[-1] == "id" or str(path[0]).endswith(".tool_call_id"):
            # Templates compare ids and check their length.
            digits = max(len(str(value)) - 1, 5)
            markers[path] = ids.setdefault(value, f"q{len(markers):0{digits}d}")
            return markers[path]
        markers[path] = f"Mark{len(markers)}x"
        start = len(value) - len(value.lstrip()) if isinstance(value, str) else 0
        return f"{value[:start]}{markers[path]}{value[start:]}" if isinstance(value, str) else markers[path]

    def rendered(change: Callable[[_Path, Any], Any]) -> str:
        try:
            return render(_changed(messages, names, change), tokenizer, _changed_tree(("tools",), tools, change), **how)
        except ValueError:
            return ""

    def is_lost(paths: Sequence[_Path]) -> bool:
        changed = set(paths)
        # Templates may write something else, or raise, where a text is empty.
        return any(
            rendered(lambda path, value, others=others: others[path] if path in changed else value) == text
            for others in (dict.fromkeys(paths, ""), markers)
        )

    def lost_among(paths: list[_Path]) -> list[_Path]:
        if not paths or is_lost(paths):
            return paths
        half = len(paths) // 2
        return [*lost_among(paths[:half]), *lost_among(paths[half:])] if half else []

    marked = rendered(mark)
    found = set(re.findall(r"Mark\d+x", marked))
    lost = lost_among([path for path, marker in markers.items() if marker not in found and marker not in marked])
    return [*dict.fromkeys(_collapsed(lost, [*markers]))]


_Path = tuple[str | int, ...]
"""A text of a conversation: the name of a message's part or ``tools``, then keys and indices."""


def _changed(messages: Messages, names: Sequence[str], change: Callable[[_Path, Any], Any]) -> Messages:
    """The messages with ``change(path, text)`` in the place of each of their texts."""
    return tuple(
        {
            key: value
            if key == "role"
            else _changed_content(f"{name}.content", value, change)
            if key == "content"
            else _changed_tree((f"{name}.{key}",), value, change)
            for key, value in message.items()
        }
        for message, name in zip(messages, names, strict=True)
    )


def _changed_content(name: str, content: str | None, change: Callable[[_Path, Any], Any]) -> str | None:
    """A content whose pieces between tags, such as those of reasoning, are changed."""
    pieces = re.split(r"(<[^<>]*>)", content or "")
    changed = (change((name, i), piece) if piece.strip() and i % 2 == 0 else piece for i, piece in enumerate(pieces))
    return "".join(changed) if content else content


def _changed_tree(path: _Path, value: Any, change: Callable[[_Path, Any], Any]) -> Any:
    """Calls or schemas with changed texts, numbers of arguments included; keys are kept, and what selects a format."""
    in_arguments = "arguments" in path
    if isinstance(value, Mapping):
        return {
            key: item if key in ("type", "required") and not in_arguments else _changed_tree((*path, key), item, change)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_changed_tree((*path, i), item, change) for i, item in enumerate(value)]
    if path[-1] == "arguments" and isinstance(parsed := _parsed(value), dict):
        changed = _changed_tree(path, parsed, change)
        return value if changed == parsed else json.dumps(changed, ensure_ascii=False)
    if value in (None, "") or not (isinstance(value, str) or in_arguments):
        return value
    return change(path, value)


def _collapsed(lost: Sequence[_Path], paths: Sequence[_Path]) -> Iterator[str]:
    """Names of lost texts: of the largest part of the conversation that has no other ones."""
    everything, missing = (Counter(p[:n] for p in part for n in range(1, len(p) + 1)) for part in (paths, lost))
    for path in lost:
        count = next(n for n in range(1, len(path) + 1) if missing[path[:n]] == everything[path[:n]])
        name, *keys = path[:1] if str(path[0]).endswith(".content") else path[:count]
        yield "".join((str(name), *(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)))


def probe_texts(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """A small conversation as the chat template renders it, whole and up to its answer; empty if it renders neither."""
    if tokenizer.chat_template is None:
        return "", ""
    try:
        return render(_PROBE, tokenizer), render(_PROBE[:1], tokenizer, answer_follows=True)
    except ValueError:  # a template may demand other conversations
        return "", ""


def generation_prompt(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that the chat template writes after a user's turn that the model answers; empty if there is none."""
    try:
        closed = render(_PROBE[:1], tokenizer)
    except ValueError:  # there is no template, or it demands other conversations
        return ""
    _, open_ended = probe_texts(tokenizer)
    return open_ended[len(commonprefix([closed, open_ended])) :]


def turn_markers(text: str) -> list[str]:
    """The markers of a turn that a chat template rendered; empty for other text."""
    for opening, closing in _RENDERED_TURNS:
        if (first := opening.search(text)) and (last := closing.search(text, first.end())):
            return _MARKER.findall(first[0] + last[0])
    return []


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
