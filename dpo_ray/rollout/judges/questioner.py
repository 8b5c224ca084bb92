"""Judging by a language model: asks a mode's questions, once more where a reply has no verdict, and counts the cost.

Independent of how the model is reached, see ``JudgeModel``.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from dpo_ray.rollout.judges.answer_cache import AnswerCache, Reply, request_key
from dpo_ray.rollout.judges.calls import wait_for_all
from dpo_ray.rollout.judges.modes import Mode, Question, Schema
from dpo_ray.types import CompletionGroup, Judgement

T = TypeVar("T")


class JudgeModel(Protocol):
    """A language model that judges."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Model and sampling parameters: with the messages, all that a reply depends on. Without secrets."""
        ...

    async def reply(self, text: str, schema: Schema) -> Reply:
        """Answer one user message.

        Args:
            schema: JSON schema of the reply, for a model whose output can be constrained.
        """
        ...


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of tokens, in US dollars per million."""

    prompt: float
    completion: float

    def cost(self, reply: Reply) -> float:
        """Cost of a reply in US dollars."""
        return (self.prompt * (reply.prompt_tokens or 0) + self.completion * (reply.completion_tokens or 0)) / 1e6


class Questioner:
    """Judges groups one by one.

    Args:
        requests: number of requests in progress.
        prices: None counts no cost.
    """

    def __init__(
        self, mode: Mode, model: JudgeModel, cache: AnswerCache, *, requests: int, prices: Prices | None = None
    ) -> None:
        self._mode, self._model, self._cache, self._prices = mode, model, cache, prices
        self._slots = asyncio.Semaphore(requests)
        # A single thread, since the cache is not thread-safe: a slow disk delays replies, never the event loop.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="judge-cache")

    async def judge(self, group: CompletionGroup) -> Judgement:
        """Scores of a group, with metrics of the questions.

        Raises:
            Exception: the model could not answer a question. The answers to the others are in the cache by then.
        """
        await self._on_disk(self._cache.refresh, group.policy_version)
        totals: Counter[str] = Counter(dict.fromkeys(("requests", "cached", "parse_failures", "unparsed"), 0))
        questions = self._mode.questions(group)
        verdicts = await wait_for_all(self._verdict(question, group, totals) for question in questions)
        assessment = self._mode.assess(group, verdicts)
        return Judgement(assessment.scores, means=assessment.means, totals=dict(totals))

    async def _verdict(self, question: Question, group: CompletionGroup, totals: Counter[str]) -> float | None:
        reasoning = {"reasoning": {"type": "string"}}
        for text, properties in (
            (question.text, reasoning | self._mode.verdict),
            (question.text + self._mode.reminder, self._mode.verdict),
        ):
            reply = await self._reply(text, _object(properties), question.sample, group, totals)
            if (verdict := self._mode.parse(reply.text)) is not None:
                return verdict
            totals["parse_failures"] += 1
        totals["unparsed"] += 1
        return None

    async def _reply(
        self, text: str, schema: Schema, sample: int, group: CompletionGroup, totals: Counter[str]
    ) -> Reply:
        """The reply to a message, from the cache if it has one.

        Tokens count for the group that asked, also if the process died that asked for it.
        """
        key = request_key({"model": self._model.identity, "message": text, "schema": schema, "sample": sample})
        asker = f"{group.prompt.index} {group.seed}"
        if (cached := await self._on_disk(self._cache.get, group.policy_version, key)) is not None:
            reply, paid_by = cached
            totals["cached"] += 1
        else:
            async with self._slots:
                reply, paid_by = await self._model.reply(text, schema), asker
            await self._on_disk(self._cache.add, group.policy_version, key, reply, asker)
            totals["requests"] += 1
        if paid_by == asker:
            self._add_cost(reply, totals)
        return reply

    async def _on_disk(self, call: Callable[..., T], *args: Any) -> T:
        # A reply that has been paid for is stored also if the question is cancelled meanwhile.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._disk, call, *args))

    def _add_cost(self, reply: Reply, totals: Counter[str]) -> None:
        for name in ("prompt_tokens", "completion_tokens"):
            if (tokens := getattr(reply, name)) is not None:
                totals[name] += tokens
        if self._prices is not None:
            cost: Any = self._prices.cost(reply)  # a Counter is typed for integers
            totals["cost_usd"] += cost


def _object(properties: Mapping[str, Any]) -> Schema:
    """JSON schema of an object that has all of ``properties`` and no others."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
