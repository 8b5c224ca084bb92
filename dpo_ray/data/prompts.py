"""Loading the prompts of online runs."""

from collections.abc import Sequence

import numpy as np

from dpo_ray.data.examples import tokenize_answers, tokenize_prompts
from dpo_ray.data.records import Problem
from dpo_ray.data.report import DataReport, DataReportBuilder
from dpo_ray.data.tokenize import RecordTokenizer
from dpo_ray.types import Prompt


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
