"""Fields of a record: text, messages, conversations and tools, validated.

An invalid field raises ``Unusable`` with its name, its content and the accepted ones.
"""

import ast
import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dpo_ray.data.formats import Unusable, parse_json, show
from dpo_ray.types import Message, Messages

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""Values accepted in ``role`` and ``from``, in lower or upper case, and their roles."""

LAYOUTS_ACCEPTED = (
    "accepted are prompt/chosen/rejected, chosen/rejected as whole conversations, "
    "messages/completions with scores, conversations/chosen/rejected, two responses with a verdict, "
    "prompt/completion/label for loss.use: kto or bco, "
    "and the layouts in docs/data.md"
)

MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""Keys of a message that reach the chat template."""

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that hold media."""
_MEDIA_KEYS = (*MEDIA, "image_url", "audio_url", "video_url", "input_audio")
"""Keys inside a column that hold media."""
_INDICES = r"(?:\[\d+\])+"


class Fields:
    """The fields of one record; counts those that nobody read.

    Null fields count as missing: Arrow pads records with nulls.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self._read: set[str] = set()
        self._unread_keys: Counter[str] = Counter()
        self.input_tools: Any = None
        """Tools beside the messages of the prompt in ``input``, as in OpenAI's files."""
        _reject_media("", record, MEDIA)

    def has(self, name: str) -> bool:
        """True if the field is present and not null."""
        return self.record.get(name) is not None

    def first_of(self, *names: str) -> str | None:
        """The first of ``names`` that is present, or None."""
        return next(filter(self.has, names), None)

    def read(self, name: str) -> Any:
        """The value of a field; None if it is missing."""
        self._read.add(name)
        value = self.record.get(name)
        if isinstance(value, Unusable):
            raise Unusable(value.reason, f"{name}: {value.detail}")
        return value

    def text(self, name: str) -> str:
        """A field that must be text with more than white space."""
        return text(name, self.read(name))

    def conversation(self, name: str, value: Any = None) -> Messages | str:
        """A field with text, one message, a list of messages, or such a list as JSON text."""
        value = self.read(name) if value is None else value
        if isinstance(value, str):
            value = _parse_messages(name, value)
        if isinstance(value, str):
            return text(name, value)
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            bad_field(name, show(value), "text or a list of messages")
        turns = [self._message(f"{name}[{i}]", turn) for i, turn in enumerate(value)]
        if not any(turns):
            raise Unusable("empty_field", f"{name}: an empty list")
        return tuple(turn for turn in turns if turn)

    def system(self) -> Messages:
        """The column ``system`` (or ``system_prompt``) as a turn; an empty one is no turn."""
        for name in filter(self.has, ("system", "system_prompt")):
            value = self.read(name)
            if not isinstance(value, str) or value.strip():
                return (turn("system", text(name, value)),)
        return ()

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """The tools of the column ``tools`` or of OpenAI's ``input``: a list of JSON schemas, or JSON text of one."""
        column = self.read("tools")
        if column and self.input_tools:
            self.skip_key("input.tools")
        value = column or self.input_tools
        if isinstance(value, str) and value.strip():
            value = _parse_json("tools", value)
        if not value:
            return ()
        if not isinstance(value, list):
            bad_field("tools", show(value), "a list of JSON schemas")
        schemas = [_parse_json(f"tools[{i}]", tool) if isinstance(tool, str) else tool for i, tool in enumerate(value)]
        for i, schema in enumerate(schemas):
            if not isinstance(schema, dict):
                bad_field(f"tools[{i}]", show(schema), "a JSON schema")
            validate_texts(f"tools[{i}]", schema)
        return tuple(schemas)

    def openai_input(self) -> Mapping[str, Any] | None:
        """The field ``input`` if it is an object with messages, or JSON text of one."""
        value = self.record.get("input")
        if isinstance(value, str) and re.match(r'\s*\{\s*"(?:messages|tools)"\s*:', value):
            with contextlib.suppress(ValueError, RecursionError):
                parsed = json.loads(value)
                value = _parse_json("input", value) if isinstance(parsed.get("messages"), list) else value
        return value if isinstance(value, dict) else None

    def unread(self) -> tuple[str, ...]:
        """Names of the non-null fields that were not read; keys inside a field as ``chosen[].KEY``."""
        columns = (
            name for name in self.record if self.has(name) and name not in self._read and self.record[name] != []
        )
        return (*map(str, columns), *self.unread_keys())

    @property
    def read_names(self) -> frozenset[str]:
        """Names of the fields that were read."""
        return frozenset(self._read)

    def unread_keys(self) -> tuple[str, ...]:
        """Keys inside fields that were not read, as ``chosen[].KEY``."""
        return tuple(self._unread_keys)

    def forget(self, name: str) -> None:
        """Count a field as not read."""
        self._read.discard(name)

    def skip_key(self, name: str) -> None:
        """Count a key inside a field as not read."""
        self._unread_keys[name] += 1

    def skip_other_keys(self, name: str, value: Mapping[str, Any], used: Sequence[str]) -> None:
        """Count the keys of a message, a content part or an item of a list that are not ``used``; reject media."""
        _reject_media(f"{name}.", value, _MEDIA_KEYS)
        for key, item in value.items():
            if key not in used and item not in (None, [], ""):
                self.skip_key(f"{re.sub(_INDICES, '[]', name)}.{key}")

    def _message(self, name: str, value: Any) -> Message | None:
        """A message, or None for a system turn without content."""
        accepted = "a message, {role, content} or {from, value}"
        if not isinstance(value, dict):
            bad_field(name, show(value), accepted)
        speaker_key, text_key = ("from", "value") if value.get("from") is not None else ("role", "content")
        speaker = value.get(speaker_key)
        if speaker is None:
            missing_field(value, f"{name}.{speaker_key}", f"accepted is {accepted}")
        if not isinstance(speaker, str) or speaker.lower() not in ROLES:
            bad_field(f"{name}.{speaker_key}", show(speaker), ", ".join(ROLES))
        speaker = speaker.lower()
        if isinstance(value.get("reasoning"), str) and not value.get("reasoning_content"):  # as newer engines name it
            value = {"reasoning_content" if key == "reasoning" else key: item for key, item in value.items()}
        extra = {key: value[key] for key in MESSAGE_KEYS[2:] if value.get(key) not in (None, [], "")}
        self.skip_other_keys(name, value, (speaker_key, text_key, *MESSAGE_KEYS[2:]))
        content = value.get(text_key)
        for i, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict):
                self.skip_other_keys(f"{name}.{text_key}[{i}]", part, ("type", "text"))
        if speaker == "function_call":
            extra["tool_calls"], content = _called_functions(f"{name}.{text_key}", content), None
        elif calls := _tool_calls(f"{name}.tool_calls", extra.pop("tool_calls", None)):
            extra["tool_calls"] = calls
        for key in ("reasoning_content", "thinking", "name", "tool_call_id"):
            if key in extra:
                extra[key] = text(f"{name}.{key}", extra[key])
        return _turn(name, text_key, ROLES[speaker], value, content, extra)


def _turn(name: str, text_key: str, role: str, value: Any, content: Any, extra: dict[str, Any]) -> Message | None:
    if content is None:
        if role == "system":
            return None
        if "tool_calls" not in extra:
            missing_field(value, f"{name}.{text_key}", "accepted is a message, {role, content} or {from, value}")
        return {"role": role, "content": None, **extra}
    # An empty system turn is valid: it prevents templates from inserting their default. Tools may return nothing.
    may_be_empty = role in ("system", "tool") or bool(extra)
    joined = _joined(f"{name}.{text_key}", content)
    return {"role": role, "content": text(f"{name}.{text_key}", joined, may_be_empty=may_be_empty), **extra}


def turn(role: str, content: str) -> Message:
    """A chat turn."""
    return {"role": role, "content": content}


def text(name: str, value: Any, *, may_be_empty: bool = False) -> str:
    """``value`` if it is text that a model can be trained on."""
    if not isinstance(value, str):
        bad_field(name, show(value), "text")
    if not value.strip() and not may_be_empty:
        raise Unusable("empty_field", f"{name}: {show(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        bad_field(name, f"half of a surrogate pair at character {error.start + 1}", "Unicode text")
    return value


def validate_texts(name: str, value: Any) -> None:
    """Raise Unusable for a value that holds text that is not Unicode."""
    if isinstance(value, str):
        text(name, value, may_be_empty=True)
    elif isinstance(value, dict):
        for key, item in value.items():
            validate_texts(f"{name}.{key}", item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            validate_texts(f"{name}[{i}]", item)


def _reject_media(prefix: str, value: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        item = value.get(key)
        # A table stores an image that is missing as an object of nulls.
        if any(part is not None for part in item.values()) if isinstance(item, Mapping) else item:
            bad_field(f"{prefix}{key}", show(value[key]), "text records only; remove the record or the field")


def missing_field(record: Mapping[str, Any], name: str, accepted: str) -> NoReturn:
    """Raise Unusable for a field that is missing or null."""
    found = ", ".join(sorted(str(key) for key, value in record.items() if value is not None))
    raise Unusable("missing_field", f"{name}: found {found or 'no fields'}; {accepted}")


def bad_field(name: str, found: str, accepted: str) -> NoReturn:
    """Raise Unusable for a field that cannot be used."""
    raise Unusable("bad_field", f"{name}: found {found}; accepted: {accepted}")


def _joined(name: str, content: Any) -> Any:
    """Content parts of text as one text; other values unchanged."""
    if not isinstance(content, list) or not content:
        return content
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            bad_field(f"{name}[{i}]", f"a part of type {show(kind)}", "parts of type text")
        parts.append(text(f"{name}[{i}]", part.get("text") if isinstance(part, dict) else part, may_be_empty=True))
    return "".join(parts)


_ROLE_KEY = re.compile(r"""["'](?:role|from)["']\s*:""")
_STARTS_LIKE_MESSAGES = re.compile(
    r"""\s*(?:\[\s*\{\s*["'](?:role|from|content|value)|\{\s*["'](?:role|from))["']\s*:"""
)


def _parse_messages(name: str, value: str) -> Any:
    """A message or a list of messages stored as JSON or Python text, also encoded twice; other text unchanged.

    Text is a message or a list of messages if one of its objects has the role of a speaker; a damaged one is rejected
    with the others.
    """
    if re.match(r'\s*"\s*[\[{]', value):
        with contextlib.suppress(ValueError, RecursionError):
            decoded = _parse_messages(name, json.loads(value))
            return value if isinstance(decoded, str) else decoded
    stripped = value.strip()
    if stripped[:1] not in ("[", "{") or stripped[-1:] not in ("]", "}") or not _ROLE_KEY.search(stripped):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(stripped)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        in_list = isinstance(parsed, list)
        if not any(_is_message(item, in_list=in_list) for item in (parsed if in_list else [parsed])):
            return value
        return _parse_json(name, stripped) if parse is json.loads else parsed
    if _STARTS_LIKE_MESSAGES.match(value):
        bad_field(name, f"{show(value)}, which starts like a list of messages", "a list of messages as JSON text")
    return value


def _is_message(value: Any, *, in_list: bool) -> bool:
    """True for an object with a role and a content, and for one with a known role and calls of tools.

    In a list, a known role is enough: a message that lacks its content is named as such.
    """
    if not isinstance(value, dict):
        return False
    role, content = ("role", "content") if "role" in value else ("from", "value")
    known = str(value.get(role)).lower() in ROLES and (in_list or "tool_calls" in value)
    return isinstance(value.get(role), str) and (content in value or known)


def _parse_json(name: str, value: str) -> Any:
    try:
        parsed = parse_json(value)
    except (ValueError, RecursionError) as error:
        bad_field(name, f"text that is not JSON: {error}", "a list, or JSON text of one")
    if isinstance(parsed, Unusable):
        raise Unusable(parsed.reason, f"{name}: {parsed.detail}")
    return parsed


def _tool_calls(name: str, value: Any) -> list[Any]:
    calls = _parse_json(name, value) if isinstance(value, str) else value
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        bad_field(name, show(calls), "a list of tool calls")
    validate_texts(name, calls)
    return calls


def _called_functions(name: str, value: Any) -> list[Any]:
    """Calls of a ShareGPT turn by ``function_call``: JSON of one call or of several, {name, arguments}."""
    calls = _parse_json(name, text(name, value))
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or "name" not in call:
            bad_field(name, show(call), "a call, {name, arguments}")
        validate_texts(name, call)
    return [{"type": "function", "function": call} for call in calls]
