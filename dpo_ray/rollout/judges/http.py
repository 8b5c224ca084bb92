"""A judge by a reward server over HTTP: OpenRLHF's, vLLM's or SGLang's."""

import asyncio
import logging
import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dpo_ray.config.secrets import holds_secret
from dpo_ray.rollout.judges.arguments import check_argument, is_count, is_duration, is_text, key_of
from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.rollout.judges.columns import Column
from dpo_ray.rollout.judges.reward_chat import RewardChat
from dpo_ray.rollout.judges.waiting import wait_for_all
from dpo_ray.rollout.judges.wire_formats import Rewards, WireFormat, openrlhf, sglang, vllm
from dpo_ray.types import CompletionGroup, Judgement, JudgeUnavailable

if TYPE_CHECKING:
    from dpo_ray.rollout.judges import JudgeContext
    from dpo_ray.rollout.judges.endpoint import Answer

logger = logging.getLogger(__name__)

NAME = "http"
FORMATS = ("openrlhf", "vllm", "sglang")
AUTHORIZATION = "Authorization"
SECRET_HEADERS = ("proxy-authorization", "cookie")
"""Beside the headers whose names or values look like secrets."""


class Http:
    """Rewards from a server. Calls overlap.

    A completion that the server rejects while it scores others of its group has no score (NaN), and is counted as
    ``rejected``; a group without any score fails.

    Args:
        url: of the server, or a list of servers, which take turns: a retry goes to the next one.
        format: openrlhf, vllm or sglang, see ``wire_formats``.
        model: vllm: the name by which the server knows the model, needed only if it serves several. sglang: the name in
            the request, ``tokenizer`` by default.
        tokenizer: sglang: hub id or directory of the reward model, whose chat template renders the conversations.
        column: openrlhf: field of the prompts' records with the labels, by default the first of ``GOLD`` that a record
            has.
        timeout_s: longest wait for an answer.
        retries: further attempts after a lost connection, a time-out, and the statuses 429 and 5xx, with back-off from
            half a second, doubled each time, or after the time in Retry-After.
        concurrency: requests in flight.
        max_failures: failed requests in a row, over all groups, that end the run.
        api_key_env: name of an environment variable of the judge's process; its value is sent in ``api_key_header``.
        api_key_header: header of the key, which Authorization has as a bearer token, and others, such as X-API-Key,
            alone.
        headers: further headers, not for secrets: config.yaml has them.
        context: has the policy's tokenizer.

    Raises:
        ValueError: an argument is wrong, the environment variable is not set, or the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        format: str,
        *,
        model: str | None = None,
        tokenizer: str | None = None,
        column: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 6,
        concurrency: int = 32,
        max_failures: int = 10,
        api_key_env: str | None = None,
        api_key_header: str = AUTHORIZATION,
        headers: Mapping[str, str] | None = None,
        context: "JudgeContext | None" = None,
    ) -> None:
        from dpo_ray.rollout.judges.endpoint import Endpoint

        numbers = {
            "timeout_s": timeout_s, "retries": retries, "concurrency": concurrency, "max_failures": max_failures,
        }  # fmt: skip
        secrets = {"api_key_env": api_key_env, "api_key_header": api_key_header, "headers": headers}
        self.validate_arguments(url, format, model, tokenizer, column=column, **secrets, **numbers)
        key = None if api_key_env is None else _key(api_key_env)
        self._concurrency, self._request_per_completion = concurrency, format == "vllm"
        self._format = _build_format(format, model, tokenizer, column, context)
        self._endpoint = Endpoint(
            [self._format.url(server) for server in _servers(url)],
            key=key,
            headers={**(headers or {}), **_key_header(api_key_header, key)},
            **numbers,
        )

    @staticmethod
    def validate_arguments(
        url: Any,
        format: Any,
        model: Any = None,
        tokenizer: Any = None,
        *,
        column: Any = None,
        timeout_s: Any = 1.0,
        retries: Any = 0,
        concurrency: Any = 1,
        max_failures: Any = 1,
        api_key_env: Any = None,
        api_key_header: Any = AUTHORIZATION,
        headers: Any = None,
    ) -> None:
        """Raise a ValueError that names the first wrong argument."""
        _check_url(url)
        check_argument(NAME, "format", format, format in FORMATS, f"one of {', '.join(FORMATS)}")
        _check_model(format, model, tokenizer)
        _check_column(format, column)
        check_argument(NAME, "timeout_s", timeout_s, is_duration(timeout_s), "a number of seconds above 0")
        check_argument(NAME, "retries", retries, is_count(retries, 0), "an integer of at least 0")
        for name, value in {"concurrency": concurrency, "max_failures": max_failures}.items():
            check_argument(NAME, name, value, is_count(value), "an integer of at least 1")
        _check_secrets(api_key_env, headers)
        _check_key_header(api_key_env, api_key_header)

    @staticmethod
    def longest_request_s(*_: Any, timeout_s: float = 30.0, retries: int = 6, **__: Any) -> float:
        """Longest time in which a request is tried, without pauses."""
        return (retries + 1) * timeout_s

    @staticmethod
    def required_columns(*_: Any, column: str | None = None, **__: Any) -> list[Column]:
        """The columns that the judge needs: the one that the arguments name."""
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
        parse = lambda answer: self._format.parse(answer, completions)  # noqa: E731
        results = await asyncio.gather(*(self._endpoint.post(body, parse) for body in bodies), return_exceptions=True)
        answers = [result for result in results if not isinstance(result, BaseException)]
        self._raise_failure(group, [result for result in results if isinstance(result, BaseException)], answers)
        attempts = sum(answer.attempts for answer in answers)
        rejected = len(results) - len(answers)
        return Judgement(
            tuple(
                score
                for result in results
                for score in ((math.nan,) if isinstance(result, BaseException) else result.value.scores)
            ),
            means={name: value for answer in answers for name, value in answer.value.figures.items()}
            | {"seconds": fmean(answer.seconds for answer in answers)},
            totals={"requests": attempts + rejected, "retries": attempts - len(answers), "rejected": rejected},
        )

    def _raise_failure(
        self, group: CompletionGroup, errors: Sequence[BaseException], answers: Sequence["Answer[Rewards]"]
    ) -> None:
        """Raise the error of a group, unless the server has only rejected some completions, such as too long ones."""
        from dpo_ray.rollout.judges.endpoint import RequestRejected

        for error in errors:
            if isinstance(error, JudgeUnavailable):
                raise JudgeUnavailable(f"judge {NAME!r}: {error}") from None
        for error in errors:
            if not answers or not isinstance(error, RequestRejected):
                raise error
            logger.warning("a completion of prompt %d has no score: %s", group.prompt.index, error)


def _build_format(
    format: str, model: str | None, tokenizer: str | None, column: str | None, context: "JudgeContext | None"
) -> WireFormat:
    if format == "openrlhf":
        if context is None:
            raise ValueError(f"judge {NAME!r}: format openrlhf needs the policy's tokenizer, which only a run provides")
        return openrlhf(context.decode, column, context.columns)
    if format == "sglang":
        assert tokenizer is not None
        return sglang(model or tokenizer, RewardChat(tokenizer, NAME))
    return vllm(model)


def _servers(url: str | Sequence[str]) -> list[str]:
    return [url] if isinstance(url, str) else list(url)


def _check_url(url: Any) -> None:
    servers = [url] if isinstance(url, str) else url
    accepted = "http://HOST:PORT or https://HOST, with a path if the server needs one, or a list of such URLs"
    check_argument(NAME, "url", url, isinstance(servers, Sequence) and bool(servers), accepted)
    for server in servers:
        if isinstance(server, str) and ("@" in urlsplit(server).netloc or holds_secret(server)):
            raise ValueError(
                f"judge {NAME!r}: url holds a user name, password or key, and config.yaml would store it; name an "
                "environment variable with the key in online.judge.args.api_key_env"
            )
        check_argument(NAME, "url", server, _is_url(server), accepted)


def _is_url(server: Any) -> bool:
    if not isinstance(server, str):
        return False
    try:
        parts = urlsplit(server)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False


def _check_model(format: str, model: Any, tokenizer: Any) -> None:
    check_argument(NAME, "model", model, model is None or is_text(model), "a name, or null")
    if format == "openrlhf" and model is not None:
        raise ValueError(
            f"judge {NAME!r}: model is {model!r}, and requests of format openrlhf name no model; remove it"
        )
    if format == "sglang":
        accepted = "the hub id or directory of the reward model, whose chat template format sglang renders"
        check_argument(NAME, "tokenizer", tokenizer, is_text(tokenizer), accepted)
    elif tokenizer is not None:
        raise ValueError(f"judge {NAME!r}: tokenizer is {tokenizer!r}, and only format sglang uses it; remove it")


def _check_column(format: str, column: Any) -> None:
    check_argument(NAME, "column", column, column is None or is_text(column), "the name of a field, or null")
    if column is not None and format != "openrlhf":
        raise ValueError(f"judge {NAME!r}: column is {column!r}, and only format openrlhf sends labels; remove it")


def _check_secrets(api_key_env: Any, headers: Any) -> None:
    if api_key_env is not None and not (isinstance(api_key_env, str) and api_key_env.isidentifier()):
        # Not shown: it may be the key itself.
        raise ValueError(
            f"judge {NAME!r}: api_key_env is not the name of an environment variable (online.judge.args.api_key_env)"
        )
    accepted = headers is None or (
        isinstance(headers, Mapping)
        and all(isinstance(text, str) and text.isprintable() for item in headers.items() for text in item)
    )
    if not accepted:
        raise ValueError(f"judge {NAME!r}: headers must be names with texts (online.judge.args.headers)")
    if secret := next((name for name, text in (headers or {}).items() if _is_secret_header(name, text)), None):
        raise ValueError(
            f"judge {NAME!r}: headers holds {secret}, and config.yaml would store it; name an environment variable "
            "with the key in online.judge.args.api_key_env, which is sent in api_key_header (Authorization: Bearer)"
        )


def _check_key_header(api_key_env: Any, header: Any) -> None:
    if not (isinstance(header, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", header)) or holds_secret(header):
        # Not shown: it may be the key itself.
        raise ValueError(
            f"judge {NAME!r}: api_key_header is not the name of a header, such as X-API-Key "
            "(online.judge.args.api_key_header)"
        )
    if api_key_env is None and header != AUTHORIZATION:
        raise ValueError(
            f"judge {NAME!r}: api_key_header is {header!r}, and there is no key to send; name the environment variable "
            "with the key in online.judge.args.api_key_env"
        )


def _key_header(header: str, key: str | None) -> dict[str, str]:
    """The header with the key, if there is one."""
    if key is None:
        return {}
    return {header: f"Bearer {key}" if header.lower() == AUTHORIZATION.lower() else key}


def _is_secret_header(name: str, text: str) -> bool:
    return name.lower() in SECRET_HEADERS or holds_secret({name: text})


def _key(variable: str) -> str:
    key = key_of(NAME, variable)
    if not key:
        raise ValueError(
            f"judge {NAME!r}: the environment variable {variable} (online.judge.args.api_key_env) is not set in the "
            "judge's process; set it on every node before Ray starts there, see docs/judges.md"
        )
    return key
