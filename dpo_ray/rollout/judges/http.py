"""A judge by a reward server over HTTP: OpenRLHF's, vLLM's or SGLang's."""

import asyncio
import logging
import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from dpo_ray.config.secrets import holds_secret
from dpo_ray.rollout.judges.arguments import EnvironmentVariable, StrictArgs, Text, key_of, parse_args
from dpo_ray.rollout.judges.calls import Capacity, wait_for_all
from dpo_ray.rollout.judges.columns import Column
from dpo_ray.rollout.judges.reward_chat import RewardChat
from dpo_ray.rollout.judges.wire_formats import Rewards, WireFormat, openrlhf, sglang, vllm
from dpo_ray.types import CompletionGroup, Judgement, JudgeUnavailable

if TYPE_CHECKING:
    from dpo_ray.rollout.judges import JudgeContext
    from dpo_ray.rollout.judges.endpoint import Response

logger = logging.getLogger(__name__)

NAME = "http"
AUTHORIZATION = "Authorization"
SECRET_HEADERS = ("proxy-authorization", "cookie")
"""Beside the headers whose names or values look like secrets."""


def _servers(url: Any) -> tuple[Any, ...]:
    servers = list(url) if isinstance(url, list | tuple) else [url]
    if any(holds_secret(server) or re.match("([a-z]*:?//)?[^/?#]*@", str(server)) for server in servers):
        raise ValueError(
            "url holds a user name, password or key, and config.yaml would store it; name an environment variable with "
            "the key in online.judge.args.api_key_env"
        )
    if not servers or not all(map(_is_url, servers)):
        raise PydanticCustomError(
            "url",
            "accepted is http://HOST:PORT or https://HOST, with a path if the server needs one, or a list of such URLs",
        )
    return tuple(servers)


def _is_url(server: Any) -> bool:
    if not isinstance(server, str):
        return False
    try:
        parts = urlsplit(server)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False


def _header(name: Any) -> str:
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name)) or holds_secret(name):
        # Not shown: it may be the key itself.
        raise ValueError("api_key_header is not the name of a header, such as X-API-Key")
    return name


def _headers(headers: Any) -> Any:
    headers = {} if headers is None else headers
    if not (
        isinstance(headers, Mapping)
        and all(isinstance(text, str) and text.isprintable() for item in headers.items() for text in item)
    ):
        raise ValueError("headers must be names with texts")  # not shown: one may be a key
    for name, text in headers.items():
        if name.lower() in SECRET_HEADERS or holds_secret({name: text}):
            raise ValueError(
                f"headers holds {name}, and config.yaml would store it; name an environment variable with the key in "
                "online.judge.args.api_key_env, which is sent in api_key_header (Authorization: Bearer)"
            )
    return dict(headers)


class HttpArgs(StrictArgs):
    """Arguments of ``http``."""

    url: Annotated[tuple[str, ...], BeforeValidator(_servers)]
    """URL of the server, or a list of servers, which take turns: a retry goes to the next one."""
    format: Literal["openrlhf", "vllm", "sglang"]
    """See ``wire_formats``."""
    model: Text | None = None
    """vllm: the name by which the server knows the model, needed only if it serves several. sglang: the name in the
    request, ``tokenizer`` by default."""
    tokenizer: Text | None = None
    """sglang: hub id or directory of the reward model, whose chat template renders the conversations."""
    column: Text | None = None
    """openrlhf: field of the prompts' records with the labels, by default the first of ``GOLD`` that a record has."""
    timeout_s: float = Field(30.0, gt=0)
    """Longest wait for a response."""
    retries: int = Field(6, ge=0)
    """Further attempts after a lost connection, a time-out, and the statuses 429 and 5xx, with back-off from half a
    second, doubled each time, or after the time in Retry-After."""
    concurrency: int = Field(32, ge=1)
    """Requests in flight."""
    max_failures: int = Field(10, ge=1)
    """Failed requests in a row, over all groups, that end the run."""
    api_key_env: EnvironmentVariable | None = None
    """Environment variable of the judge's process; its value is sent in ``api_key_header``."""
    api_key_header: Annotated[str, BeforeValidator(_header)] = AUTHORIZATION
    """Header of the key, which Authorization has as a bearer token, and others, such as X-API-Key, alone."""
    headers: Annotated[dict[str, str], BeforeValidator(_headers)] = Field({})
    """Further headers, not for secrets: config.yaml has them."""

    @model_validator(mode="after")
    def _validate_format(self) -> Self:
        if self.format == "openrlhf" and self.model is not None:
            raise ValueError(f"model is {self.model!r}, and requests of format openrlhf name no model; remove it")
        if self.format == "sglang" and self.tokenizer is None:
            raise ValueError(
                "tokenizer is null; accepted is the hub id or directory of the reward model, whose chat template "
                "format sglang renders"
            )
        if self.format != "sglang" and self.tokenizer is not None:
            raise ValueError(f"tokenizer is {self.tokenizer!r}, and only format sglang uses it; remove it")
        if self.format != "openrlhf" and self.column is not None:
            raise ValueError(f"column is {self.column!r}, and only format openrlhf sends labels; remove it")
        if self.api_key_env is None and self.api_key_header != AUTHORIZATION:
            raise ValueError(
                f"api_key_header is {self.api_key_header!r}, and there is no key to send; name the environment "
                "variable with the key in online.judge.args.api_key_env"
            )
        return self


class Http:
    """Rewards from a server. Calls overlap. Arguments: ``HttpArgs``.

    A completion that the server rejects while it scores others of its group has no score (NaN), and is counted as
    ``rejected``; a group without any score fails.

    Args:
        context: has the policy's tokenizer.

    Raises:
        ValueError: an argument is wrong, the environment variable is not set, or the tokenizer cannot be loaded.
    """

    def __init__(self, *, context: "JudgeContext | None" = None, **args: Any) -> None:
        from dpo_ray.rollout.judges.endpoint import Endpoint

        parsed = parse_args(NAME, HttpArgs, args)
        key = None if parsed.api_key_env is None else _key(parsed.api_key_env)
        self._concurrency, self._request_per_completion = parsed.concurrency, parsed.format == "vllm"
        self._format = _build_format(parsed, context)
        self._endpoint = Endpoint(
            [self._format.url(server) for server in parsed.url],
            timeout_s=parsed.timeout_s,
            retries=parsed.retries,
            concurrency=parsed.concurrency,
            max_failures=parsed.max_failures,
            key=key,
            headers=parsed.headers | _key_header(parsed.api_key_header, key),
        )

    @staticmethod
    def validate_arguments(**args: Any) -> None:
        parse_args(NAME, HttpArgs, args)

    @staticmethod
    def longest_request_s(**args: Any) -> float:
        """Longest time in which a request is tried, without pauses."""
        parsed = parse_args(NAME, HttpArgs, args)
        return (parsed.retries + 1) * parsed.timeout_s

    @staticmethod
    def required_columns(**args: Any) -> list[Column]:
        """The columns that the judge needs: the one that the arguments name."""
        column = parse_args(NAME, HttpArgs, args).column
        return [] if column is None else [Column(column, NAME)]

    def request_capacity(self, completions: int) -> Capacity:
        """See ``capacity_of``."""
        sizes = range(1, completions + 1)
        return Capacity(self._concurrency, tuple(size if self._request_per_completion else 1 for size in sizes))

    async def __call__(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        return await wait_for_all(map(self._judge, groups))

    async def close(self) -> None:
        await self._endpoint.close()

    async def _judge(self, group: CompletionGroup) -> Judgement:
        bodies = self._format.bodies(group)
        completions = len(group.completions) // len(bodies)
        parse = lambda response: self._format.parse(response, completions)  # noqa: E731
        results = await asyncio.gather(*(self._endpoint.post(body, parse) for body in bodies), return_exceptions=True)
        responses = [result for result in results if not isinstance(result, BaseException)]
        self._raise_failure(group, [result for result in results if isinstance(result, BaseException)], responses)
        attempts = sum(response.attempts for response in responses)
        rejected = len(results) - len(responses)
        return Judgement(
            tuple(
                score
                for result in results
                for score in ((math.nan,) if isinstance(result, BaseException) else result.value.scores)
            ),
            means={name: value for response in responses for name, value in response.value.metrics.items()}
            | {"seconds": fmean(response.seconds for response in responses)},
            totals={"requests": attempts + rejected, "retries": attempts - len(responses), "rejected": rejected},
        )

    def _raise_failure(
        self, group: CompletionGroup, errors: Sequence[BaseException], responses: Sequence["Response[Rewards]"]
    ) -> None:
        """Raise the error of a group, unless the server has only rejected some completions, such as too long ones."""
        from dpo_ray.rollout.judges.endpoint import RequestRejected

        for error in errors:
            if isinstance(error, JudgeUnavailable):
                raise JudgeUnavailable(f"judge {NAME!r}: {error}") from None
        for error in errors:
            if not responses or not isinstance(error, RequestRejected):
                raise error
            logger.warning("a completion of prompt %d has no score: %s", group.prompt.index, error)


def _build_format(args: HttpArgs, context: "JudgeContext | None") -> WireFormat:
    if args.format == "openrlhf":
        if context is None:
            raise ValueError(f"judge {NAME!r}: format openrlhf needs the policy's tokenizer, which only a run provides")
        return openrlhf(context.decode, args.column, context.columns)
    if args.tokenizer is not None:  # sglang has one
        return sglang(args.model or args.tokenizer, RewardChat(args.tokenizer, NAME))
    return vllm(args.model)


def _key_header(header: str, key: str | None) -> dict[str, str]:
    """The header with the key, if there is one."""
    if key is None:
        return {}
    return {header: f"Bearer {key}" if header.lower() == AUTHORIZATION.lower() else key}


def _key(variable: str) -> str:
    key = key_of(NAME, variable)
    if not key:
        raise ValueError(
            f"judge {NAME!r}: the environment variable {variable} (online.judge.args.api_key_env) is not set in the "
            "judge's process; set it on every node before Ray starts there, see docs/judges.md"
        )
    return key
