"""Layouts of records: which fields hold the prompt, the completions and their scores.

A layout is recognized by its fields. Each is read into ``Candidates``, whatever it is named after:

    labeled      prompt, chosen, rejected (also instruction, question, history, chosen_response, ...)
    implicit      chosen and rejected as whole conversations, or as Human/Assistant transcripts
    verdict       two completions and a verdict (HelpSteer 2 and 3, PKU-SafeRLHF, SHP, arena battles)
    ranked        a list of completions with scores or ranks (UltraFeedback, Nectar, distilabel)
    unpaired      one completion and a label: desirable or not (KTO, BCO)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_ray.data.fields import LAYOUTS_ACCEPTED, Fields, bad_field, missing_field, text, turn
from dpo_ray.data.formats import Unusable, show
from dpo_ray.data.placeholders import placeholder_notes
from dpo_ray.data.turns import (
    as_turns,
    is_answer,
    prompt_turns,
    split_after,
    split_conversations,
    transcript_turns,
    validate_completion,
)
from dpo_ray.data.verdicts import Verdict, finite_number, verdict_of
from dpo_ray.types import Messages

PROMPT = (
    "prompt", "context_messages", "conversations", "instruction", "question", "input", "context", "history", "messages",
)  # fmt: skip
"""Fields that may hold the prompt, in the order in which they are looked for."""
_CHOSEN = ("chosen", "chosen_response", "response_j", "preferred_output")
_REJECTED = ("rejected", "rejected_response", "response_k", "non_preferred_output")
_LISTS = ("completions", "answers", "generations", "responses")
_ANSWERS = ("completion", "output", "response", "answer")
"""Fields that may hold the answer of a record with one completion."""
_SCORES = ("scores", "score", "ratings", "rating", "ranks", "rank")
_ITEM_SCORES = ("score", "overall_score", "rating", "rank")
"""Keys of a completion in a ranked list that may hold its score."""
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)
_TEXTS = ("content", "text", "completion", "response", "answer", "value", "generated_text")
_LOWER_IS_BETTER = ("rank", "ranks")
_LABELS = ("label", "kto_tag")
_DESIRABLE: Mapping[Any, bool] = {
    True: True, False: False, -1: False, "true": True, "false": False, "desirable": True, "undesirable": False,
}  # fmt: skip
"""Values of a label; 1 and 0 equal True and False."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """A prompt and its completions: all texts, or all messages."""

    prompt: Messages | str
    completions: tuple[Messages | str, ...]
    scores: tuple[float, ...]
    """Higher is better; of a single completion, 1 if it is desirable and -1 if not."""
    names: tuple[str, ...]
    """Field of each completion, for messages."""
    strengths: tuple[float, ...] | None = None
    """Scores whose differences measure how strong a preference is; None if the record has an order only."""
    left_out: tuple[Unusable, ...] = ()
    """The completions of a ranked list that cannot be used."""

    @property
    def unpaired(self) -> bool:
        """True for a single completion."""
        return len(self.completions) == 1


def read_candidates(fields: Fields) -> Candidates:
    """The prompt, completions and scores of a record in any layout.

    Raises:
        Unusable: no layout fits, or a field cannot be used.
    """
    chosen, rejected = fields.first_of(*_CHOSEN), fields.first_of(*_REJECTED)
    if chosen and rejected:
        return _labeled(fields, chosen, rejected)
    if verdict := verdict_of(fields):
        return _judged(fields, verdict)
    if name := fields.first_of(*_LISTS):
        return _ranked(fields, name)
    if label := fields.first_of(*_LABELS):
        return _unpaired(fields, label)
    missing_field(fields.record, "rejected" if chosen else "chosen", LAYOUTS_ACCEPTED)


def read_prompt(fields: Fields) -> Messages | str:
    """The prompt of a record in any layout, with or without completions.

    ``messages`` and ``conversations`` that end with an assistant turn end with the answer: the assistant and tool turns
    after the last other one. An assistant turn at the end of ``prompt`` is the beginning of an answer, which the
    completion continues.

    Raises:
        Unusable: the record has no prompt.
    """
    name = _prompt_field(fields)
    completion = fields.first_of(*_CHOSEN) if fields.first_of(*_REJECTED) else None
    if not completion and (verdict := verdict_of(fields)):
        completion = verdict.first
    if completion and (not name or not _filled(fields, name) or not isinstance(fields.conversation(completion), str)):
        return read_candidates(fields).prompt
    if name is None:
        missing_field(fields.record, "prompt", f"accepted are {', '.join(PROMPT)}, and the prompt of a pair")
    prompt = _prompt(fields)
    if isinstance(prompt, tuple):
        if name in ("messages", "conversations") and prompt[-1]["role"] == "assistant":
            prompt = prompt[: _start_of_answer(prompt)]
            fields.forget(name)  # with its answer, it is carried along
        if all(message["role"] == "assistant" for message in prompt):
            bad_field(name, "an answer only", "a conversation with another turn before it")
    return prompt


def read_answer(fields: Fields) -> Candidates:
    """The prompt of a record and its answer: the best of its completions, or the text or turns that follow the prompt.

    Raises:
        Unusable: the record has no prompt or no answer.
    """
    if (fields.first_of(*_CHOSEN) and fields.first_of(*_REJECTED)) or verdict_of(fields) or fields.first_of(*_LISTS):
        candidates = read_candidates(fields)
        best = max(range(len(candidates.scores)), key=candidates.scores.__getitem__)
        return Candidates(
            candidates.prompt,
            (candidates.completions[best],),
            (1.0,),
            (candidates.names[best],),
            left_out=candidates.left_out,
        )
    prompt, name = read_prompt(fields), _prompt_field(fields)
    assert name is not None
    conversation = fields.conversation(name) if name in ("messages", "conversations") else ()
    if isinstance(prompt, tuple) and isinstance(conversation, tuple) and (turns := conversation[len(prompt) :]):
        return Candidates(prompt, (turns,), (1.0,), (name,))
    answer = fields.first_of(*_CHOSEN, *_ANSWERS)
    if answer is None:
        missing_field(fields.record, _ANSWERS[0], f"accepted are {', '.join(_ANSWERS)}, and the layouts of pairs")
    return Candidates(prompt, (fields.conversation(answer),), (1.0,), (answer,))


def _start_of_answer(turns: Messages) -> int:
    """Number of turns before the assistant and tool turns at the end."""
    return max((i + 1 for i, turn in enumerate(turns) if turn["role"] not in ("assistant", "tool")), default=0)


# ------------------------------------------------------------------------------------------------------------- prompts


def _prompt_field(fields: Fields) -> str | None:
    """The field of the prompt: the first one that is not empty."""
    return next((name for name in PROMPT if _filled(fields, name)), fields.first_of(*PROMPT))


def _has_prompt(fields: Fields, *completions: Messages | str) -> bool:
    """True if a field holds the prompt; beside whole conversations, an empty one is none."""
    name, (first, *_) = _prompt_field(fields), completions
    if name == "messages" and fields.first_of(*_CHOSEN) and not is_answer(first):
        return False  # of the chosen conversation
    whole = transcript_turns(first) if isinstance(first, str) else not is_answer(first)
    return name is not None and (_filled(fields, name) or not whole)


def _prompt(fields: Fields) -> Messages | str:
    """The prompt field, with ``system``, ``input`` and ``history`` where a record has them."""
    name = _prompt_field(fields)
    assert name is not None
    value = fields.openai_input() if name == "input" else None
    prompt = fields.conversation(name) if value is None else _openai_messages(fields, value)
    if isinstance(prompt, str):
        if name == "instruction" and _filled(fields, "input"):
            prompt = f"{prompt}\n{fields.text('input')}"
        earlier = _history(fields) if name != "history" else ()
        if earlier:
            prompt = (*earlier, turn("user", prompt))
    return prompt


def _filled(fields: Fields, name: str) -> bool:
    value = fields.record.get(name)
    return bool(value.strip() if isinstance(value, str) else value)


def _pair_prompt(fields: Fields) -> Messages | str:
    """The prompt field of a record with completions."""
    prompt, name = _prompt(fields), _prompt_field(fields)
    if isinstance(prompt, tuple) and prompt[-1]["role"] == "assistant" and name != "prompt":
        bad_field(
            f"{name}", "an assistant turn at the end, beside completions", "a conversation that ends with another turn"
        )
    return prompt


def _openai_messages(fields: Fields, value: Mapping[str, Any]) -> Messages | str:
    fields.read("input")
    fields.skip_other_keys("input", value, ("messages", "tools"))
    fields.input_tools = value.get("tools")
    return fields.conversation("input.messages", value.get("messages") or [])


def _history(fields: Fields) -> Messages:
    """Earlier exchanges of Alpaca-style records: a list of [question, answer]."""
    if not isinstance(fields.record.get("history"), list):
        return ()
    exchanges = fields.read("history")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in exchanges):
        bad_field("history", show(exchanges), "a list of [question, answer]")
    return tuple(
        turn(role, text(f"history[{i}][{j}]", pair[j]))
        for i, pair in enumerate(exchanges)
        for j, role in enumerate(("user", "assistant"))
    )


# ----------------------------------------------------------------------------------------------- chosen and rejected


def _two_completions(fields: Fields, names: Sequence[str]) -> Sequence[Messages | str]:
    completions = [fields.conversation(name) for name in names]
    if len({isinstance(completion, str) for completion in completions}) > 1:
        bad_field(" and ".join(names), "text and messages", "two texts or two lists of messages")
    return completions


def _labeled(fields: Fields, *names: str) -> Candidates:
    """Layouts with a chosen and a rejected completion."""
    chosen, rejected = _two_completions(fields, names)
    if not _has_prompt(fields, chosen, rejected):
        prompt, chosen, rejected = split_conversations(fields, names, chosen, rejected)
    else:
        prompt = _pair_prompt(fields)
        if not isinstance(prompt, str) or not isinstance(chosen, str):
            prompt, chosen, rejected = split_after(names, prompt_turns(prompt), as_turns(chosen), as_turns(rejected))
    return Candidates(prompt, (chosen, rejected), (1, 0), names, _pair_strengths(fields))


def _pair_strengths(fields: Fields) -> tuple[float, float] | None:
    """The scores of a chosen and a rejected completion, which may contradict the labels."""
    for names in _PAIR_SCORES:
        if all(map(fields.has, names)):
            chosen, rejected = (finite_number(fields.record[name]) for name in names)
            if chosen is not None and rejected is not None:
                for name in names:
                    fields.read(name)
                return chosen, rejected
    return None


# ------------------------------------------------------------------------------------------- verdicts and ranked lists


def _judged(fields: Fields, verdict: Verdict) -> Candidates:
    """Two completions and a verdict on them."""
    better = verdict.second_is_better(fields.read(verdict.field))
    if better is None:
        raise Unusable("bad_score", f"{verdict.field}: found {show(fields.record[verdict.field])}")
    names = (verdict.first, verdict.second)
    first, second = _two_completions(fields, names)
    if _has_prompt(fields, first, second):
        prompt = _pair_prompt(fields)
        if not all(isinstance(part, str) for part in (prompt, first, second)):
            prompt, first, second = split_after(names, prompt_turns(prompt), as_turns(first), as_turns(second))
    else:
        prompt, first, second = split_conversations(fields, names, first, second)
    scores = (-better / 2, better / 2)
    return Candidates(prompt, (first, second), scores, names, scores if verdict.graded else None)


def _ranked(fields: Fields, name: str) -> Candidates:
    """A list of completions of one prompt, with scores or ranks in the items or in a field of their own."""
    items = fields.read(name)
    if not fields.first_of(*PROMPT):
        missing_field(fields.record, "prompt", LAYOUTS_ACCEPTED)
    prompt = _pair_prompt(fields)
    if not isinstance(items, list) or len(items) < 2:
        bad_field(name, show(items), "a list of two or more")
    usable: list[tuple[str, float, Messages | str]] = []
    problems: list[Unusable] = []
    key, scores = _scores(fields, name, items)
    for i, (item, score) in enumerate(zip(items, scores, strict=True)):
        try:
            if (number := finite_number(score)) is None:
                raise Unusable("bad_score", f"{name}[{i}]: found score {show(score)}; accepted: a finite number")
            completion = _completion(fields, f"{name}[{i}]", _without(key, item))
            validate_completion(f"{name}[{i}]", completion, prompt)
            placeholder_notes((), [(f"{name}[{i}]", completion)])
            usable.append((f"{name}[{i}]", number, completion))
        except Unusable as problem:
            problems.append(problem)
    if len(usable) < 2:
        raise problems[0]
    names, scores, completions = zip(*usable, strict=True)
    if not isinstance(prompt, str) or not all(isinstance(completion, str) for completion in completions):
        prompt, *completions = split_after(names, prompt_turns(prompt), *map(as_turns, completions))
    return Candidates(prompt, tuple(completions), scores, names, scores, tuple(problems))


def _unpaired(fields: Fields, label: str) -> Candidates:
    """One completion and a label; the completion may be the last turns of the conversation."""
    value = fields.read(label)
    key = value.strip().lower() if isinstance(value, str) else value
    key = key if (number := finite_number(key)) is None else number
    desirable = _DESIRABLE.get(key) if isinstance(key, str | int | float) else None
    if desirable is None:
        bad_field(label, show(value), "true, false, 1, 0, -1, desirable or undesirable")
    scores = (1 if desirable else -1,)
    if name := fields.first_of("completion", "response", "answer", "output"):
        if not fields.first_of(*PROMPT):
            missing_field(fields.record, "prompt", LAYOUTS_ACCEPTED)
        prompt, completion = _pair_prompt(fields), fields.conversation(name)
        if not isinstance(prompt, str) or not isinstance(completion, str):
            prompt, completion = split_after((name,), prompt_turns(prompt), as_turns(completion))
        return Candidates(prompt, (completion,), scores, (name,))
    name = fields.first_of("messages", "conversations")
    turns = fields.conversation(name) if name else ""
    if isinstance(turns, str):
        missing_field(fields.record, "completion", LAYOUTS_ACCEPTED)
    start = _start_of_answer(turns)
    if not 0 < start < len(turns):
        bad_field(str(name), "no answer at the end", "a conversation that ends with an assistant turn")
    return Candidates(turns[:start], (turns[start:],), scores, (str(name),))


def _scores(fields: Fields, name: str, items: Sequence[Any]) -> tuple[str | None, tuple[Any, ...]]:
    """The key of the items that holds their scores, None for a column; and the scores, higher is better."""
    if column := next((name for name in _SCORES if isinstance(fields.record.get(name), list)), None):
        scores = fields.read(column)
        if len(scores) != len(items):
            raise Unusable("bad_score", f"{column}: found {show(scores)} for {len(items)} completions")
        key = column
    else:
        keys = [
            key for key in _ITEM_SCORES if any(isinstance(item, dict) and item.get(key) is not None for item in items)
        ]
        if not keys:
            raise Unusable(
                "bad_score",
                f"{name}: no scores; accepted are a field {' or '.join(_SCORES[::2])}, or {', '.join(_ITEM_SCORES)} "
                "in every completion",
            )
        key = keys[0]
        scores = [item.get(key) if isinstance(item, dict) else None for item in items]
    sign = -1 if key in _LOWER_IS_BETTER else 1
    signed = tuple(score if (number := finite_number(score)) is None else sign * number for score in scores)
    return None if column else key, signed


def _without(key: str | None, item: Any) -> Any:
    return {name: value for name, value in item.items() if name != key} if isinstance(item, dict) else item


def _completion(fields: Fields, name: str, item: Any) -> Messages | str:
    if not isinstance(item, dict):
        return fields.conversation(name, item)
    if item.get("role") is not None or item.get("from") is not None:
        return fields.conversation(name, item)
    key = next((key for key in _TEXTS if item.get(key) is not None), None)
    if key is None:
        missing_field(item, f"{name}.content", f"accepted are {', '.join(_TEXTS)}")
    fields.skip_other_keys(name, item, (key,))
    return fields.conversation(name, item[key])
