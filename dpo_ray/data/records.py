"""Layouts of preference pair and prompt records.

Invalid records are returned as a ``Problem`` with reason and location. Independent of file formats and tokenisation.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, NoReturn

from dpo_ray.data.sources import Part, Unusable, check_sources, read_rows, show
from dpo_ray.types import Message, Messages

LAYOUTS_ACCEPTED = (
    "accepted are prompt/chosen/rejected, chosen/rejected as whole conversations, "
    "messages/completions with scores, and conversations/chosen/rejected"
)
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
}
"""Values accepted in ``role`` and ``from``, and their roles."""

_HH_ASSISTANT = "\n\nAssistant:"


@dataclass(frozen=True, slots=True)
class PairRecord:
    """A preference pair as text: all three parts are strings, or all three are messages."""

    prompt: Messages | str
    chosen: Messages | str
    rejected: Messages | str
    source: str
    number: int
    """Line of a JSONL file, otherwise position in the source; from 1."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt to generate completions for."""

    messages: Messages
    source: str
    number: int


@dataclass(frozen=True, slots=True)
class Problem:
    """An invalid record and the reason."""

    reason: str
    """Key of the data report: not_json, not_a_record, missing_field, empty_field, bad_field, ..."""
    source: str
    number: int
    detail: str
    """The field and its content."""


def read_pairs(parts: Sequence[Part]) -> Iterator[PairRecord | Problem]:
    """Yield a preference pair or a problem per record of ``parts``, in order.

    Raises:
        Unreadable: a source is missing (raised at once), or cannot be read.
    """
    check_sources(parts)
    return _read(parts, _pair_record)


def read_prompts(sources: Sequence[str]) -> Iterator[PromptRecord | Problem]:
    """Yield a prompt or a problem per record of ``sources``, in order.

    The prompt of a conversation ends before its last assistant turns.

    Raises:
        Unreadable: a source is missing (raised at once), or cannot be read.
    """
    parts = [Part(source) for source in sources]
    check_sources(parts)
    return _read(parts, _prompt_record)


def _read(parts: Sequence[Part], build: Callable[[Mapping[str, Any], str, int], Any]) -> Iterator[Any]:
    for part in parts:
        for number, row in read_rows(part):
            yield _build(row, build, part.source, number)


def _build(row: Any, build: Callable[[Mapping[str, Any], str, int], Any], source: str, number: int) -> Any:
    try:
        if isinstance(row, Unusable):
            raise row
        if not isinstance(row, dict):
            raise Unusable("not_a_record", f"found {show(row)}; accepted is an object of fields")
        return build(row, source, number)
    except Unusable as problem:
        return Problem(problem.reason, source, number, problem.detail)


# ------------------------------------------------------------------------------------------------------------ layouts


def _pair_record(record: Mapping[str, Any], source: str, number: int) -> PairRecord:
    prompt, chosen, rejected = _ranked(record) if _has(record, "completions") else _labelled(record)
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(completion, tuple):
            for turn in completion:
                if turn["role"] != "assistant":
                    _bad(name, f"a turn by {turn['role']!r} after the prompt", "assistant turns")
    if chosen == rejected:
        raise Unusable("identical", f"chosen and rejected are both {show(_last_text(chosen))}")
    return PairRecord(prompt, chosen, rejected, source, number)


def _prompt_record(record: Mapping[str, Any], source: str, number: int) -> PromptRecord:
    if _has(record, "prompt"):
        prompt = _conversation(record, "prompt")
    elif _has(record, "messages"):
        prompt = _conversation(record, "messages")
    elif _has(record, "conversations"):
        prompt = _with_system(record, _conversation(record, "conversations"))
    elif isinstance(record.get("chosen"), list) and isinstance(record.get("rejected"), list):
        chosen, rejected = _conversation(record, "chosen"), _conversation(record, "rejected")
        prompt, _, _ = _split_whole(_as_turns("chosen", chosen), _as_turns("rejected", rejected))
    else:
        _missing(record, "prompt", "accepted are prompt, messages and conversations")
    if isinstance(prompt, str):
        prompt = (_turn_of("user", prompt),)
    while prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        _bad("prompt", "only assistant turns", "a conversation that ends with another turn")
    return PromptRecord(prompt, source, number)


_Pair = tuple[Messages | str, Messages | str, Messages | str]


def _labelled(record: Mapping[str, Any]) -> _Pair:
    """Layouts with the fields chosen and rejected."""
    chosen, rejected = _conversation(record, "chosen"), _conversation(record, "rejected")
    if _has(record, "conversations"):
        prompt: Messages | str = _with_system(record, _conversation(record, "conversations"))
    elif _has(record, "prompt"):
        prompt = _conversation(record, "prompt")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        return _split_hh(record, chosen, rejected)
    else:
        chosen, rejected = _as_turns("chosen", chosen), _as_turns("rejected", rejected)
        if chosen[0]["role"] == rejected[0]["role"] == "assistant":
            _missing(record, "prompt", LAYOUTS_ACCEPTED)
        return _split_whole(chosen, rejected)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    if isinstance(prompt, str) and isinstance(chosen, str) != isinstance(rejected, str):
        _bad("chosen and rejected", "text and messages", "two texts or two lists of messages")
    if isinstance(prompt, str) or (isinstance(chosen, tuple) and chosen[0]["role"] != "assistant"):
        return _split_after(prompt, _as_turns("chosen", chosen), _as_turns("rejected", rejected))
    return prompt, _as_answer(chosen), _as_answer(rejected)


def _split_after(prompt: Messages | str, chosen: Messages, rejected: Messages) -> _Pair:
    """Split off a prompt that chosen and rejected may repeat."""
    turns = (_turn_of("user", prompt),) if isinstance(prompt, str) else prompt
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        return turns, chosen, rejected
    shared, chosen, rejected = _split_whole(chosen, rejected)
    if turns[-1]["content"].strip() not in [turn["content"].strip() for turn in shared]:
        _bad("chosen and rejected", "whole conversations without the prompt", "answers, or the prompt and an answer")
    return shared, chosen, rejected


def _split_whole(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Split two whole conversations at the end of their common prefix, but before the last turn of each."""
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    if not shared:
        _bad("chosen and rejected", "conversations without a shared start", "a prompt field, or a shared start")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _split_hh(record: Mapping[str, Any], chosen: str, rejected: str) -> _Pair:
    """Split two Human/Assistant transcripts after their last common Assistant tag."""
    before, tag, _ = commonprefix([chosen, rejected]).rpartition(_HH_ASSISTANT)
    if not tag:
        _missing(record, "prompt", LAYOUTS_ACCEPTED)
    end = len(before) + len(tag)
    return chosen[:end], _text("chosen", chosen[end:]), _text("rejected", rejected[end:])


def _ranked(record: Mapping[str, Any]) -> _Pair:
    """Scored completions of one prompt: the best is chosen, the worst rejected."""
    prompt = _conversation(record, "messages" if _has(record, "messages") else "prompt")
    completions = record["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        _bad("completions", show(completions), "a list of two or more")
    scores = _scores(record, completions)
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        raise Unusable("tie", f"all {len(scores)} completions score {scores[best]:g}")
    chosen, rejected = (_text(f"completions[{i}]", _completion_text(completions[i], i)) for i in (best, worst))
    if isinstance(prompt, str):
        return prompt, chosen, rejected
    return prompt, _as_answer(chosen), _as_answer(rejected)


def _scores(record: Mapping[str, Any], completions: Sequence[Any]) -> list[float]:
    scores: list[Any]
    if _has(record, "scores"):
        scores = record["scores"]
        if not isinstance(scores, list) or len(scores) != len(completions):
            raise Unusable("bad_score", f"scores: found {show(scores)} for {len(completions)} completions")
    else:
        scores = [c.get("score") if isinstance(c, dict) else None for c in completions]
    for i, score in enumerate(scores):
        if not _is_finite(score):
            raise Unusable("bad_score", f"completions[{i}]: found score {show(score)}; accepted: a finite number")
    return scores


def _is_finite(score: Any) -> bool:
    try:
        return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _completion_text(completion: Any, index: int) -> Any:
    if not isinstance(completion, dict):
        return completion
    for name in ("content", "text", "completion", "response", "value"):
        if _has(completion, name):
            return completion[name]
    _missing(completion, f"completions[{index}].content", "accepted are content, text, completion, response and value")


# ------------------------------------------------------------------------------------------------------------- fields


def _has(record: Mapping[str, Any], name: str) -> bool:
    return record.get(name) is not None


def _conversation(record: Mapping[str, Any], name: str) -> Messages | str:
    """A field with text, one message or a list of messages."""
    if not _has(record, name):
        _missing(record, name, LAYOUTS_ACCEPTED)
    value = record[name]
    if isinstance(value, str):
        return _text(name, value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        _bad(name, show(value), "text or a list of messages")
    if not value:
        raise Unusable("empty_field", f"{name}: an empty list")
    return tuple(_turn(f"{name}[{i}]", turn) for i, turn in enumerate(value))


def _turn(name: str, value: Any) -> Message:
    if not isinstance(value, dict):
        _bad(name, show(value), "a message, {role, content} or {from, value}")
    speaker_key, text_key = ("from", "value") if _has(value, "from") else ("role", "content")
    for key in (speaker_key, text_key):
        if not _has(value, key):
            _missing(value, f"{name}.{key}", "accepted is a message, {role, content} or {from, value}")
    speaker = value[speaker_key]
    if not isinstance(speaker, str) or speaker not in ROLES:
        _bad(f"{name}.{speaker_key}", show(speaker), ", ".join(ROLES))
    role = ROLES[speaker]
    # An empty system turn is valid: it prevents templates from inserting their default.
    return _turn_of(role, _text(f"{name}.{text_key}", value[text_key], may_be_empty=role == "system"))


def _text(name: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        _bad(name, show(value), "text")
    if not value.strip() and not may_be_empty:
        raise Unusable("empty_field", f"{name}: {show(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        _bad(name, f"half of a surrogate pair at character {error.start + 1}", "Unicode text")
    return value


def _with_system(record: Mapping[str, Any], conversation: Messages | str) -> Messages:
    turns = _as_turns("conversations", conversation)
    system = record.get("system")
    if system is None or system == "":
        return turns
    return (_turn_of("system", _text("system", system)), *turns)


def _as_turns(name: str, value: Messages | str) -> Messages:
    if isinstance(value, str):
        _bad(name, show(value), "a list of messages")
    return value


def _as_answer(value: Messages | str) -> Messages:
    return (_turn_of("assistant", value),) if isinstance(value, str) else value


def _turn_of(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _last_text(completion: Messages | str) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _missing(record: Mapping[str, Any], name: str, accepted: str) -> NoReturn:
    raise Unusable("missing_field", f"{name}: found {', '.join(sorted(map(str, record))) or 'no fields'}; {accepted}")


def _bad(name: str, found: str, accepted: str) -> NoReturn:
    raise Unusable("bad_field", f"{name}: found {found}; accepted: {accepted}")
