"""Judges that are language models: ``llm`` behind an endpoint, and ``policy``, the run's own engines.

Both ask the same questions; only the model differs.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_ray.rollout.judges.answer_cache import CACHE, AnswerCache, Reply
from dpo_ray.rollout.judges.arguments import parse_args
from dpo_ray.rollout.judges.calls import Capacity, wait_for_all
from dpo_ray.rollout.judges.language_model_args import LlmArgs, PolicyArgs, QuestionArgs
from dpo_ray.rollout.judges.modes import Schema
from dpo_ray.rollout.judges.questioner import JudgeModel, Prices, Questioner
from dpo_ray.types import CompletionGroup, Judgement

if TYPE_CHECKING:
    from dpo_ray.rollout.judges import JudgeContext


class _LanguageModelJudge:
    """Judges groups with the answers of a language model."""

    def __init__(
        self, args: QuestionArgs, model: JudgeModel, context: "JudgeContext | None", prices: Prices | None = None
    ) -> None:
        cache = AnswerCache(context.run_dir / CACHE if context else None)
        self._questioner = Questioner(args.build_mode(), model, cache, requests=args.concurrency, prices=prices)
        self._args = args

    def request_capacity(self, completions: int) -> Capacity:
        """See ``capacity_of``."""
        per_group = map(self._args.requests_per_group, range(1, completions + 1))
        return Capacity(self._args.concurrency, tuple(per_group))

    async def __call__(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        return await wait_for_all(map(self._questioner.judge, groups))


class Llm(_LanguageModelJudge):
    """A model behind an OpenAI-compatible endpoint. Arguments: ``LlmArgs``.

    Raises:
        ValueError: an argument is not accepted, the package openai is not installed, or OpenAI's own endpoint lacks a
            key.
    """

    def __init__(self, *, context: "JudgeContext | None" = None, **args: Any) -> None:
        from dpo_ray.rollout.judges.chat_endpoint import ChatEndpoint

        parsed = parse_args("llm", LlmArgs, args)
        self._endpoint, prices = ChatEndpoint(parsed), parsed.usd_per_million
        super().__init__(parsed, self._endpoint, context, Prices(prices.prompt, prices.completion) if prices else None)

    async def close(self) -> None:
        await self._endpoint.close()

    @staticmethod
    def validate_arguments(**args: Any) -> None:
        parse_args("llm", LlmArgs, args)

    @staticmethod
    def longest_request_s(**args: Any) -> float:
        """Longest time in which a request is tried, without pauses."""
        parsed = parse_args("llm", LlmArgs, args)
        return (parsed.retries + 1) * parsed.timeout_s


class Policy(_LanguageModelJudge):
    """The policy judges its own completions, arXiv:2401.10020. Arguments: ``PolicyArgs``.

    Raises:
        ValueError: an argument is not accepted.
    """

    def __init__(self, *, context: "JudgeContext | None" = None, **args: Any) -> None:
        parsed = parse_args("policy", PolicyArgs, args)
        if context is None:
            raise ValueError("judge 'policy': needs the engines of a run; outside of one, use llm")
        super().__init__(parsed, _Engines(parsed, context), context)

    @staticmethod
    def validate_arguments(**args: Any) -> None:
        parse_args("policy", PolicyArgs, args)


class _Engines:
    """The run's engines as a ``JudgeModel``. Their output is not constrained to a schema."""

    def __init__(self, args: PolicyArgs, context: "JudgeContext") -> None:
        self._sampling, self._complete = args.sampling(), context.complete

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": "policy", "sampling": json.loads(self._sampling.model_dump_json())}

    async def reply(self, text: str, schema: Schema) -> Reply:
        return Reply(await self._complete(({"role": "user", "content": text},), self._sampling))
