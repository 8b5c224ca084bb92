"""Preference pairs and prompts of records, as text.

Invalid records are returned as a ``Problem`` with reason and location. Independent of file formats and tokenization.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_ray.config.losses import Examples
from dpo_ray.data.fields import Fields, bad_field, validate_texts
from dpo_ray.data.formats import Part, Unusable, show
from dpo_ray.data.layouts import PROMPT, Candidates, read_answer, read_candidates, read_prompt
from dpo_ray.data.placeholders import placeholder_notes
from dpo_ray.data.sources import check_sources, expand_source, read_rows
from dpo_ray.data.turns import prompt_turns, validate_completion
from dpo_ray.types import Messages, finite_or_none

Tools = tuple[Mapping[str, Any], ...]
"""JSON schemas of the functions that a model may call."""
Notes = tuple[tuple[str, str], ...]
"""Reason and detail of each note on a kept record, counted in the data report."""


@dataclass(frozen=True, slots=True)
class PairRecord:
    """A preference pair as text: all three parts are strings, or all three are messages."""

    prompt: Messages | str
    chosen: Messages | str
    rejected: Messages | str
    source: str
    number: int
    """Line of a JSONL file, otherwise position in the source; from 1."""
    tools: Tools = ()
    system: Messages = ()
    """The system turn of a prompt that is a string; otherwise it is part of the prompt."""
    unread: tuple[str, ...] = ()
    """Names of fields that the pair does not depend on."""
    completions: tuple[int, int] = (0, 1)
    """Numbers of chosen and rejected among the record's completions."""
    unpaired: int = 0
    """0 for a pair; 1 for a desirable completion without a pair and -1 for an undesirable one, which is both chosen and
    rejected."""
    names: tuple[str, str] = ("chosen", "rejected")
    """Fields of chosen and rejected."""
    left_out: tuple["Problem", ...] = ()
    """Completions of the record that cannot be used."""
    gap: float | None = None
    """Score of chosen minus score of rejected; None if the record has no scores."""
    notes: Notes = ()


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt to generate completions for."""

    prompt: Messages | str
    source: str
    number: int
    tools: Tools = ()
    system: Messages = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of the record, for judges and selectors."""
    unread: tuple[str, ...] = ()
    """Keys inside the fields of prompt and answer that are not used, as ``prompt[].KEY``."""
    notes: Notes = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """An invalid record and the reason."""

    reason: str
    """Key of the data report: not_json, not_a_record, missing_field, empty_field, bad_field, ..."""
    source: str
    number: int
    detail: str
    """The field and its content."""


def read_pairs(
    parts: Sequence[Part], *, pairs_per_prompt: int = 1, examples: Examples = "pairs"
) -> Iterator[PairRecord | Problem]:
    """Yield the preference pairs or a problem per record of ``parts``, in order.

    Args:
        examples: ``lists`` yields the completions of ranked lists, best first, each as chosen and as rejected;
            ``unpaired`` completions without a pair, a pair as two of them. Records of one completion are problems
            otherwise.
        pairs_per_prompt: largest number of pairs of a ranked list; the pairs with the largest difference of scores.

    Raises:
        Unreadable: a source is missing (raised at once), or cannot be read.
    """

    def build(fields: Fields, source: str, number: int) -> Iterator[PairRecord]:
        candidates = read_candidates(fields)
        completions = [*zip(candidates.names, candidates.completions, strict=True)]
        for name, completion in completions:
            validate_completion(name, completion, candidates.prompt)
        tools, (prompt, system) = fields.tools(), _with_system(fields, candidates.prompt)
        left_out, notes = _left_out(candidates, source, number), placeholder_notes(candidates.prompt, completions)
        parts = list(_examples(candidates, examples, pairs_per_prompt))
        if len({i for part in parts for i in part[:2]}) < len(candidates.completions):
            fields.skip_key(f"{candidates.names[0].partition('[')[0]}[] in no pair")
        for i, j, label in parts:
            chosen, rejected = candidates.completions[i], candidates.completions[j]
            # Beside a completion without a pair stands none of this record.
            numbers, names = (2 * i, 2 * i + 1) if label else (i, j), (candidates.names[i], candidates.names[j])
            yield PairRecord(
                prompt,
                chosen,
                rejected,
                source,
                number,
                tools,
                system,
                fields.unread(),
                numbers,
                label,
                names,
                left_out,
                _gap(candidates, i, j),
                notes,
            )

    check_sources(parts)
    return _read(parts, build)


def read_prompts(sources: Sequence[str]) -> Iterator[PromptRecord | Problem]:
    """Yield a prompt or a problem per record of ``sources``, in order.

    Raises:
        Unreadable: a source is missing (raised at once), or cannot be read.
    """

    def build(fields: Fields, source: str, number: int) -> Iterator[PromptRecord]:
        yield _prompt_record(fields, read_prompt(fields), source, number)

    return _read([Part(file) for source in sources for file in expand_source(source)], build)


def read_answers(sources: Sequence[str]) -> Iterator[tuple[PromptRecord, PairRecord] | Problem]:
    """Yield per record of ``sources`` its prompt, and the prompt with its answer, or a problem, in order.

    Raises:
        Unreadable: a source is missing (raised at once), or cannot be read.
    """

    def build(fields: Fields, source: str, number: int) -> Iterator[tuple[PromptRecord, PairRecord]]:
        candidates = read_answer(fields)
        (answer,), (name,) = candidates.completions, candidates.names
        validate_completion(name, answer, candidates.prompt)
        record = _prompt_record(fields, candidates.prompt, source, number, answer=name)
        yield (
            record,
            PairRecord(
                record.prompt,
                answer,
                answer,
                source,
                number,
                record.tools,
                record.system,
                unpaired=1,
                names=(name, name),
                left_out=_left_out(candidates, source, number),
                notes=placeholder_notes((), [(name, answer)]),
            ),
        )

    return _read([Part(file) for source in sources for file in expand_source(source)], build)


def _read(parts: Sequence[Part], build: Callable[[Fields, str, int], Iterator[Any]]) -> Iterator[Any]:
    for part in parts:
        for number, row in read_rows(part):
            try:
                if isinstance(row, Unusable):
                    raise row
                if not isinstance(row, dict):
                    raise Unusable("not_a_record", f"found {show(row)}; accepted is an object of fields")
                yield from build(Fields(row), part.source, number)
            except Unusable as problem:
                yield Problem(problem.reason, part.source, number, problem.detail)


def _prompt_record(
    fields: Fields, prompt: Messages | str, source: str, number: int, answer: str | None = None
) -> PromptRecord:
    """The prompt of a record, with the fields that neither it nor the answer was built from.

    Args:
        answer: field of the answer.
    """
    notes, (prompt, system), tools = placeholder_notes(prompt), _with_system(fields, prompt), fields.tools()
    used = {answer, *(fields.read_names & {*PROMPT, "system", "system_prompt", "tools"})}
    others = {name: value for name, value in fields.record.items() if name not in used and value is not None}
    unreadable: dict[str, str] = {}
    for name, value in others.items():
        try:
            if isinstance(value, Unusable):
                raise Unusable(value.reason, f"{name}: {value.detail}")
            validate_texts(name, value)
        except Unusable as problem:
            unreadable[name] = problem.detail
    if unreadable:
        notes = (*notes, ("unreadable_cell", ", ".join(unreadable.values())))
    carried = {name: finite_or_none(value) for name, value in others.items() if name not in unreadable}
    return PromptRecord(prompt, source, number, tools, system, carried, fields.unread_keys(), notes)


def _left_out(candidates: Candidates, source: str, number: int) -> tuple[Problem, ...]:
    return tuple(Problem(problem.reason, source, number, problem.detail) for problem in candidates.left_out)


def _with_system(fields: Fields, prompt: Messages | str) -> tuple[Messages | str, Messages]:
    """The prompt with the column ``system`` as its first turn; a string and the turn."""
    system = fields.system()
    if not system or (first := prompt_turns(prompt)[0]) == system[0]:
        return prompt, ()
    if first["role"] in ("system", "developer"):
        bad_field("system", f"{show(system[0]['content'])} beside a system turn in the conversation", "one of the two")
    return (prompt, system) if isinstance(prompt, str) else ((*system, *prompt), ())


def _examples(candidates: Candidates, examples: Examples, count: int) -> Iterator[tuple[int, int, int]]:
    """Numbers of the chosen and the rejected completion of each example, and its ``PairRecord.unpaired``."""
    unpaired = examples.startswith("unpaired")
    if candidates.unpaired:
        if not unpaired:
            raise Unusable("unpaired", "one completion and a label, for loss.use: kto or bco; other losses take pairs")
        yield 0, 0, int(candidates.scores[0])
        return
    if examples == "lists":
        yield from ((i, i, 0) for i in _ranking(candidates))
        return
    pairs = _pairs(candidates, count)
    if unpaired:
        labels: dict[int, int] = {}
        for better, worse in pairs:
            labels.setdefault(better, 1)
            labels.setdefault(worse, -1)
        yield from ((i, i, label) for i, label in labels.items())
    else:
        yield from ((i, j, 0) for i, j in pairs)


def _gap(candidates: Candidates, chosen: int, rejected: int) -> float | None:
    strengths = candidates.strengths
    return None if strengths is None else strengths[chosen] - strengths[rejected]


def _pairs(candidates: Candidates, count: int) -> Sequence[tuple[int, int]]:
    """Up to ``count`` pairs of different completions, by decreasing difference of scores: best against worst first.

    Returns:
        Numbers of the better and the worse completion of each pair.
    """
    completions, scores = candidates.completions, candidates.scores
    better = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]
    if not better:
        raise Unusable("tie", f"all {len(scores)} completions score {scores[0]:g}")
    different = [(i, j) for i, j in better if completions[i] != completions[j]]
    if not different:
        i, j = better[0]
        names = [candidates.names[k] for k in (i, j)]
        raise Unusable("identical", f"{' and '.join(names)} are both {show(_last_text(completions[i]))}")
    return sorted(different, key=lambda pair: scores[pair[1]] - scores[pair[0]])[:count]


def _ranking(candidates: Candidates) -> Sequence[int]:
    """The completions by decreasing score, at least two; of equal scores and of equal completions only the first."""
    best, worst = _pairs(candidates, 1)[0]  # of equal ones, those that differ
    order = sorted(range(len(candidates.scores)), key=lambda i: -candidates.scores[i])
    first_of_score = {candidates.scores[i]: i for i in reversed([best, worst, *order])}
    different: list[int] = []
    for i in sorted(first_of_score.values(), key=lambda i: -candidates.scores[i]):
        if all(candidates.completions[i] != candidates.completions[j] for j in different):
            different.append(i)
    return different


def _last_text(completion: Messages | str) -> str | None:
    return completion if isinstance(completion, str) else completion[-1]["content"]
