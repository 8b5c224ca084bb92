"""The judges ``llm`` and ``policy``: the real client against a server on this machine, and a fake of the engines."""

import asyncio
import json
import logging
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray.config import Component
from dpo_ray.config.rounds import JudgeConfig, SamplingConfig
from dpo_ray.rollout.judges import Judge, bind_judge, capacity_of, check_scores
from dpo_ray.rollout.judges.answer_cache import AnswerCache, Reply
from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.rollout.judges.chat_endpoint import EndpointFailed
from dpo_ray.rollout.selectors import best_vs_worst
from dpo_ray.types import Completion, CompletionGroup, Dropped, Judgement, JudgeUnavailable, Messages, Prompt
from tests.unit.rollout.chat_server import serving
from tests.unit.rollout.fakes import score_in_pool

KEY = "key-1234567890-secret"
TEXTS = ("one", "two words", "three words here", "a text of five words")


async def no_engines(messages: Messages, sampling: SamplingConfig) -> str:
    raise AssertionError("llm asks no engine")


def context(run_dir: Path, complete: Any) -> Any:
    """As much of a JudgeContext as these judges use."""
    return SimpleNamespace(run_dir=run_dir, complete=complete, columns=None)


def build(url: str | None, run_dir: Path, **args: Any) -> Judge:
    arguments = {"model": "judge", "base_url": url, "api_key_env": "JUDGE_KEY", **args}
    return bind_judge(Component(use="llm", args=arguments), context(run_dir, no_engines))()


def judge(url: str | None, run_dir: Path, groups: Sequence[CompletionGroup], **args: Any) -> list[Judgement]:
    built: Any = build(url, run_dir, **args)

    async def run() -> Any:
        try:
            return await built(groups)
        finally:
            await built.close()

    return check_scores(groups, asyncio.run(run()))


def make_groups(count: int) -> list[CompletionGroup]:
    """Groups that differ in prompt and completions."""
    return [
        CompletionGroup(
            Prompt(index, ({"role": "user", "content": f"question {index}"},), (1,)),
            tuple(Completion(f"{text} {index}", (1, 0), True) for text in TEXTS),
            seed=100 + index,
        )
        for index in range(count)
    ]


def prompt_of(request: Mapping[str, Any]) -> str:
    return request["messages"][0]["content"]


def responses(request: Mapping[str, Any]) -> list[str]:
    return re.findall(r"<response\w*>\n(.*?)\n</response", prompt_of(request), re.DOTALL)


def longer_wins(request: Mapping[str, Any]) -> str:
    first, second = responses(request)
    return json.dumps({"reasoning": "length", "winner": "A" if len(first) > len(second) else "B"})


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_pairwise_scores_are_win_rates_and_each_pair_is_asked_in_both_orders(tmp_path, group):
    with serving(longer_wins) as server:
        [judgement] = judge(server.url, tmp_path, [group(*TEXTS)], usd_per_million={"prompt": 2, "completion": 8})
    assert judgement.scores == (0.0, 1 / 3, 2 / 3, 1.0)
    assert judgement.means == {"swap_agreement": 1.0}
    assert judgement.totals == {
        "requests": 12,  # 6 pairs in 2 orders
        "cached": 0,
        "parse_failures": 0,
        "unparsed": 0,
        "prompt_tokens": 1200,
        "completion_tokens": 120,
        "cost_usd": pytest.approx((1200 * 2 + 120 * 8) / 1e6),
    }
    assert len(set(server.prompts)) == 12
    [request, *_] = server.received
    assert request["model"] == "judge"
    assert request["temperature"] == 0
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["reasoning", "winner"]
    assert server.keys == {f"Bearer {KEY}"}


def test_a_judge_that_always_prefers_the_first_answer_gives_equal_wins_which_is_a_tie(tmp_path, group):
    with serving(lambda request: '{"winner": "A"}') as server:
        [judgement] = judge(server.url, tmp_path, [group(*TEXTS)])
    assert judgement.scores == (0.5, 0.5, 0.5, 0.5)
    assert judgement.means == {"swap_agreement": 0.0}
    assert best_vs_worst(group(*TEXTS), judgement.scores) == Dropped("tie")


def test_score_follows_the_rubric_and_sends_the_fields_of_request(tmp_path, group):
    def words(request: Mapping[str, Any]) -> str:
        [response] = responses(request)
        return json.dumps({"reasoning": "words", "score": len(response.split())})

    with serving(words) as server:
        args = {"mode": "score", "rubric": "Count words.", "scale": [0, 10], "request": {"reasoning_effort": "low"}}
        [judgement] = judge(server.url, tmp_path, [group(*TEXTS)], temperature=None, max_tokens=None, **args)
    assert judgement.scores == (1.0, 2.0, 3.0, 5.0)
    assert len(server.received) == 4
    for request in server.received:
        assert "Count words." in prompt_of(request)
        assert request["reasoning_effort"] == "low"
        assert not {"temperature", "max_tokens"} & set(request)


def test_an_endpoint_that_fails_three_of_ten_calls_and_is_slow_costs_no_group_its_scores(tmp_path):
    count, lock = 0, threading.Lock()

    def flaky(request: Mapping[str, Any]) -> str | int:
        nonlocal count
        with lock:
            count += 1
            number = count
        if number % 10 in (1, 5):
            return 500
        if number % 10 == 8:
            return 429
        if number % 25 == 2:
            time.sleep(1.5)  # beyond timeout_s: the client asks again
        return longer_wins(request)

    groups = make_groups(8)
    with serving(flaky) as server:
        judgements = judge(server.url, tmp_path, groups, timeout_s=1.0, retries=8)
    assert [judgement.scores for judgement in judgements] == [(0.0, 1 / 3, 2 / 3, 1.0)] * 8
    assert sum(judgement.totals["requests"] for judgement in judgements) == 96
    assert len(server.received) >= 96 / 0.7


def test_prose_is_asked_again_once_then_counts_as_a_tie(tmp_path, group):
    def prose(request: Mapping[str, Any]) -> str:
        return "Both have their merits."

    with serving(prose) as server:
        [judgement] = judge(server.url, tmp_path, [group("a", "b")])
    assert judgement.scores == (0.5, 0.5)
    assert math.isnan(judgement.means["swap_agreement"])
    assert judgement.totals["parse_failures"] == 4  # 2 orders, asked twice
    assert judgement.totals["unparsed"] == 2
    asked_again = [request for request in server.received if "Reply with only this JSON" in prompt_of(request)]
    assert len(asked_again) == 2
    assert [request["response_format"]["json_schema"]["schema"]["required"] for request in asked_again] == [
        ["winner"]
    ] * 2


def test_a_verdict_in_the_second_reply_counts_and_one_in_a_code_fence_needs_no_second(tmp_path, group):
    def second_time(request: Mapping[str, Any]) -> str:
        if "Reply with only this JSON" not in prompt_of(request):
            return "Hmm."
        return f"Here it is:\n```json\n{longer_wins(request)}\n```"

    with serving(second_time) as server:
        [judgement] = judge(server.url, tmp_path, [group("a", "a longer one")])
    assert judgement.scores == (0.0, 1.0)
    assert judgement.totals["parse_failures"] == 2
    assert judgement.totals["unparsed"] == 0


def test_a_score_that_stays_prose_is_nan_not_zero(tmp_path, group):
    with serving(lambda request: "good") as server:
        [judgement] = judge(server.url, tmp_path, [group("a", "b")], mode="score")
    assert all(map(math.isnan, judgement.scores))
    assert judgement.totals["unparsed"] == 2


def test_an_endpoint_without_response_format_is_asked_without_it(tmp_path, group, caplog):
    def plain(request: Mapping[str, Any]) -> str | int:
        return 400 if "response_format" in request else longer_wins(request)

    with serving(plain) as server:
        judgements = judge(server.url, tmp_path, make_groups(3), concurrency=1)
    assert [judgement.scores for judgement in judgements] == [(0.0, 1 / 3, 2 / 3, 1.0)] * 3
    assert len(server.received) == 1 + 36, "one rejection, then 3 groups of 12 without response_format"
    assert "rejects response_format" in caplog.text


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_rejected_request_raises_an_error_with_status_and_url_but_without_the_key(tmp_path, group, status):
    def reject(request: Mapping[str, Any]) -> dict[str, Any] | int:
        return status

    with (
        serving(reject) as server,
        pytest.raises(RuntimeError, match=rf"{server.url}/ answered {status}: .*on purpose") as error,
    ):
        judge(server.url, tmp_path, [group("a", "b")])
    assert KEY not in repr(error.value)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_an_endpoint_that_echoes_the_key_does_not_get_it_into_an_error(tmp_path, group):
    with serving(lambda request: {"choices": [], "echo": f"Bearer {KEY}"}) as server:
        with pytest.raises(RuntimeError, match="answered without choices") as error:
            judge(server.url, tmp_path, [group("a", "b")])
        assert KEY not in str(error.value)
        assert "(hidden)" in str(error.value)


def test_an_endpoint_that_is_down_raises_an_error_that_names_it(tmp_path, group):
    with serving(longer_wins) as server:
        url = server.url
    with pytest.raises(RuntimeError, match=rf"{url}/ did not answer: Connection error"):
        judge(url, tmp_path, [group("a", "b")], retries=0)


def test_ten_failed_requests_in_a_row_make_the_judge_unavailable_and_an_answer_between_them_does_not(tmp_path):
    def every_fifth(request: Mapping[str, Any]) -> str | int:
        return longer_wins(request) if len(server.received) % 5 == 0 else 500

    with serving(every_fifth) as server, pytest.raises(EndpointFailed, match="answered 500"):
        judge(server.url, tmp_path / "1", make_groups(3), retries=0, concurrency=1)
    assert len(server.received) == 36
    with (
        serving(lambda request: 401) as server,
        pytest.raises(
            JudgeUnavailable,
            match=r"is unavailable: 10 requests in a row failed \(online\.judge\.args\.max_failures is 10",
        ) as error,
    ):
        judge(server.url, tmp_path / "2", make_groups(1), concurrency=1)
    assert KEY not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_password_in_the_address_is_in_no_error_and_no_log(tmp_path, group, monkeypatch, caplog):
    password = "pass@word"
    with serving(lambda request: 500) as server:
        address = server.url.removeprefix("http://")
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:{password}@{address}")
        with caplog.at_level(logging.DEBUG, logger="dpo_ray"), pytest.raises(JudgeUnavailable) as unavailable:
            judge(None, tmp_path, [group("a", "b")], retries=0, max_failures=2, concurrency=1)
        with pytest.raises(EndpointFailed) as failed:
            judge(None, tmp_path, [group("a", "b")], retries=0)
    for message in (str(unavailable.value), str(failed.value)):
        assert f"http://{address}/" in message
    for text in (str(unavailable.value), str(failed.value), caplog.text):
        assert "pass" not in text
        assert "word" not in text


def test_openais_own_endpoint_needs_a_key_and_another_does_not(tmp_path, group, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match=r"variable JUDGE_KEY \(online.judge.args.api_key_env\) is not set"):
        bind_judge(Component(use="llm", args={"model": "m", "api_key_env": "JUDGE_KEY"}))()
    with serving(longer_wins) as server:
        judge(server.url, tmp_path, [group("a", "b c")])
    assert server.keys == {"Bearer none"}


def test_a_key_with_characters_that_no_header_can_have_is_rejected_without_showing_it(tmp_path, monkeypatch):
    for bad in ("clé-1234567890", "key\n1234567890"):
        monkeypatch.setenv("JUDGE_KEY", bad)
        with pytest.raises(ValueError, match=r"judge 'llm': the environment variable JUDGE_KEY holds char") as caught:
            build("http://127.0.0.1:9/v1", tmp_path)
        assert "1234567890" not in str(caught.value)


def test_without_its_package_the_judge_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"dpo-ray\[llm\]"):
        bind_judge(Component(use="llm", args={"model": "m"}))()


@pytest.mark.parametrize(
    ("args", "capacity"),
    [
        ({}, Capacity(32, (1, 2, 6, 12, 12))),
        ({"concurrency": 1000}, Capacity(500, (1, 2, 6, 12, 12))),
        ({"mode": "score", "concurrency": 8}, Capacity(8, (1, 2, 3, 4, 5))),
        ({"mode": "score", "samples": 3, "temperature": 1}, Capacity(32, (3, 6, 9, 12, 15))),
        ({"comparisons": 1}, Capacity(32, (1, 2, 2, 2, 2))),
    ],
)
def test_the_capacity_is_in_requests_of_which_a_group_has_as_many_as_questions(tmp_path, args, capacity):
    assert capacity_of(build("http://127.0.0.1:9/v1", tmp_path, **args), 5) == capacity


def test_calls_about_two_candidates_fill_the_requests_and_none_waits_for_one_while_its_time_runs(tmp_path, group):
    """Of 32 requests, 8 are in flight, those of four calls; the server answers no request before 8 are there."""
    eight = threading.Barrier(8)

    def wait(request: Mapping[str, Any]) -> str:
        eight.wait(timeout=20)
        return longer_wins(request)

    with serving(wait) as server:
        built = build(server.url, tmp_path, concurrency=8, retries=0)
        judgements, most_calls = score_in_pool(built, [group("a", "b c", index=i) for i in range(16)])
    assert [judgement.scores for judgement in judgements] == [(0.0, 1.0)] * 16
    assert most_calls == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_url", f"http://me:{KEY}@judge/v1"),
        ("base_url", f"http://judge/v1?api_key={KEY}"),
        ("request", {"extra_headers": {"X-Auth-Token": KEY}}),
    ],
)
def test_a_key_in_the_arguments_is_rejected_without_showing_it(name, value):
    with pytest.raises(ValueError, match=rf"online.judge.args.*{name}: holds a key or password") as caught:
        bind_judge(Component(use="llm", args={"model": "m", name: value}))
    assert KEY not in str(caught.value)


def test_the_defaults_leave_time_for_all_attempts_of_a_request():
    bind_judge(JudgeConfig(use="llm", args={"model": "m"}))
    with pytest.raises(ValueError, match=r"a request may take 360 s .* longer than timeout_s=300 of a whole call"):
        bind_judge(JudgeConfig(use="llm", args={"model": "m", "retries": 5}))


# ------------------------------------------------------------------------------------------------------- kept answers


def test_a_second_judge_sends_nothing_again_and_counts_the_tokens_for_the_group_that_asked(tmp_path):
    [first, second] = make_groups(2)
    same_texts = CompletionGroup(first.prompt, first.completions, seed=first.seed + 50)
    with serving(longer_wins) as server:
        before = judge(server.url, tmp_path, [first])
        after = judge(server.url, tmp_path, [first, same_texts, second])
    assert after[0].scores == before[0].scores
    assert after[0].totals == {**before[0].totals, "requests": 0, "cached": 12}
    assert after[1].totals["cached"] == 12
    assert "prompt_tokens" not in after[1].totals, "another group has paid"
    assert after[2].totals["requests"] == 12
    assert len(server.received) == 24


@pytest.mark.parametrize("from_environment", [False, True])
def test_an_endpoint_has_answers_of_its_own_whatever_its_credentials(tmp_path, group, monkeypatch, from_environment):
    def ask(url: str) -> float:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        [judgement] = judge(None if from_environment else url, tmp_path, [group("a", "b c")])
        return judgement.totals["cached"]

    with serving(longer_wins) as server, serving(longer_wins) as other:
        assert [ask(server.url), ask(other.url), ask(f"{server.url}/")] == [0, 0, 2]
        if from_environment:
            assert ask(server.url.replace("://", "://me:password@")) == 2
    assert b"password" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*.jsonl"))


def test_a_policy_version_has_answers_of_its_own(tmp_path, group):
    with serving(longer_wins) as server:
        judge(server.url, tmp_path, [group("a", "b c")])
        judge(server.url, tmp_path, [group("a", "b c", policy_version=1)])
    assert len(server.received) == 4


def test_answers_before_a_failure_are_kept_for_the_next_attempt(tmp_path):
    [group] = make_groups(1)
    down = threading.Event()

    def fails_later(request: Mapping[str, Any]) -> str | int:
        return 503 if len(server.answered) >= 5 and not down.is_set() else longer_wins(request)

    with serving(fails_later) as server:
        with pytest.raises(RuntimeError, match="answered 503"):
            judge(server.url, tmp_path, [group], retries=0, concurrency=1)
        assert len(server.answered) == 5
        down.set()
        [judgement] = judge(server.url, tmp_path, [group], retries=0)
    assert judgement.totals["cached"] == 5
    assert judgement.totals["requests"] == 7
    assert judgement.totals["prompt_tokens"] == 1200, "those of the failed attempt count, too"
    assert len(set(server.prompts)) == len(server.prompts) == 12


CHILD = """
import asyncio, sys
from pathlib import Path
from tests.unit.rollout.test_llm_judge import build, make_groups

judge = build(sys.argv[1], Path(sys.argv[2]), concurrency=8, timeout_s=60)
groups = make_groups(6)

async def main():
    await asyncio.gather(judge(groups[:3]), judge(groups[3:]))

asyncio.run(main())
"""


@pytest.mark.timeout(240)
def test_a_judge_killed_while_it_judges_sends_no_answered_request_again_and_leaves_no_key_on_disk(tmp_path):
    """6 groups of 12 requests; the process is killed when 40 are answered and 8 wait."""
    gate, run_dir = threading.Event(), tmp_path / "run"
    run_dir.mkdir()

    def hold_after_40(request: Mapping[str, Any]) -> str:
        if len(server.received) > 40:
            gate.wait(30)
        return longer_wins(request)

    with serving(hold_after_40) as server, (run_dir / "judge-0.log").open("w") as log:
        command = [sys.executable, "-c", CHILD, server.url, str(run_dir)]
        environment = os.environ | {"OPENAI_LOG": "debug"}
        with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
            deadline = time.monotonic() + 100
            while len(server.answered) < 40:
                assert time.monotonic() < deadline, (run_dir / "judge-0.log").read_text()
                time.sleep(0.05)
            time.sleep(1.0)  # until the process has written what it received
            process.send_signal(signal.SIGKILL)
        killed = [prompt_of(request) for request in server.answered]
        assert len(killed) == 40
        gate.set()
        received = len(server.received)
        assert subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=100).returncode == 0
        later = [prompt_of(request) for request in server.received[received:]]
        judgements = judge(server.url, run_dir, make_groups(6))

    assert not set(later) & set(killed)
    assert len(later) == 72 - 40
    assert [judgement.totals["cached"] for judgement in judgements] == [12] * 6
    assert [judgement.scores for judgement in judgements] == [(0.0, 1 / 3, 2 / 3, 1.0)] * 6
    assert server.keys == {f"Bearer {KEY}"}
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) == 3, "a log, and answers of two processes"
    assert "Building HTTP request" in (run_dir / "judge-0.log").read_text(), "the client did log"
    assert not [path for path in files if KEY in path.read_text()]


def test_damaged_lines_are_skipped_and_processes_read_what_others_add(tmp_path):
    first, second = AnswerCache(tmp_path), AnswerCache(tmp_path)
    first.add(3, "a" * 32, Reply("one\nline\u2028 \r", 5, 6), "0 7")
    [file] = (tmp_path / "000003").glob("*.jsonl")
    with file.open("ab") as stream:
        stream.write(b'{"key": "cut off\r\n\xff\xfe\n[1]\n{"key": 1}\n')
    first.add(3, "b" * 32, Reply("two"), "0 7")
    with file.open("ab") as stream:
        stream.write(b'{"key": "' + b"c" * 32)
    second.refresh(3)
    assert second.get(3, "a" * 32) == (Reply("one\nline\u2028 \r", 5, 6), "0 7")
    assert second.get(3, "b" * 32) == (Reply("two"), "0 7")
    assert second.get(3, "c" * 32) is None
    second.add(3, "d" * 32, Reply("three"), "1 7")
    assert first.get(3, "d" * 32) is None
    first.refresh(3)
    assert first.get(3, "d" * 32) == (Reply("three"), "1 7")
    assert len(list((tmp_path / "000003").glob("*.jsonl"))) == 2
    file.unlink()
    assert second.get(3, "a" * 32) is None


# ---------------------------------------------------------------------------------------------------------- the policy


def judge_by_policy(run_dir: Path, groups: Sequence[CompletionGroup], complete: Any, **args: Any) -> list[Judgement]:
    policy = bind_judge(Component(use="policy", args=args), context(run_dir, complete))()
    scores: Any = policy(groups)
    return check_scores(groups, asyncio.run(scores))


def test_the_policy_scores_each_completion_three_times_by_the_additive_rubric_at_its_own_temperature(tmp_path, group):
    asked = []

    async def complete(messages: Messages, sampling: SamplingConfig) -> str:
        asked.append((messages[0]["content"], sampling))
        [response] = responses({"messages": messages})
        return f"Thoughts.\n\nScore: {len(response.split()) + len(asked) % 2}"

    [judgement] = judge_by_policy(tmp_path, [group("one", "two words")], complete)
    assert len(asked) == 6
    assert {sampling for _, sampling in asked} == {SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=512)}
    assert all("starting at 0" in prompt and "question 0" in prompt for prompt, _ in asked)
    assert judgement.scores == pytest.approx((1 + 2 / 3, 2 + 1 / 3))  # 2, 1, 2 and 2, 3, 2 by the parity of the call
    assert judgement.totals == {"requests": 6, "cached": 0, "parse_failures": 0, "unparsed": 0}


def test_the_policy_compares_pairwise_too_and_a_resumed_round_asks_it_nothing_again(tmp_path, group):
    calls = 0

    async def complete(messages: Messages, sampling: SamplingConfig) -> str:
        nonlocal calls
        calls += 1
        return longer_wins({"messages": messages})

    for _ in range(2):
        [judgement] = judge_by_policy(tmp_path, [group(*TEXTS)], complete, mode="pairwise", comparisons=3)
    assert calls == 6
    assert judgement.totals["cached"] == 6
    assert judgement.means == {"swap_agreement": 1.0}


def test_an_error_of_the_engines_is_raised_after_all_other_questions_are_answered(tmp_path, group):
    answered = 0

    async def complete(messages: Messages, sampling: SamplingConfig) -> str:
        nonlocal answered
        if "a bad one" in messages[0]["content"]:
            raise ValueError("prompt -1 has 900 tokens")
        await asyncio.sleep(0.05)
        answered += 1
        return '{"score": 1}'

    with pytest.raises(ValueError, match="900 tokens"):
        judge_by_policy(tmp_path, [group("a bad one", "b", "c")], complete, samples=1)
    assert answered == 2


def test_prompts_that_the_endpoint_rejects_never_make_it_unavailable(tmp_path):
    with serving(lambda request: 413) as server, pytest.raises(EndpointFailed, match="answered 413"):
        judge(server.url, tmp_path, make_groups(3), retries=0, concurrency=1)
    assert len(server.received) == 36
