"""The prompts of an online run: read, checked against the chat template and the length limit."""

from collections.abc import Sequence

from dpo_ray.config.schema import Config
from dpo_ray.data.records import Problem, read_prompts
from dpo_ray.data.tokenize import ChatTemplateError, load_tokenizer, render_prompt
from dpo_ray.types import Prompt


def open_prompts(config: Config, sources: Sequence[str]) -> tuple[list[Prompt], list[Problem]]:
    """The usable prompts of ``sources`` and the reasons why the other records are dropped.

    Raises:
        ValueError: a source cannot be read.
    """
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    limit, limit_key = _token_limit(config)
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for record in read_prompts(sources):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        try:
            tokens = len(render_prompt(record.messages, tokenizer))
        except ChatTemplateError as error:
            problems.append(Problem("template_refused", record.source, record.number, str(error)))
            continue
        if tokens > limit:
            detail = f"{tokens} tokens; {limit_key} is {limit}"
            problems.append(Problem("prompt_too_long", record.source, record.number, detail))
        else:
            prompts.append(Prompt(len(prompts), record.messages))
    return prompts, problems


def _token_limit(config: Config) -> tuple[int, str]:
    """The longest usable prompt in tokens, and the keys that limit it."""
    assert config.online is not None
    limit, max_prompt_tokens = config.max_model_len - config.online.sampling.max_tokens, config.data.max_prompt_tokens
    if max_prompt_tokens is not None and max_prompt_tokens <= limit:
        return max_prompt_tokens, "data.max_prompt_tokens"
    return limit, "online.engine.max_model_len - online.sampling.max_tokens"
