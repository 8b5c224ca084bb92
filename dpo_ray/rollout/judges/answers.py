"""Verdicts in the replies of a language model: JSON, also between prose or in a code fence, else a few plain forms.

Prose without one of these forms has no verdict: "answer A is better than answer B" names both.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_WINNER = r"(a\s+tie|tie|draw|equal|a|b|c)"
_BRACKETS = re.compile(r"\[\[\s*" + _WINNER + r"\s*\]\]", re.IGNORECASE)
_NAMED_WINNER = re.compile(
    r"\b(?:(?:winner|verdict|choice|answer|response)\b[\s\"'*_]*[:=]|(?:winner|verdict|choice)\s+is\b)"
    r"\W*(?:(?:response|answer|assistant)\s+)?" + _WINNER + r"[^\w\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
_SHARES = {"a": 1.0, "b": 0.0}
_NUMBER = r"([-+]?\d+(?:\.\d+)?)"
_NAMED_SCORE = re.compile(
    r"(?:\b(?:score|rating)\b[\s\"'*_]*[:=][\s\"'*_\[]*|<(?:score|rating)>[\s*_\[]*)"
    # No part of a longer number, of a range or of "5-point scale".
    + _NUMBER
    + r"(?![^\W_]|\.\d|\s*(?:[-\u2013\u2014]|to)\s*\d|[-\s]+points?\s+scale)",
    re.IGNORECASE,
)
_ONLY_NUMBER = re.compile(r"\W*?" + _NUMBER + r"\s*(?:/\s*\d+)?\W*")
_QUOTES = " \t\r\n.*_`\"'()[]#:"


def parse_winner(reply: str) -> float | None:
    """Share of the first completion: 1 for ``A``, 0 for ``B``, 0.5 for a tie; None without a verdict.

    Accepted: JSON with ``winner``, ``[[A]]``, ``Winner: A`` or ``The winner is A``, and a reply or last line of nothing
    but the name; with or without the word Response.
    """
    text = THINKING.sub("", reply)
    for fields in _objects(text, "winner"):
        return _share(str(fields["winner"]))
    for pattern in (_BRACKETS, _NAMED_WINNER):
        if names := pattern.findall(text):
            return _share(names[-1])
    lines = text.strip().splitlines()
    return _share(lines[-1]) if lines else None


def parse_score(reply: str, low: float, high: float) -> float | None:
    """The score of a reply; None without one, or if it lies outside ``low`` to ``high``.

    Accepted: JSON with ``score``, ``Score: 4`` or ``Score: 4/5``, ``<score>4</score>``, and a reply of nothing but the
    number.
    """
    text = THINKING.sub("", reply)
    score = None
    for fields in _objects(text, "score"):
        score = _number(fields["score"])
        break
    else:
        if named := _NAMED_SCORE.findall(text):
            score = float(named[-1])
        elif only := _ONLY_NUMBER.fullmatch(text):
            score = float(only[1])
    return score if score is not None and low <= score <= high else None


def _share(name: str) -> float | None:
    name = name.strip(_QUOTES).lower()
    if name in ("tie", "draw", "equal", "c") or re.fullmatch(r"a\s+tie", name):
        return 0.5
    return _SHARES.get(re.sub(r"^(?:response|answer|assistant)\s+", "", name))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        only = _ONLY_NUMBER.fullmatch(str(value))
        return float(only[1]) if only else None
    return number if math.isfinite(number) else None


def _objects(text: str, key: str) -> Iterator[Mapping[str, Any]]:
    """The JSON objects in a text that have ``key``, the last one first."""
    decoder = json.JSONDecoder()
    for start in reversed([match.start() for match in re.finditer(r"\{", text)]):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(value, dict) and key in value:
            yield value
