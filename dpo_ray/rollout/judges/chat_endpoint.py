"""A language model behind an OpenAI-compatible endpoint, through the ``openai`` client, which also retries."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from dpo_ray.rollout.judges.answer_cache import Reply
from dpo_ray.rollout.judges.arguments import key_of
from dpo_ray.rollout.judges.failures import REJECTED, FailuresInARow, masked
from dpo_ray.rollout.judges.language_model_args import LlmArgs
from dpo_ray.rollout.judges.modes import Schema

logger = logging.getLogger(__name__)

NO_KEY = "none"
"""Sent to an endpoint of one's own without a key; the client requires one."""
FORMAT_REJECTED = (400, 422)
"""Statuses of endpoints that do not support ``response_format``."""
LONGEST_MESSAGE = 500
"""Characters of an error message."""


class EndpointFailed(RuntimeError):
    """A request failed after all retries, or was rejected."""


class ChatEndpoint:
    """A ``JudgeModel``.

    Raises:
        ValueError: the package openai is not installed, OpenAI's own endpoint lacks a key, or no header can have it.
    """

    def __init__(self, args: LlmArgs) -> None:
        try:
            import openai
        except ImportError:
            raise ValueError(
                "judge 'llm' needs the package openai, which is not installed; "
                "install the extra llm (pip install 'dpo-ray[llm]')"
            ) from None
        self._key = key_of("llm", args.api_key_env)
        if not self._key and args.base_url is None and not os.environ.get("OPENAI_BASE_URL"):
            raise ValueError(
                f"judge 'llm': the environment variable {args.api_key_env} (online.judge.args.api_key_env) is not set "
                "where judges run; set it on the cluster's nodes, or give online.judge.args.base_url"
            )
        _silence_transport()
        self._args, self._openai = args, openai
        self._client = openai.AsyncOpenAI(
            api_key=self._key or NO_KEY, base_url=args.base_url, timeout=args.timeout_s, max_retries=args.retries
        )
        self._url = masked(str(self._client.base_url.copy_with(userinfo=b"")), self._key)
        """Also if OPENAI_BASE_URL names it; without a user name, password or key."""
        self._formats = args.response_format != "none"
        """False once the endpoint has rejected ``response_format``."""
        self._failures = FailuresInARow(args.max_failures, attempts=args.retries + 1)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Address, model, sampling parameters and the kind of ``response_format``."""
        fields = {"base_url": self._url, "model": self._args.model, "response_format": self._args.response_format}
        return fields | self._sampling()

    def _sampling(self) -> dict[str, Any]:
        fields = {"temperature": self._args.temperature, "max_tokens": self._args.max_tokens}
        return {name: value for name, value in fields.items() if value is not None} | self._args.request

    async def reply(self, text: str, schema: Schema) -> Reply:
        """See ``JudgeModel``; without ``response_format`` if the endpoint rejects it.

        Raises:
            EndpointFailed: see there.
            JudgeUnavailable: ``max_failures`` requests have failed in a row.
        """
        try:
            reply = await self._reply(text, schema)
        except (self._openai.OpenAIError, EndpointFailed) as error:
            rejected = getattr(error, "status_code", None) in REJECTED
            failed = error if isinstance(error, EndpointFailed) else EndpointFailed(self._described(error))
        else:
            self._failures.reset()
            return reply
        if rejected:
            self._failures.reset()
        else:
            self._failures.count(f"judge 'llm': {self._url}", failed)
        raise failed

    async def close(self) -> None:
        await self._client.close()

    async def _reply(self, text: str, schema: Schema) -> Reply:
        if not self._formats:
            return await self._complete(text, {})
        try:
            return await self._complete(text, {"response_format": self._response_format(schema)})
        except self._openai.APIStatusError as error:
            if error.status_code not in FORMAT_REJECTED:
                raise
            rejection = self._described(error)
        reply = await self._complete(text, {})
        if self._formats:
            self._formats = False
            logger.warning("replies are parsed as text, because the endpoint rejects response_format: %s", rejection)
        return reply

    def _response_format(self, schema: Schema) -> dict[str, Any]:
        if self._args.response_format == "json_object":
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}

    async def _complete(self, text: str, fields: Mapping[str, Any]) -> Reply:
        response: Any = await self._client.chat.completions.create(
            model=self._args.model,
            messages=[{"role": "user", "content": text}],
            extra_body={**self._sampling(), **fields},
        )
        if not getattr(response, "choices", None):
            raise EndpointFailed(self._hidden(f"{self._url} answered without choices: {response!r}"))
        usage = response.usage
        return Reply(
            text=response.choices[0].message.content or "",
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
        )

    def _described(self, error: Exception) -> str:
        """An error of the client, whose own class cannot be pickled, without secrets."""
        status = getattr(error, "status_code", None)
        cause = f" ({error.__cause__})" if status is None and error.__cause__ else ""
        answered = f"answered {status}" if status else "did not answer"
        return self._hidden(f"{self._url} {answered}: {error}{cause}")

    def _hidden(self, message: str) -> str:
        """A message of one line without the key."""
        return masked(" ".join(message.split()), self._key)[:LONGEST_MESSAGE]


def _silence_transport() -> None:
    """The HTTP libraries log each request with its URL, which may contain a key."""
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
