"""Loading the prompts of online runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpo_ray.data.records import Problem, read_prompts
from dpo_ray.data.report import DataReport, DataReportBuilder
from dpo_ray.data.tokenize import ChatTemplateError, render_prompt
from dpo_ray.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_prompts(
    sources: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_tokens: int | None,
    max_engine_tokens: int,
    strict: bool,
    name: str = "online.prompts",
) -> tuple[list[Prompt], DataReport]:
    """The usable prompts of ``sources``, and counts of the records read, kept and dropped.

    Args:
        sources: files, saved datasets or hub datasets.
        max_prompt_tokens: ``data.max_prompt_tokens``; None is no limit.
        max_engine_tokens: longest prompt that leaves an engine room for a completion.

    Raises:
        ValueError: a source cannot be read, no prompt is usable, or ``strict`` and a record was dropped.
    """
    limit, limit_key = max_engine_tokens, "online.engine.max_model_len - online.sampling.max_tokens"
    if max_prompt_tokens is not None and max_prompt_tokens <= limit:
        limit, limit_key = max_prompt_tokens, "data.max_prompt_tokens"
    prompts: list[Prompt] = []
    lengths: list[int] = []
    counts = DataReportBuilder()
    for record in read_prompts(sources):
        if isinstance(record, Problem):
            counts.drop(record)
            continue
        try:
            tokens = len(render_prompt(record.messages, tokenizer))
        except ChatTemplateError as error:
            counts.drop(Problem("template_refused", record.source, record.number, str(error)))
            continue
        if tokens > limit:
            detail = f"{tokens} tokens; {limit_key} is {limit}"
            counts.drop(Problem("prompt_too_long", record.source, record.number, detail))
            continue
        counts.keep(record.source, record.number)
        prompts.append(Prompt(len(prompts), record.messages))
        lengths.append(tokens)
    report = counts.build(np.array(lengths).reshape(-1, 1))
    report.check(strict=strict, name=name, sources=sources)
    return prompts, report
