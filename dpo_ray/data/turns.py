"""Turns of conversations and transcripts: where the prompt of a record ends and its completions begin."""

import re
from collections.abc import Sequence
from itertools import takewhile
from os.path import commonprefix
from typing import Any

from dpo_ray.data.fields import LAYOUTS_ACCEPTED, Fields, bad_field, missing_field, text, turn
from dpo_ray.types import Message, Messages

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""Tags of the turns of a transcript."""
_TRANSCRIPT_ROLES = {"System": "system", "Human": "user", "User": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"(?:\A|\n|###)[ \t]*(Human|User|Assistant):|\b(USER|ASSISTANT):|<extra_id_1>(User|Assistant)\b")
"""A tag that opens a turn in text."""


def validate_completion(name: str, completion: Messages | str, prompt: Messages | str) -> None:
    """Reject a completion with turns of the user: the model would be trained to write them.

    Raises:
        Unusable: the completion has such a turn, or starts or ends with the turn of a tool.
    """
    if isinstance(completion, str):
        answers = isinstance(prompt, str) and _in_answer(prompt)
        human = next((speaker for speaker in _speakers(completion) if speaker != "Assistant"), None)
        if human and (answers or transcript_turns(completion)):
            bad_field(name, f"a turn by {human!r} after the prompt", "transcripts that part in their last answer")
        return
    for message in completion:
        if message["role"] not in ("assistant", "tool"):
            bad_field(name, f"a turn by {message['role']!r} after the prompt", "assistant and tool turns")
    for message, end in ((completion[-1], "end"), (completion[0], "start")):
        if message["role"] != "assistant":
            bad_field(name, f"a tool turn at the {end}", f"an assistant turn at the {end}")


def _speakers(text: str) -> list[str]:
    """Names in the tags of a text with turns, in order."""
    return ["".join(tag).capitalize() for tag in _SPEAKER.findall(text)]


def _in_answer(prompt: str) -> bool:
    """True for a text with turns that the assistant continues."""
    speakers = _speakers(prompt)
    return len(set(speakers)) > 1 and (speakers[-1] == "Assistant" or "<extra_id_1>" in prompt)


def transcript_turns(transcript: str) -> Messages | None:
    """The turns of a transcript, without a final empty one; None for other text.

    Transcripts have the tags ``Human:`` and ``Assistant:`` (HH-RLHF), or ``<extra_id_1>`` (HelpSteer 2), before which
    ``<extra_id_0>`` may open a turn of the system.
    """
    if transcript.startswith((HUMAN, HUMAN.lstrip())) and ASSISTANT in transcript:
        parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", transcript)[1:]
    elif "\n<extra_id_1>Assistant\n" in transcript:
        first, *rest = re.split(r"(?:\A|\n)<extra_id_1>(User|Assistant)\n?", transcript)
        opened = first.startswith("<extra_id_0>System") or not first
        parts = ["System" if opened else "Human", first.removeprefix("<extra_id_0>System"), *rest]
    else:
        return None
    turns = [
        turn(_TRANSCRIPT_ROLES[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    last = len(turns) - 1
    return tuple(m for i, m in enumerate(turns) if m["content"] or (i < last and m["role"] != "system"))


def prompt_turns(prompt: Messages | str) -> Messages:
    """The turns of a prompt; a text that is no transcript is one of the user."""
    return prompt if not isinstance(prompt, str) else transcript_turns(prompt) or (turn("user", prompt),)


def is_answer(completion: Messages | str) -> bool:
    """True for a text, and for turns that begin with one of the assistant."""
    return isinstance(completion, str) or completion[0]["role"] == "assistant"


def as_turns(completion: Messages | str) -> Messages:
    """The turns of a completion; a text is one of the assistant."""
    return (turn("assistant", completion),) if isinstance(completion, str) else completion


def split_conversations(fields: Fields, names: Sequence[str], chosen: Messages | str, rejected: Messages | str) -> Any:
    """Split two whole conversations without a prompt field at the end of their common start."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_transcripts(fields, names, chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str) or is_answer(chosen) or is_answer(rejected):
        missing_field(fields.record, "prompt", LAYOUTS_ACCEPTED)
    shared = _shared_turns(chosen, rejected)
    if not shared:
        bad_field(" and ".join(names), "conversations without a shared start", "a prompt field, or a shared start")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared_turns(*conversations: Messages) -> int:
    """Number of turns of the prompt of whole conversations: their common start, up to an assistant turn of each."""
    shared = 0
    for turns in zip(*(conversation[:-1] for conversation in conversations), strict=False):
        if any(message != turns[0] for message in turns):
            break
        shared += 1
    # Completions start with an assistant turn, and both turns of an exchange with a tool belong to a completion.
    while shared and conversations[0][shared - 1]["role"] in ("assistant", "tool"):
        shared -= 1
    return shared


def split_after(names: Sequence[str], prompt: Messages, *completions: Messages) -> tuple[Messages, ...]:
    """Split off a prompt that completions may repeat: all of it, or from one of its turns on.

    Whole conversations may have turns before the prompt, and further turns in common after it.

    Returns:
        The prompt and the completions without it.
    """
    first, answers, both = completions[0], all(map(is_answer, completions)), " and ".join(dict.fromkeys(names))
    common = takewhile(
        lambda turns: all(_same(turns[:1], (other,)) for other in turns), zip(*completions, strict=False)
    )
    whole = [(skipped, len(prompt)) for skipped in range(len([*common]) + 1)]
    for skipped, count in (*whole, *((0, count) for count in range(len(prompt) - 1, 0, -1))):
        rests = [_after(prompt[-count:], conversation[skipped:]) for conversation in completions]
        if any(rest is None for rest in rests) or (count == 1 and answers and not _content(prompt[-1]).strip()):
            continue
        if answers and count < len(prompt):
            bad_field(both, "answers that start with the end of the prompt", "answers, or the prompt and an answer")
        return _with_shared_turns(prompt, count, first, [rest for rest in rests if rest is not None])
    if answers:
        return prompt, *completions
    shared = _shared_turns(*completions)
    start = first[:shared]
    if not _contains(start, prompt):
        repeats = any(_contains(start, (message,)) for message in prompt)
        if prompt[-1]["role"] == "user" or not shared or start[0]["role"] != "user" or repeats:
            bad_field(both, "whole conversations without the prompt", "answers, or the prompt and an answer")
        start = (*prompt, *start)
    return start, *(conversation[shared:] for conversation in completions)


def _with_shared_turns(
    prompt: Messages, repeated: int, conversation: Messages, rests: Sequence[Messages]
) -> tuple[Messages, ...]:
    """The prompt with the further turns that all of ``rests`` have in common, and the completions after them.

    Args:
        repeated: number of the prompt's turns in ``conversation``, which ends with the first of ``rests``.
    """
    shared = _shared_turns(*rests)
    start = conversation[: len(conversation) - len(rests[0]) + shared]
    begun = prompt[-1:] if not shared and prompt[-1]["role"] == "assistant" else ()
    return (*prompt[:-repeated], *start, *begun), *(rest[shared:] for rest in rests)


def _after(prompt: Messages, conversation: Messages) -> Messages | None:
    """The turns of a conversation after a prompt that it starts with; None if it starts otherwise or ends there.

    An assistant turn at the end of the prompt may be continued by the conversation's.
    """
    if len(conversation) < len(prompt) or not _same(prompt[:-1], conversation[: len(prompt) - 1]):
        return None
    last, following, rest = prompt[-1], conversation[len(prompt) - 1], conversation[len(prompt) :]
    if last["role"] != "assistant":
        return rest or None if _same((last,), (following,)) else None
    if not _content(following).startswith(_content(last)):
        return None
    if any(following.get(key) != value for key, value in last.items() if key != "content"):
        return None
    return {**following, "content": _content(following).removeprefix(_content(last))}, *rest


def _content(message: Message) -> str:
    return message["content"] or ""


def _contains(conversation: Messages, turns: Messages) -> bool:
    """True if ``turns`` occur in ``conversation`` in this order."""
    rest = iter(conversation)
    return all(any(_same((message,), (other,)) for other in rest) for message in turns)


def _same(turns: Sequence[Message], others: Sequence[Message]) -> bool:
    def key(message: Message) -> Any:
        return {**message, "content": _content(message).strip()}

    return len(turns) == len(others) and all(key(a) == key(b) for a, b in zip(turns, others, strict=True))


def _split_transcripts(fields: Fields, names: Sequence[str], chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two Human/Assistant transcripts after their last common Assistant tag."""
    before, tag, _ = commonprefix([chosen, rejected]).rpartition(ASSISTANT)
    if not tag:
        missing_field(fields.record, "prompt", LAYOUTS_ACCEPTED)
    end = len(before) + len(tag)
    return chosen[:end], text(names[0], chosen[end:]), text(names[1], rejected[end:])
