"""Conversations completed by the engines of a run, for a judge in another process than the collector."""

import asyncio
import random
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from dpo_ray.config import Config
from dpo_ray.config.rounds import SamplingConfig
from dpo_ray.data.records import Problem, PromptRecord
from dpo_ray.data.tokenize import RecordTokenizer, load_record_tokenizer
from dpo_ray.rollout.dispatch import Dispatcher
from dpo_ray.rollout.engine import UNPUSHED, Request
from dpo_ray.types import Messages, Prompt


class EngineCompletions:
    """See ``JudgeContext.complete``. Tokenizer and membership are loaded when they are first needed.

    Args:
        fleet: handle of the FleetActor.
    """

    def __init__(self, config: Config, fleet: Any) -> None:
        self._config, self._fleet = config, fleet
        self._tokenizer = cache(partial(load_record_tokenizer, config))
        self._ready: asyncio.Future[tuple[RecordTokenizer, Dispatcher]] | None = None
        self._following: asyncio.Task[None] | None = None

    async def complete(self, messages: Messages, sampling: SamplingConfig) -> str:
        """The text of one completion by whichever policy version the engines serve."""
        if self._ready is None:
            self._ready = asyncio.ensure_future(self._start())
        tokenizer, engines = await asyncio.shield(self._ready)
        online = self._config.online
        assert online is not None
        rendered = tokenizer.prompt(PromptRecord(messages, "the judge's prompt", 0))
        if isinstance(rendered, Problem):
            raise ValueError(f"the judge's prompt cannot be completed: {rendered.detail}")
        whole = self._config.max_model_len
        longest = whole - sampling.max_tokens
        if (length := len(rendered.token_ids)) > longest:
            raise ValueError(
                f"the judge's prompt has {length} tokens; an engine of {whole} tokens takes at most {longest} beside "
                f"{sampling.max_tokens} new ones; raise online.engine.max_model_len"
            )
        prompt = Prompt(-1, messages, rendered.token_ids)
        request = Request(prompt, sampling, 1, random.getrandbits(31), online.generate_timeout_s)
        group = await engines.generate(request, oldest=UNPUSHED)
        return group.completions[0].text

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer().decode(token_ids)

    async def _start(self) -> tuple[RecordTokenizer, Dispatcher]:
        engines = Dispatcher(self._fleet.membership.remote, self._fleet.suspect.remote)
        self._following = asyncio.ensure_future(engines.follow())
        tokenizer = await asyncio.to_thread(self._tokenizer)
        # Without the limit on training prompts.
        unlimited = self._config.data.model_copy(update={"max_prompt_tokens": None})
        return RecordTokenizer(tokenizer.tokenizer, unlimited), engines
