"""Training examples and prompts of sources: records read, tokenised and put together, in order.

An example is a pair, or a completion without a pair beside one of another record.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from dpo_ray.data.formats import Part
from dpo_ray.data.records import PairRecord, Problem, PromptRecord, read_pairs, read_prompts
from dpo_ray.data.tokenize import RecordTokenizer, TokenizedPair, TokenizedPrompt

Item = tuple[PairRecord, TokenizedPair] | Problem


def tokenize_pairs(parts: Sequence[Part], tokenizer: RecordTokenizer) -> Iterator[Item]:
    """Read and tokenise the pairs of ``parts``, in order; a problem per record that is dropped.

    For losses of completions without a pair, a pair is two of them. The place of the other completion is empty, or has
    a completion of another record.
    """
    items = _with_one_prompt(_tokenized(parts, tokenizer), tokenizer.data.max_completion_tokens)
    match tokenizer.examples:
        case "unpaired":
            items = (item if isinstance(item, Problem) else _beside(item, ()) for item in items)
        case "unpaired_kl":
            items = _beside_others(items, tokenizer.limits.positions)
    return items


def _tokenized(parts: Sequence[Part], tokenizer: RecordTokenizer) -> Iterator[Item]:
    count = tokenizer.data.pairs_per_prompt
    for record in read_pairs(parts, pairs_per_prompt=count, examples=tokenizer.examples):
        if isinstance(record, Problem):
            yield record
        else:
            tokenized = tokenizer.pair(record)
            yield tokenized if isinstance(tokenized, Problem) else (record, tokenized)


def _with_one_prompt(items: Iterator[Item], limit: int | None) -> Iterator[Item]:
    """The pairs of each record with the same prompt: the tokens that come before all of its completions.

    Args:
        limit: ``data.max_completion_tokens``; the other tokens of a longer prompt become part of the completions.
    """

    def record_of(item: Item) -> tuple[str, int]:
        origin = item if isinstance(item, Problem) else item[0]
        return origin.source, origin.number

    for _, of_record in groupby(items, key=record_of):
        of_record = list(of_record)
        start = min((len(item[1].pair.prompt) for item in of_record if not isinstance(item, Problem)), default=0)
        for item in of_record:
            yield item if isinstance(item, Problem) else (item[0], _starting_at(item[1], start, limit))


def _starting_at(result: TokenizedPair, start: int, limit: int | None) -> TokenizedPair:
    prompt, rest = result.pair.prompt[:start], result.pair.prompt[start:]
    if not rest:
        return result
    chosen, rejected = ((*rest, *ids)[:limit] for ids in (result.pair.chosen, result.pair.rejected))
    return replace(result, pair=replace(result.pair, prompt=prompt, chosen=chosen, rejected=rejected))


def _beside(item: tuple[PairRecord, TokenizedPair], other: tuple[int, ...]) -> tuple[PairRecord, TokenizedPair]:
    """A completion without a pair, with ``other`` in the place of its pair."""
    record, result = item
    desirable = record.unpaired > 0
    pair = replace(result.pair, rejected=other) if desirable else replace(result.pair, chosen=other)
    return record, replace(result, pair=pair)


def _beside_others(items: Iterator[Item], positions: int | None) -> Iterator[Item]:
    """Each completion without a pair beside one of the next record; those of the last record beside one of the first.

    The other completion is truncated to what fits ``positions`` after the prompt.
    """

    def beside(item: tuple[PairRecord, TokenizedPair], other: tuple[int, ...]) -> Item:
        room = None if positions is None else positions - len(item[1].pair.prompt)
        return _beside(item, other[:room])

    first: tuple[int, ...] | None = None
    held: list[tuple[PairRecord, TokenizedPair]] = []  # of one record
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


def tokenize_prompts(
    sources: Sequence[str], tokenizer: RecordTokenizer
) -> Iterator[tuple[PromptRecord, TokenizedPrompt] | Problem]:
    """Read and tokenise the prompts of ``sources``, in order; a problem per record that is dropped."""
    for record in read_prompts(sources):
        if isinstance(record, Problem):
            yield record
        else:
            tokenized = tokenizer.prompt(record)
            yield tokenized if isinstance(tokenized, Problem) else (record, tokenized)
