"""The tokens of a trajectory that carry loss: those of its assistant turns, and not those of the turns between them.

A turn's boundary is where the conversation up to it, rendered and tokenized alone, parts from the whole one.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from dpo_ray.data.template import ChatTemplateError
from dpo_ray.types import Messages


class LostTurn(ValueError):
    """An assistant turn is not found among the tokens of its conversation."""


class Encode(Protocol):
    """Token ids of a conversation; with ``answer_follows``, up to where the model continues."""

    def __call__(self, messages: Messages, *, answer_follows: bool = False) -> list[int]: ...


def mask_other_turns(
    ids: list[int], messages: Messages, prompt_turns: int, encode: Encode, end_of_turn: int | None
) -> list[int]:
    """Token ids of a conversation; those after the prompt that are not of assistant turns become ``~id``.

    Most templates render a turn alike after any conversation. So each turn is rendered after the last exchange of the
    prompt alone, which takes time linear in the number of turns; if the tokens differ from ``ids``, after all turns.

    Args:
        ids: of all ``messages``, which end with an assistant turn.
        messages: the prompt and the completion.
        prompt_turns: number of messages of the prompt.
        encode: renders and tokenizes a conversation.
        end_of_turn: the token that ends a turn.

    Raises:
        LostTurn: the template rewrites a turn when others follow.
    """
    turns = [i for i in range(prompt_turns, len(messages)) if messages[i]["role"] == "assistant"]
    try:
        return _mask(ids, messages, turns, encode, end_of_turn, _last_exchange(messages[:prompt_turns]))
    except (LostTurn, ChatTemplateError):
        return _mask(ids, messages, turns, encode, end_of_turn)


def _mask(
    ids: list[int],
    messages: Messages,
    turns: Sequence[int],
    encode: Encode,
    end_of_turn: int | None,
    exchange: Messages = (),
) -> list[int]:
    first = messages[: turns[0]]
    start = common_prefix(encode(first, answer_follows=first[-1]["role"] != "assistant"), ids)
    masked = ids[:start]
    opened = encode(exchange, answer_follows=True) if exchange else []
    opening = len(opened) - len(encode(exchange)) if exchange else 0  # tokens of the generation prompt
    for i, following in pairwise(turns):
        before = exchange or messages[:i]
        closed = encode((*before, *messages[i:following]), answer_follows=True) if following > i + 1 else []
        # Tokens of shorter conversations are compared from the start of the turn on.
        skipped, at = (common_prefix(opened, closed), start) if exchange else (0, 0)
        end = _end_of_turn(ids, before, messages[i : i + 2], skipped, at, encode, end_of_turn)
        next_start = at + common_prefix(closed[skipped:], ids[at : at + len(closed)]) if closed else end
        reached = at + len(closed) - skipped - opening if exchange else 0
        if end is None or next_start is None or next_start < max(end, reached):
            raise LostTurn(f"the chat template rewrites turn {i} of the conversation when others follow")
        masked += [*ids[start:end], *(~token for token in ids[end:next_start])]
        start = next_start
    return masked + ids[start:]


def _last_exchange(prompt: Messages) -> Messages:
    """The system turns and the turns from the user's last one on; empty for a prompt without a user turn."""
    start = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    return () if start is None else (*(m for m in prompt[:start] if m["role"] == "system"), *prompt[start:])


def _end_of_turn(
    ids: list[int], before: Messages, turns: Messages, skipped: int, at: int, encode: Encode, end_of_turn: int | None
) -> int | None:
    """Number of ids up to the end of the first of two turns, with its end-of-turn token; None if it is not found."""
    turn, following = turns
    ends = encode((*before, turn))[skipped:]
    end = common_prefix(ends, ids[at : at + len(ends)])
    if end == len(ends):
        return at + end
    # The template renders a last turn otherwise: the turn ends at the last end-of-turn token before the next text.
    altered = encode((*before, turn, {**following, "content": "\x00"}))[skipped:]
    until = common_prefix(altered, ids[at : at + len(altered)])
    return max((n + 1 for n in range(at + end, at + until) if ids[n] == end_of_turn), default=None)


def common_prefix(ids: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens up to the first that differs."""
    for i, (token, other_token) in enumerate(zip(ids, other, strict=False)):
        if token != other_token:
            return i
    return min(len(ids), len(other))
