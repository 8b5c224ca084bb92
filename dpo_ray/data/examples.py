"""Training examples and prompts of sources: records read, tokenized and put together, in order.

An example is a pair, or a completion without a pair beside one of another record.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby, pairwise

import numpy as np

from dpo_ray.data.formats import Part
from dpo_ray.data.records import Notes, PairRecord, Problem, PromptRecord, read_answers, read_pairs, read_prompts
from dpo_ray.data.report import MEANINGS, DataReport, DataReportBuilder
from dpo_ray.data.tokenize import RecordTokenizer, TokenizedPair, TokenizedPrompt
from dpo_ray.types import Completion, Prompt, TokenPair

Kept = tuple[PairRecord, TokenizedPair]
Item = Kept | Problem


def tokenize_pairs(parts: Sequence[Part], tokenizer: RecordTokenizer) -> Iterator[Item]:
    """Read and tokenize the pairs of ``parts``, in order; a problem per record without any.

    For losses of completions without a pair, a pair is two of them. The place of the other completion is empty, or has
    a completion of another record.
    """
    records = read_pairs(parts, pairs_per_prompt=tokenizer.data.pairs_per_prompt, examples=tokenizer.examples)
    by_record = groupby(records, key=lambda record: (record.source, record.number))
    items = chain.from_iterable(_examples(list(of_record), tokenizer) for _, of_record in by_record)
    match tokenizer.examples:
        case "unpaired":
            items = (item if isinstance(item, Problem) else _beside(item, ()) for item in items)
        case "unpaired_kl":
            items = _beside_others(items, tokenizer.limits.positions)
    return items


def _examples(records: Sequence[PairRecord | Problem], tokenizer: RecordTokenizer) -> list[Kept] | list[Problem]:
    """The examples of a record, with the same prompt: the tokens that come before all of its completions.

    A problem if there is none; otherwise, the pairs and completions that cannot be used are notes on the first.
    """
    problems = [record for record in records if isinstance(record, Problem)]
    kept: list[Kept] = []
    for record in records:
        if isinstance(record, PairRecord):
            result = tokenizer.pair(record)
            if isinstance(result, TokenizedPair):
                kept.append((record, result))
            else:
                names = " and ".join(dict.fromkeys(record.names))
                problems.append(replace(result, detail=f"{names}: {result.detail}") if len(records) > 1 else result)
    kept = _with_one_prompt(kept, problems, tokenizer.data.max_completion_tokens)
    if tokenizer.examples == "lists":
        kept = _neighbors(kept, problems)
    if not kept:
        return problems[:1]
    first, result = kept[0]
    return [(first, replace(result, notes=(*result.notes, *_left_out(first, problems)))), *kept[1:]]


def _left_out(record: PairRecord, problems: Sequence[Problem] = ()) -> Iterator[tuple[str, str]]:
    """Notes on the completions of a record that cannot be used, and on other ``problems``."""
    return (("left_out", f"{MEANINGS[p.reason]}: {p.detail}") for p in (*record.left_out, *problems))


def _neighbors(ranking: Sequence[Kept], problems: list[Problem]) -> list[Kept]:
    """The pairs of neighbors in a ranking of completions; one with the tokens of a better one adds a problem."""
    different: dict[tuple[int, ...], Kept] = {}
    for record, result in ranking:
        better, _ = different.setdefault(_with_loss(result.pair.chosen), (record, result))
        if better is not record:
            detail = f"{better.names[0]} and {record.names[0]} have the same tokens with loss"
            problems.append(Problem("identical", record.source, record.number, detail))
    return [
        (
            replace(
                better,
                rejected=worse.chosen,
                completions=(better.completions[0], worse.completions[0]),
                names=(better.names[0], worse.names[0]),
            ),
            TokenizedPair(
                replace(one.pair, rejected=other.pair.chosen),
                tuple(dict.fromkeys((*one.notes, *other.notes))),
                (one.removed[0], other.removed[0]),
            ),
        )
        for (better, one), (worse, other) in pairwise(different.values())
    ]


def _with_one_prompt(kept: Sequence[Kept], problems: list[Problem], limit: int | None) -> list[Kept]:
    """The examples with the shortest of their prompts; the other tokens of longer ones become part of the completions.

    A pair whose completions are the same after that adds a problem.

    Args:
        limit: ``data.max_completion_tokens``.
    """
    start = min((len(result.pair.prompt) for _, result in kept), default=0)
    different: list[Kept] = []
    for record, result in kept:
        moved = _starting_at(result, start, limit)
        equal = moved is not result and record.chosen != record.rejected
        if equal and _with_loss(moved.pair.chosen) == _with_loss(moved.pair.rejected):
            detail = f"{' and '.join(record.names)}: data.max_completion_tokens is {limit}"
            problems.append(Problem("identical_after_truncation", record.source, record.number, detail))
        else:
            different.append((record, moved))
    return different


def _starting_at(result: TokenizedPair, start: int, limit: int | None) -> TokenizedPair:
    prompt, rest = result.pair.prompt[:start], result.pair.prompt[start:]
    if not rest:
        return result
    whole = [(*rest, *ids) for ids in (result.pair.chosen, result.pair.rejected)]
    chosen, rejected = (ids[:limit] for ids in whole)
    removed = result.removed[0] + len(whole[0]) - len(chosen), result.removed[1] + len(whole[1]) - len(rejected)
    notes = dict.fromkeys((*result.notes, *([("completion_cut", "")] if any(removed) else [])))
    return TokenizedPair(TokenPair(prompt, chosen, rejected, result.pair.unpaired), tuple(notes), removed)


def _with_loss(ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(token for token in ids if token >= 0)


def _beside(item: Kept, other: tuple[int, ...]) -> Kept:
    """A completion without a pair, with ``other`` in the place of its pair."""
    record, result = item
    desirable = record.unpaired > 0
    pair = replace(result.pair, rejected=other) if desirable else replace(result.pair, chosen=other)
    return record, replace(result, pair=pair)


def _beside_others(items: Iterator[Item], positions: int | None) -> Iterator[Item]:
    """Each completion without a pair beside one of the next record; those of the last record beside one of the first.

    The other completion is truncated to what fits ``positions`` after the prompt.
    """

    def beside(item: Kept, other: tuple[int, ...]) -> Item:
        room = None if positions is None else positions - len(item[1].pair.prompt)
        return _beside(item, other[:room])

    first: tuple[int, ...] | None = None
    held: list[Kept] = []  # of one record
    for item in items:
        if isinstance(item, Problem):
            yield item
            continue
        record, completion = item[0], item[1].pair.chosen
        first = completion if first is None else first
        if held and (held[0][0].source, held[0][0].number) != (record.source, record.number):
            yield from (beside(of_record, completion) for of_record in held)
            held = []
        held.append(item)
    if first is not None:
        yield from (beside(of_record, first) for of_record in held)


def load_prompts(
    sources: Sequence[str],
    tokenizer: RecordTokenizer,
    *,
    strict: bool,
    name: str = "online.prompts",
    answers: bool = False,
) -> tuple[list[Prompt], DataReport]:
    """The usable prompts of ``sources``, and counts of the records read, kept and dropped.

    Args:
        sources: files, saved datasets or hub datasets.
        tokenizer: of the policy, with the limits on prompts.
        strict: a dropped record is an error.
        name: configuration key, for messages.
        answers: with the records' own answers; a record without one is dropped.

    Raises:
        ValueError: a source cannot be read, no prompt is usable, or ``strict`` and a record was dropped.
    """
    prompts: list[Prompt] = []
    counts = DataReportBuilder()
    for item in tokenize_answers(sources, tokenizer) if answers else tokenize_prompts(sources, tokenizer):
        if isinstance(item, Problem):
            counts.drop(item)
            continue
        record, result, *answer = item
        counts.keep(record.source, record.number, result.notes, (*record.fields, *record.unread))
        text = record.prompt if isinstance(record.prompt, str) else None
        prompts.append(Prompt(len(prompts), result.messages, result.token_ids, record.fields, text, *answer))
    report = counts.build(np.array([len(prompt.token_ids) for prompt in prompts]).reshape(-1, 1))
    report.check(strict=strict, name=name, sources=sources)
    return prompts, report


def tokenize_prompts(
    sources: Sequence[str], tokenizer: RecordTokenizer
) -> Iterator[tuple[PromptRecord, TokenizedPrompt] | Problem]:
    """Read and tokenize the prompts of ``sources``, in order; a problem per record that is dropped."""
    for record in read_prompts(sources):
        if isinstance(record, Problem):
            yield record
        else:
            tokenized = tokenizer.prompt(record)
            yield tokenized if isinstance(tokenized, Problem) else (record, tokenized)


def tokenize_answers(
    sources: Sequence[str], tokenizer: RecordTokenizer
) -> Iterator[tuple[PromptRecord, TokenizedPrompt, Completion] | Problem]:
    """Read and tokenize the prompts of ``sources`` with their answers, in order; a problem per record that is dropped.

    A prompt has the tokens that come before its answer.
    """
    for item in read_answers(sources):
        if isinstance(item, Problem):
            yield item
            continue
        record, answered = item
        prompt, pair = tokenizer.prompt(record), tokenizer.pair(answered)
        if isinstance(prompt, Problem):
            yield prompt
            continue
        if isinstance(pair, Problem):
            yield pair
            continue
        answer = answered.chosen if isinstance(answered.chosen, str) else answered.chosen[-1]["content"]
        completion = Completion(answer or "", pair.pair.chosen, finished=not pair.removed[0], sampled=False)
        of_prompt = (note for note in prompt.notes if not _contains(pair.notes, note))
        notes = (*of_prompt, *pair.notes, *_left_out(answered))
        yield record, replace(prompt, token_ids=pair.pair.prompt, notes=notes), completion


def _contains(notes: Notes, note: tuple[str, str]) -> bool:
    """True if a note of the same reason has its details."""
    return any(reason == note[0] and note[1] in detail for reason, detail in notes)
