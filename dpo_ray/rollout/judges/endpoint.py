"""Requests to an HTTP endpoint: time-outs, retries with back-off, a count of failures in a row, and a masked key.

Independent of judges' formats. Belongs to one event loop.
"""

import asyncio
import email.utils
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx2
import stamina

from dpo_ray.rollout.judges.failures import REJECTED, FailuresInARow, masked
from dpo_ray.storage import error_summary

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")

FIRST_WAIT_S = 0.5
"""Wait before the first retry; it doubles with each one."""
LONGEST_WAIT_S = 30.0
"""Longest wait before a retry, also if the endpoint asks for more by Retry-After."""
SHOWN_CHARACTERS = 200
"""Characters of a response that an error shows."""


class RequestFailed(RuntimeError):
    """The endpoint rejected a request, or its response has an unexpected form. Repeating it would not help."""


class RequestRejected(RequestFailed):
    """The endpoint works and rejects this request, for example because it is too long."""


class RequestLost(RequestFailed):
    """No connection, no response in time, or a response that asks for another attempt.

    Attributes:
        wait_s: seconds that the endpoint asks to wait; None if it does not.
    """

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message, wait_s)
        self.message, self.wait_s = message, wait_s

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Response(Generic[Parsed]):
    """The parsed response to a request."""

    value: Parsed
    seconds: float
    """Round-trip time of the last attempt."""
    attempts: int
    """Requests sent: one, and the retries."""


class Endpoint:
    """Posts JSON to one or several URLs, which take turns.

    Args:
        urls: each with its path.
        timeout_s: longest wait for the response to one attempt.
        retries: further attempts after a lost connection, a time-out, and the statuses 429 and 5xx.
        concurrency: requests in flight.
        max_failures: failed requests in a row after which the endpoint counts as unavailable.
        key: masked in all errors.
        headers: sent with each request; one of them may have the key.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float,
        retries: int,
        concurrency: int,
        max_failures: int,
        key: str | None,
        headers: Mapping[str, str],
    ) -> None:
        for library in ("httpx2", "stamina"):  # they log a line per request, and per retry without its reason
            logging.getLogger(library).setLevel(logging.ERROR)
        self._client = httpx2.AsyncClient(
            headers={"Content-Type": "application/json", **headers},
            timeout=None,
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self._urls, self._key = itertools.cycle(urls), key
        self._timeout_s, self._retries = timeout_s, retries
        self._free = asyncio.Semaphore(concurrency)
        self._failures = FailuresInARow(max_failures, attempts=retries + 1)

    async def post(self, body: Any, parse: Callable[[Any], Parsed]) -> Response[Parsed]:
        """Send a request.

        Args:
            body: sent as JSON; values of other types as text.
            parse: reads the JSON of the response; raises a ValueError that describes a wrong one.

        Raises:
            RequestFailed: the request failed, also in its retries.
            JudgeUnavailable: ``max_failures`` requests have failed in a row.
        """
        content, url = json.dumps(body, default=str).encode(), ""
        try:
            async for attempt in stamina.retry_context(
                on=_wait_before_retry,
                attempts=self._retries + 1,
                timeout=None,
                wait_initial=FIRST_WAIT_S,
                wait_jitter=FIRST_WAIT_S,
                wait_max=LONGEST_WAIT_S,
            ):
                with attempt:
                    url = next(self._urls)
                    value, seconds = await self._attempt(url, content, parse)
                    self._failures.reset()
                    return Response(value, seconds, attempt.num)
        except RequestRejected:
            self._failures.reset()
            raise
        except RequestFailed as error:
            self._failures.count(self._masked(url), error)
            raise
        raise AssertionError("the loop returns or raises")

    async def close(self) -> None:
        await self._client.aclose()

    async def _attempt(self, url: str, content: bytes, parse: Callable[[Any], Parsed]) -> tuple[Parsed, float]:
        async with self._free:
            started = time.perf_counter()
            try:
                async with asyncio.timeout(self._timeout_s):
                    response = await self._client.post(url, content=content)
            except TimeoutError:
                raise RequestLost(self._masked(f"{url}: no response in {self._timeout_s:g} s (timeout_s)")) from None
            except httpx2.RequestError as error:
                raise RequestLost(self._masked(f"{url}: {error_summary(error)}")) from None
        seconds = time.perf_counter() - started
        shown = self._masked(" ".join(response.text.split()))[:SHOWN_CHARACTERS]
        if response.status_code == 429 or response.status_code >= 500:
            wait_s = retry_after(response.headers.get("Retry-After"))
            raise RequestLost(self._masked(f"{url}: HTTP {response.status_code}: {shown}"), wait_s)
        if not response.is_success:
            failure = RequestRejected if response.status_code in REJECTED else RequestFailed
            raise failure(self._masked(f"{url}: HTTP {response.status_code}: {shown}"))
        try:
            return parse(response.json()), seconds
        except ValueError as error:  # of parse, or of the JSON
            problem = "not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
            raise RequestFailed(self._masked(f"{url}: {problem}; response: {shown}")) from None

    def _masked(self, text: str) -> str:
        return masked(text, self._key)


def _wait_before_retry(error: Exception) -> bool | float:
    """False: no retry; True: after the back-off; else the seconds to wait."""
    if not isinstance(error, RequestLost):
        return False
    logger.info("%s", error)
    return True if error.wait_s is None else error.wait_s


def retry_after(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, a number or a date, at most LONGEST_WAIT_S; None without a valid one."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_WAIT_S) if seconds == seconds else None
