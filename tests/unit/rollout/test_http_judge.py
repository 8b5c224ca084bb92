"""The judge ``http`` against a real HTTP server: retries, the circuit breaker, and secrets."""

import asyncio
import logging
import math
import pickle
import re
import socket
import threading
import time
from collections.abc import Sequence
from email.utils import formatdate
from typing import Any

import pytest

from dpo_ray.config import Component
from dpo_ray.config.rounds import JudgeConfig
from dpo_ray.rollout.judges import JudgeContext, bind_judge, capacity_of, endpoint
from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.rollout.judges.endpoint import LONGEST_WAIT_S, RequestFailed, RequestLost, retry_after
from dpo_ray.types import CompletionGroup, JudgeUnavailable
from tests.unit.rollout.fakes import score_in_pool
from tests.unit.rollout.reward_server import Reply, judge_groups, length, serve

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries after hundredths of a second."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)


async def no_engines(*_: Any) -> str:
    raise AssertionError("http asks no engine")


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def error_of(groups: Sequence[CompletionGroup], **args: Any) -> Exception:
    with pytest.raises((RequestFailed, JudgeUnavailable)) as caught:
        judge_groups(groups, **args)
    return caught.value


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_server_that_fails_3_of_10_calls_costs_no_group_its_score(group):
    groups = [group("x" * (i + 1), index=i) for i in range(10)]
    with serve(lambda i, body: (503, "busy") if i % 10 in (1, 4, 8) else length(i, body)) as server:
        judgements = judge_groups(groups, url=server.url, calls=10)
    assert [judgement.scores for judgement in judgements] == [(i + 1.0,) for i in range(10)]
    assert len(server.bodies) == 14, "requests 1, 4, 8 and 11 failed"
    assert sum(judgement.totals["requests"] for judgement in judgements) == 14
    assert sum(judgement.totals["retries"] for judgement in judgements) == 4


def test_a_slow_answer_is_given_up_after_the_timeout_and_asked_for_again(group):
    def slow_at_first(number: int, body: Any) -> Reply:
        time.sleep(20 if number == 0 else 0)
        return length(number, body)

    with serve(slow_at_first) as server:
        started = time.monotonic()
        (judgement,) = judge_groups([group("yes")], url=server.url, timeout_s=1)
        assert 1 < time.monotonic() - started < 20
    assert judgement.scores == (3.0,)
    assert judgement.totals["retries"] == len(server.bodies) - 1 >= 1
    assert judgement.means["seconds"] < 1, "of the attempt that was answered"


def test_an_answer_that_drips_does_not_outlast_the_timeout(group):
    async def main() -> None:
        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not writer.is_closing():
                writer.write(b" ")
                await asyncio.sleep(0.05)

        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        judge: Any = bind_judge(
            Component(use="http", args={"url": url, "format": "vllm", "timeout_s": 0.3, "retries": 0})
        )()
        with pytest.raises(RequestLost, match=r"no response in 0\.3 s \(timeout_s\)"):
            await judge([group("a")])
        await judge.close()
        server.close()

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 20


def test_the_server_decides_how_long_a_retry_waits(group):
    def limited(number: int, body: Any) -> Reply:
        return (429, "slow down", {"Retry-After": "1"}) if number == 0 else length(number, body)

    with serve(limited) as server:
        judge_groups([group("yes")], url=server.url)
    assert server.times[1] - server.times[0] >= 1.0, "not after the hundredth of a second of the back-off"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("86400", LONGEST_WAIT_S), ("soon", None), ("nan", None), (None, None)],
)
def test_retry_after_is_a_number_of_seconds_within_bounds(header, seconds):
    assert retry_after(header) == seconds


def test_retry_after_may_be_a_date():
    assert 8 < (retry_after(formatdate(time.time() + 10, usegmt=True)) or 0) <= 10


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_rejected_request_is_not_repeated_and_its_error_has_the_status_and_the_start_of_the_answer(group, status):
    with serve(lambda number, body: (status, "the model\n is " + "x" * 500)) as server:
        error = error_of([group("yes")], url=server.url)
    assert str(error) == f"{server.url}/classify: HTTP {status}: the model is " + "x" * 187
    assert len(server.bodies) == 1


def test_a_completion_that_the_server_rejects_has_no_score_and_the_others_of_its_group_keep_theirs(group):
    def short_only(number: int, body: Any) -> Reply:
        return length(number, body) if len(body["messages"][-1]["content"]) < 10 else (400, "too long")

    with serve(short_only) as server:
        (judgement,) = judge_groups([group("ab", "x" * 10, "abc")], url=server.url)
        assert str(error_of([group("x" * 10, "x" * 11)], url=server.url)).endswith("HTTP 400: too long")
    assert judgement.scores[::2] == (2.0, 3.0)
    assert math.isnan(judgement.scores[1])
    assert judgement.totals == {"requests": 3, "retries": 0, "rejected": 1}


@pytest.mark.parametrize("failure", [(401, "no key"), (404, "no such path"), (200, {"data": []})])
def test_a_server_that_fails_otherwise_than_by_rejecting_a_completion_fails_the_group(group, failure):
    """Of two servers only one works: half of the completions would have no score."""
    with serve(length) as good, serve(lambda number, body: failure) as bad:
        error = error_of([group("a", "bb", "ccc", "dddd")], url=[good.url, bad.url])
    assert str(error).startswith(f"{bad.url}/classify: ")


def test_servers_take_turns_and_a_retry_goes_to_the_next_one(group):
    groups = [group("x" * (i + 1), index=i) for i in range(8)]
    with serve(length) as first, serve(length) as second:
        urls = [first.url, f"http://127.0.0.1:{closed_port()}", second.url]
        judgements = judge_groups(groups, url=urls, concurrency=1)
    assert [judgement.scores for judgement in judgements] == [(i + 1.0,) for i in range(8)]
    assert len(first.bodies) + len(second.bodies) == 8
    assert min(len(first.bodies), len(second.bodies)) >= 2


def test_no_more_requests_are_in_flight_than_concurrency(group):
    def wait(number: int, body: Any) -> Reply:
        time.sleep(0.05)
        return length(number, body)

    with serve(wait) as server:
        judge_groups([group("a", "b", "c", "d", index=i) for i in range(4)], url=server.url, concurrency=3)
    assert server.most == 3
    assert len(server.bodies) == 16


def test_a_server_that_is_down_ends_the_judging_with_one_sentence(group):
    url = f"http://127.0.0.1:{closed_port()}"
    error = error_of([group("a", index=i) for i in range(5)], url=url, retries=1, max_failures=5)
    assert isinstance(error, JudgeUnavailable)
    assert re.fullmatch(
        rf"judge 'http': {url}/classify is unavailable: 5 requests in a row failed "
        rf"\(online\.judge\.args\.max_failures is 5, each was tried up to 2 times\); the last: "
        rf"{url}/classify: ConnectError: .+",
        str(error),
    )
    assert "\n" not in str(error)


def test_an_answer_between_failures_starts_the_count_anew(group):
    async def main(url: str) -> list[Any]:
        args = {"url": url, "format": "vllm", "retries": 0, "max_failures": 3}
        judge: Any = bind_judge(Component(use="http", args=args))()
        outcomes = []
        for i in range(9):
            try:
                await judge([group("a", index=i)])
                outcomes.append("answered")
            except (RequestFailed, JudgeUnavailable) as error:
                outcomes.append(type(error).__name__)
        await judge.close()
        return outcomes

    with serve(lambda i, body: length(i, body) if i in (2, 8) else (500, "broken")) as server:
        outcomes = asyncio.run(main(server.url))
    assert outcomes == [
        "RequestLost", "RequestLost", "answered",
        "RequestLost", "RequestLost", "JudgeUnavailable", "JudgeUnavailable", "JudgeUnavailable", "answered",
    ]  # fmt: skip


@pytest.mark.parametrize("error", [RequestLost("down", 2.0), RequestFailed("bad"), JudgeUnavailable("gone")])
def test_errors_arrive_whole_from_another_process(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))


# ------------------------------------------------------------------------------------------------------------ secrets


def test_the_key_is_sent_as_a_bearer_token_with_the_other_headers(group, monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with serve(length) as server:
        judge_groups([group("a")], url=server.url, api_key_env="MY_KEY", headers={"X-Team": "alignment"})
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["x-team"] == "alignment"


@pytest.mark.parametrize(
    ("header", "sent"), [("X-API-Key", KEY), ("Authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")]
)
def test_the_key_is_sent_in_the_header_that_is_named_and_in_no_other(group, monkeypatch, caplog, header, sent):
    monkeypatch.setenv("MY_KEY", KEY)
    args = {"api_key_env": "MY_KEY", "api_key_header": header}
    with caplog.at_level(logging.DEBUG), serve(length) as server:
        judge_groups([group("a")], url=server.url, **args)
    assert [(name, text) for name, text in server.headers[0].items() if KEY in text] == [(header.lower(), sent)]
    assert KEY not in caplog.text
    with serve(lambda number, body: (503, f"busy, {KEY}")) as server:
        assert KEY not in str(error_of([group("a")], url=server.url, retries=0, **args))


@pytest.mark.parametrize(
    ("status", "answer"),
    [(401, f"wrong key: {KEY}"), (503, f"busy, {KEY}"), (200, f"hello {KEY}"), (200, {"data": KEY})],
)
def test_the_key_is_in_no_error_and_no_log_even_if_the_server_sends_it_back(group, monkeypatch, caplog, status, answer):
    monkeypatch.setenv("MY_KEY", KEY)
    args = {"api_key_env": "MY_KEY", "retries": 1, "max_failures": 1}
    with caplog.at_level(logging.DEBUG), serve(lambda number, body: (status, answer)) as server:
        error = error_of([group("a")], url=server.url, **args)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}", "it was sent"
    assert "(hidden)" in str(error)
    assert KEY not in str(error)
    assert KEY.encode() not in pickle.dumps(error)
    assert KEY not in caplog.text
    assert KEY not in "".join(repr(record.__dict__) for record in caplog.records)


def test_a_key_that_the_judges_process_lacks_is_an_error_that_names_the_variable(group, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ValueError, match=r"the environment variable MY_KEY .* is not set in the judge's process"):
        judge_groups([group("a")], url="http://rm:8000", api_key_env="MY_KEY")


def test_a_key_with_characters_that_no_header_can_have_is_rejected_without_showing_it(group, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-schlüssel")
    with pytest.raises(ValueError, match=r"MY_KEY holds characters") as caught:
        judge_groups([group("a")], url="http://rm:8000", api_key_env="MY_KEY")
    assert "schl" not in str(caught.value)


@pytest.mark.parametrize(
    "args",
    [
        {"headers": {"authorization": KEY}},
        {"headers": {"Authorization": f"Bearer {KEY}"}},
        {"headers": {"X-API-Key": KEY}},
        {"headers": {"X-Auth-Token": KEY}},
        {"url": f"https://rm?api-key={KEY}"},
        {"headers": {"X-Team": [KEY]}},
        {"headers": KEY},
        {"api_key_env": KEY},
        {"api_key_env": "MY_KEY", "api_key_header": KEY},
        {"api_key_env": "MY_KEY", "api_key_header": f"X-API-Key: {KEY}"},
        {"url": f"https://me:{KEY}@rm"},
        {"url": ["rm:8000", f"https://me:{KEY}@rm"]},
        {"url": f"//me:{KEY}@rm"},
        {"url": f"me:{KEY}@rm:8000"},
        {"api_key_env": [KEY]},
    ],
)
def test_a_key_in_the_arguments_is_rejected_without_showing_it(args):
    with pytest.raises(ValueError, match=r"judge 'http': .*(api_key_env|api_key_header|headers)") as caught:
        bind_judge(Component(use="http", args={"url": "http://rm", "format": "vllm", **args}))
    assert KEY not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("format", "per_group"), [("vllm", (1, 2, 3)), ("openrlhf", (1, 1, 1))])
def test_the_capacity_is_in_requests_of_which_a_group_has_one_or_one_per_completion(tmp_path, format, per_group):
    args = {"url": "http://rm", "format": format, "concurrency": 4}
    built = bind_judge(Component(use="http", args=args), JudgeContext(tmp_path, no_engines, str))()
    assert capacity_of(built, 3) == Capacity(4, per_group)


def test_no_group_waits_for_a_free_request_while_its_time_runs(group):
    """Of 32 requests, 8 are in flight, those of two calls; the server answers no request before 8 are there."""
    eight = threading.Barrier(8)

    def wait(number: int, body: Any) -> Reply:
        eight.wait(timeout=20)
        return length(number, body)

    with serve(wait) as server:
        args = {"url": server.url, "format": "vllm", "concurrency": 8, "retries": 0}
        built = bind_judge(Component(use="http", args=args))()
        judgements, most_calls = score_in_pool(built, [group("a", "b", "c", "d", index=i) for i in range(8)])
    assert [judgement.scores for judgement in judgements] == [(1.0,) * 4] * 8
    assert (server.most, most_calls) == (8, 2)


def test_a_request_that_may_take_longer_than_the_call_is_rejected():
    args = {"url": "http://rm", "format": "vllm", "timeout_s": 50, "retries": 3}
    bind_judge(JudgeConfig(use="http", args=args, timeout_s=200))
    with pytest.raises(ValueError, match=r"a request may take 200 s .* longer than timeout_s=199 of a whole call"):
        bind_judge(JudgeConfig(use="http", args=args, timeout_s=199))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"format": "vllm"}, "online.judge.args.url: is required"),
        ({"url": "rm:8000", "format": "vllm"}, "url: found 'rm:8000'; accepted is http://HOST:PORT"),
        ({"url": "http://rm:port", "format": "vllm"}, "url: found 'http://rm:port'"),
        ({"url": [], "format": "vllm"}, r"url: found \[\]"),
        ({"url": ["http://a", 3], "format": "vllm"}, r"url: found \['http://a', 3\]"),
        ({"url": "http://rm", "format": "tgi"}, "format: found 'tgi'; input should be 'openrlhf', 'vllm' or 'sglang'"),
        ({"url": "http://rm", "format": "vllm", "timeout_s": 0}, "timeout_s: found 0; input should be greater than 0"),
        ({"url": "http://rm", "format": "vllm", "retries": -1}, "online.judge.args.retries: found -1"),
        (
            {"url": "http://rm", "format": "vllm", "concurrency": True},
            "concurrency: found true; input should be a valid integer",
        ),
        ({"url": "http://rm", "format": "vllm", "max_failures": 0}, "max_failures: found 0"),
        ({"url": "http://rm", "format": "vllm", "tokenizer": "a/b"}, "only format sglang uses it"),
        ({"url": "http://rm", "format": "openrlhf", "model": "rm"}, "name no model; remove it"),
        ({"url": "http://rm", "format": "vllm", "api_key_header": "X-API-Key"}, "there is no key to send; name the"),
        ({"url": "http://rm", "format": "vllm", "api_key_header": ""}, "api_key_header is not the name of a header"),
        ({"url": "http://rm", "format": "openrlhf", "column": 3}, "column: found 3; input should be a valid string"),
        ({"url": "http://rm", "format": "vllm", "column": "gold"}, "column is 'gold', and only format openrlhf sends"),
        ({"url": "http://rm", "format": "sglang"}, "tokenizer is null; accepted is the hub id or directory"),
        ({"url": "http://rm", "format": "vllm", "token": "x"}, "token: no such argument; accepted are url, format"),
    ],
)
def test_wrong_arguments_are_rejected_before_the_judge_is_built(args, message):
    with pytest.raises(ValueError, match=message):
        bind_judge(Component(use="http", args=args))


def test_the_policys_tokenizer_is_needed_for_openrlhf_only(group):
    with pytest.raises(ValueError, match="needs the policy's tokenizer"):
        judge_groups([group("a")], url="http://rm", format="openrlhf")


def test_completions_that_are_too_long_never_make_a_server_that_works_unavailable(group):
    with serve(lambda number, body: (400, "too long")) as server:
        error = error_of([group(*"abcdefgh", index=i) for i in range(3)], url=server.url, max_failures=5)
    assert isinstance(error, RequestFailed)
    assert len(server.bodies) == 24
