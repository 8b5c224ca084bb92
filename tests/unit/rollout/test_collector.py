"""The collector over fake engines, judges and a real ledger: rounds, evaluations, failures and restarts."""

import asyncio
import json
import math
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

from dpo_ray.config import Component
from dpo_ray.config.rounds import SamplingConfig
from dpo_ray.data.loader import checked_gaps
from dpo_ray.rollout.collector import Collector
from dpo_ray.rollout.dispatch import Dispatcher
from dpo_ray.rollout.engine import Request, RequestTimedOut
from dpo_ray.rollout.evaluation import Evaluation, EvaluationStore
from dpo_ray.rollout.judges import bind_judge, endpoint
from dpo_ray.rollout.judges.answer_cache import CACHE
from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.rollout.judging import JudgePool
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.rollout.pipeline import TooManyFailed
from dpo_ray.rollout.selectors import best_vs_worst, select_pairs
from dpo_ray.types import Completion, Judgement
from tests.unit.rollout.fakes import FakeEngine, FakeFleet, FakeReplica, online, prompts, raise_for

PROMPTS = 32


class Harness:
    """A collector with its engines and judge, as one process would have them."""

    def __init__(self, folder, config, engines, replica=None, held_out=0, in_flight=8, judge_timeout_s=1.0):
        self.fleet, self.replica = FakeFleet(*engines), replica or FakeReplica()
        self.ledger, self.progress = Ledger(folder), []
        dispatcher = Dispatcher(self.fleet.membership, self.fleet.suspect)
        judge = JudgePool([self.replica], batch=4, capacity=Capacity(4), timeout_s=judge_timeout_s, retries=1)
        self.collector = Collector(
            config,
            seed=0,
            keep_rounds=config.keep_rounds,
            prompts=prompts(PROMPTS),
            held_out=prompts(held_out),
            ledger=self.ledger,
            engines=dispatcher,
            judge=judge.score,
            eval_judge=judge.score,
            select=lambda group, scores: select_pairs(best_vs_worst, group, scores),
            in_flight=in_flight,
            statuses=self.fleet.statuses,
            progress=lambda *said: self.progress.append(said),
        )
        self.background = [asyncio.ensure_future(judge.run()), asyncio.ensure_future(dispatcher.follow())]

    async def round(self, round, version=None, evaluations=()):
        """Poll until a round is finished; returns the last answer."""
        async with asyncio.timeout(10):
            while True:
                version = round if version is None else version
                progress = await self.collector.poll(version, round=round, evaluations=evaluations, wait_s=0.2)
                if progress.finished or progress.error:
                    return progress

    async def evaluation(self, version):
        """Poll until an evaluation is complete; returns it."""
        async with asyncio.timeout(10):
            while True:
                progress = await self.collector.poll(version, round=None, evaluations=[version], wait_s=0.2)
                assert progress.error is None
                if progress.evaluations:
                    return progress.evaluations[0]

    async def die(self):
        """Stop everything at once, as a killed process does."""
        tasks = [*self.background, *self.collector._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def indices(ledger, round):
    return [line["prompt_index"] for line in ledger.lines(round)]


def test_the_rounds_of_an_epoch_have_every_prompt_once_and_name_the_policy_that_generated_them(tmp_path):
    async def main():
        harness = Harness(tmp_path, online(), [FakeEngine(0), FakeEngine(0)])
        for round in range(4):
            harness.fleet.publish(round)
            assert not (await harness.round(round)).error
        assert harness.progress[-1] == ("generating", 8, 8)
        return harness.ledger

    ledger = asyncio.run(main())
    assert sorted(index for round in range(4) for index in indices(ledger, round)) == list(range(PROMPTS))
    manifests = [ledger.manifest(round) for round in range(4)]
    assert [manifest["policy_version"] for manifest in manifests] == [0, 1, 2, 3]
    assert [manifest["weights_digests"] for manifest in manifests] == [
        {"0": ["d0"]},
        {"1": ["d1"]},
        {"2": ["d2"]},
        {"3": ["d3"]},
    ]
    metrics = ledger.read(2).metrics
    assert metrics["perf/push_s"] == 0.5
    engines = {key.removeprefix("engine/"): value for key, value in metrics.items() if key.startswith("engine/")}
    assert engines == {"running": 4, "waiting": 2, "tokens_per_busy_s": 100.0, "cache_hit_rate": 0.25}
    assert next(ledger.lines(0))["fields"] == {"answer": next(ledger.lines(0))["prompt_index"]}


def test_the_manifest_names_the_weights_of_all_versions_also_of_a_round_that_was_continued(tmp_path):
    """Version 1 arrives while groups are generated; the collector is restarted before the round ends."""

    def act(request):
        """All of round 0 and three groups of round 1; three more after the update; no others."""
        if request.round == 0:
            return None
        number = sum(asked.round for asked in engine.requests)
        return None if number <= 3 else updated.wait() if number <= 6 else asyncio.sleep(60)

    async def collected(count):
        async with asyncio.timeout(10):
            while not (file := tmp_path / "rounds/000001/pairs.jsonl").exists() or file.read_text().count("\n") < count:
                await asyncio.sleep(0.01)

    async def main():
        first = Harness(tmp_path, online(max_lag=1), [engine], in_flight=2)
        await first.round(0)
        await collected(3)
        first.fleet.publish(1)
        updated.set()
        await collected(6)
        await first.die()
        second = Harness(tmp_path, online(max_lag=1), [FakeEngine(1)])
        await second.round(1)
        return second.ledger.manifest(1)

    updated, engine = asyncio.Event(), FakeEngine(0, act)
    manifest = asyncio.run(main())
    assert manifest["policy_versions"] == {"0": 4 * 3, "1": 4 * 5}
    assert manifest["weights_digests"] == {"0": ["d0"], "1": ["d1"]}
    assert not (tmp_path / "rounds/000001/digests.json").exists()


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_collection_runs_ahead_by_max_lag_rounds_and_no_further(tmp_path, lag):
    async def main():
        harness = Harness(tmp_path, online(max_lag=lag), [FakeEngine(0)])
        await harness.round(0)
        for _ in range(10):
            await harness.collector.poll(0, round=None, evaluations=[], wait_s=0.05)
        return [harness.ledger.finished(round) for round in range(4)]

    assert asyncio.run(main()) == [round <= lag for round in range(4)]


def test_a_round_is_generated_while_its_first_groups_are_judged(tmp_path):
    async def main():
        asked = []

        def judge(groups):
            asked.append(len(engine.requests))
            return asyncio.sleep(0.05)

        engine = FakeEngine(0, lambda _: asyncio.sleep(0.05), max_sequences=8)
        harness = Harness(tmp_path, online(prompts_per_round=16), [engine], FakeReplica(judge))
        started = time.perf_counter()
        await harness.round(0)
        return time.perf_counter() - started, harness.ledger.manifest(0)["timings"], engine.most, asked

    seconds, timings, most, asked = asyncio.run(main())
    assert most == 2
    assert asked[0] <= 4, "the first two groups are judged when two others are generated"
    assert timings["generate_s"] >= 0.4, "16 groups, two at a time, 0.05 s each"
    assert timings["judge_s"] >= 0.2
    assert seconds < timings["generate_s"] + timings["judge_s"]


def test_a_collector_that_dies_in_the_middle_goes_on_without_repeating_a_prompt(tmp_path):
    async def main():
        slow = FakeEngine(0, lambda request: asyncio.sleep(0.02 * (1 + request.prompt.index % 5)))
        first = Harness(tmp_path, online(prompts_per_round=16), [slow], in_flight=4)
        await first.collector.poll(0, round=0, evaluations=[], wait_s=0.1)
        await first.die()
        done = len((tmp_path / "rounds/000000/pairs.jsonl").read_text().splitlines())
        assert 0 < done < 16
        engine = FakeEngine(0)
        second = Harness(tmp_path, online(prompts_per_round=16), [engine])
        await second.round(0)
        return done, engine, second.ledger

    done, engine, ledger = asyncio.run(main())
    assert len(engine.requests) == 16 - done
    assert Counter(Counter(indices(ledger, 0)).values()) == {1: 16}

    async def undisturbed():
        harness = Harness(tmp_path / "other", online(prompts_per_round=16), [FakeEngine(0)])
        await harness.round(0)
        return harness.ledger

    other = asyncio.run(undisturbed())
    pairs, others = ledger.read(0).pairs, other.read(0).pairs
    assert [pairs[i] for i in range(16)] == [others[i] for i in range(16)], "in the same order"


def test_groups_that_became_too_old_are_collected_again(tmp_path):
    async def main():
        ahead = Harness(tmp_path, online(max_lag=2), [FakeEngine(0)])
        await ahead.round(0)
        await ahead.round(2, version=0)  # two rounds ahead, with version 0
        strict = Harness(tmp_path, online(max_lag=1), [FakeEngine(1)])
        assert not strict.collector._complete(2)
        await strict.round(1, version=1)
        await strict.round(2, version=1)
        return strict.ledger

    ledger = asyncio.run(main())
    manifest = ledger.manifest(2)
    assert manifest["policy_version"] == 1
    assert manifest["counts"]["stale"] == 8


def test_failures_are_counted_by_kind_and_the_round_ends_well(tmp_path):
    """16 prompts: one is too long, one times out, two make the judge raise, one makes it hang, two have no score."""
    numbers = {index: position for position, index in enumerate(asyncio.run(_order(tmp_path / "order")))}
    at = {position: index for index, position in numbers.items()}

    async def main():
        def generate(request):
            raise_for([at[0]], ValueError("too long"))(request)
            raise_for([at[1]], RequestTimedOut("late"))(request)

        def judge(groups):
            raise_for([at[2], at[3]], RuntimeError("unreadable"))(groups)
            return asyncio.sleep(60) if at[4] in {group.prompt.index for group in groups} else None

        replica = FakeReplica(judge)
        scores = replica.score

        async def with_nan(groups):
            rows = await scores(groups)
            bad = (at[5], at[6])
            return [
                Judgement((math.nan,) * len(row.scores)) if g.prompt.index in bad else row
                for g, row in zip(groups, rows, strict=True)
            ]

        replica.score = with_nan
        config = online(prompts_per_round=16, max_failed_share=0.4)
        harness = Harness(tmp_path / "run", config, [FakeEngine(0, generate)], replica, judge_timeout_s=0.1)
        progress = await harness.round(0)
        return progress, harness

    progress, harness = asyncio.run(main())
    assert progress.error is None
    counts = harness.ledger.manifest(0)["counts"]
    assert counts["dropped"] == {"bad_score": 2, "failed_generate": 2, "failed_judge": 3}
    assert (counts["prompts"], counts["kept"]) == (16, 9)
    assert harness.fleet.suspected == []


async def _order(folder):
    harness = Harness(folder, online(prompts_per_round=16), [FakeEngine(0)])
    await harness.round(0)
    lines = sorted(harness.ledger.lines(0), key=lambda line: line["position"])
    return [line["prompt_index"] for line in lines]


def test_too_many_failures_end_the_run_with_their_kinds_and_the_first_one(tmp_path):
    async def main():
        replica = FakeReplica(raise_for(range(PROMPTS), RuntimeError("no key in the environment")))
        config = online(prompts_per_round=16)
        return await Harness(tmp_path, config, [FakeEngine(0)], replica).round(0)

    error = asyncio.run(main()).error
    assert error is not None
    assert "2 of 16 groups of round 0 failed (judge: 2), more than online.max_failed_share (0.1) allows" in error
    assert "no key in the environment" in error

    async def again():
        harness = Harness(tmp_path, online(prompts_per_round=16), [FakeEngine(0)])
        await harness.round(0)
        return harness.ledger.manifest(0)["counts"]

    assert asyncio.run(again())["dropped"] == {}, "the same command collects failed groups again"


@pytest.mark.parametrize("kind", ["round", "evaluation"])
def test_a_reward_server_that_is_down_ends_the_run_with_one_sentence(tmp_path, monkeypatch, kind):
    """However many groups may fail. The judge is the real one; nobody listens at its port."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    args = {"url": "http://127.0.0.1:9", "format": "vllm", "retries": 1, "max_failures": 3}

    async def main():
        judge = bind_judge(Component(use="http", args=args))()
        replica = FakeReplica()
        monkeypatch.setattr(FakeReplica, "score", lambda self, groups: judge(groups))
        harness = Harness(tmp_path, online(max_failed_share=1), [FakeEngine(0)], replica, held_out=4)
        if kind == "round":
            return await harness.round(0)
        async with asyncio.timeout(10):
            while not (progress := await harness.collector.poll(0, round=None, evaluations=[0], wait_s=0.2)).error:
                pass
        return progress

    error = asyncio.run(main()).error
    assert error is not None
    assert error.startswith("JudgeUnavailable: judge 'http': http://127.0.0.1:9/classify is unavailable: ")
    assert (
        "requests in a row failed (online.judge.args.max_failures is 3, each was tried up to 2 times); the last: "
        in error
    )
    assert "\n" not in error


def test_a_full_disk_ends_the_run_with_its_error(tmp_path, monkeypatch):
    def full(self, outcome):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpo_ray.rollout.open_round.OpenRound.append", full)
    error = asyncio.run(_one_round(tmp_path)).error
    assert error is not None
    assert "No space left on device" in error


async def _one_round(folder):
    return await Harness(folder, online(), [FakeEngine(0)]).round(0)


def test_no_engine_for_a_while_is_no_error_and_weights_are_asked_for(tmp_path):
    async def main():
        harness = Harness(tmp_path, online(), [])
        harness.fleet.unplaced = True
        harness.fleet.change()
        await asyncio.sleep(0.05)
        unplaced = await harness.collector.poll(0, round=0, evaluations=[], wait_s=0.05)
        assert (unplaced.finished, unplaced.unplaced, unplaced.error) == (False, True, None)
        harness.fleet.unplaced, harness.fleet.needs_weights = False, True
        harness.fleet.change()
        await asyncio.sleep(0.05)
        waiting = await harness.collector.poll(0, round=0, evaluations=[], wait_s=0.05)
        assert (waiting.finished, waiting.needs_weights, waiting.error) == (False, True, None)
        harness.fleet.engines[0] = FakeEngine(0)
        harness.fleet.needs_weights = False
        harness.fleet.change()
        return await harness.round(0)

    assert asyncio.run(main()).finished


def test_an_evaluation_is_of_one_version_goes_first_and_does_not_hold_up_the_round(tmp_path):
    async def main():
        round_done = asyncio.Event()
        engine = FakeEngine(0, lambda request: round_done.wait() if request.evaluation else None)
        config = online(sampling={"temperature": 0.7}, kl_samples=3)
        harness = Harness(tmp_path, config, [engine], held_out=4)
        progress = await harness.round(0, evaluations=[0])
        assert progress.evaluations == ()
        round_done.set()
        return await harness.evaluation(0), engine

    evaluation, engine = asyncio.run(main())
    assert [group.prompt.index for group, _ in evaluation.judged] == [0, 1, 2, 3]
    assert [score for _, score in evaluation.judged] == [0.0] * 4
    asked = [request for request in engine.requests if request.evaluation]
    assert Counter(request.sampling.temperature for request in asked) == {0.7: 4, 1.0: 3}
    assert evaluation.token_samples[0].prompt == (0,)
    assert evaluation.engine_logps == [-1.0] * 3


def test_completions_at_temperature_one_are_judged_and_serve_as_samples(tmp_path):
    async def main():
        engine = FakeEngine(0)
        harness = Harness(tmp_path, online(), [engine], held_out=4)
        return await harness.evaluation(0), engine

    evaluation, engine = asyncio.run(main())
    assert len([request for request in engine.requests if request.evaluation]) == 4
    assert evaluation.samples == tuple(group for group, _ in evaluation.judged)


async def evaluate(harness, version, asked):
    """The evaluations of versions, by the version asked for."""
    answers = ()
    async with asyncio.timeout(10):
        while len(answers) < len(asked):
            answers = (await harness.collector.poll(version, round=None, evaluations=asked, wait_s=0.2)).evaluations
    return {answer.requested: answer for answer in answers}


def test_an_evaluation_whose_version_is_gone_is_of_the_version_that_the_engines_have(tmp_path):
    async def main():
        harness = Harness(tmp_path / "one", online(), [FakeEngine(3)], held_out=4)
        alone = await evaluate(harness, 3, [2])
        harness = Harness(tmp_path / "two", online(), [FakeEngine(3)], held_out=4)
        several = await evaluate(harness, 3, [0, 1, 2])
        harness = Harness(tmp_path / "own", online(), [FakeEngine(3)], held_out=4)
        return alone, several, await evaluate(harness, 3, [2, 3])

    alone, several, beside_its_own = asyncio.run(main())
    assert (alone[2].version, alone[2].instead_of, len(alone[2].judged)) == (3, 2, 4)
    assert sorted(len(answer.judged) for answer in several.values()) == [0, 0, 4], "version 3 is evaluated once"
    assert {requested: len(answer.judged) for requested, answer in beside_its_own.items()} == {2: 0, 3: 4}


def test_an_evaluation_is_repeated_where_the_engines_move_on_in_the_middle(tmp_path):
    async def main():
        moved = asyncio.Event()

        async def act(request):
            if request.prompt.index == 3 and not moved.is_set():
                moved.set()
                harness.fleet.publish(4)
                raise ConnectionError("died")  # sent again, when all engines are newer

        engines = [FakeEngine(3, act), FakeEngine(3)]
        harness = Harness(tmp_path, online(), engines, held_out=4)
        return await evaluate(harness, 4, [3])

    (evaluation,) = asyncio.run(main()).values()
    assert (evaluation.version, len(evaluation.judged), evaluation.failed) == (4, 4, 0)


def test_one_failing_held_out_prompt_is_a_gap(tmp_path):
    async def main():
        failing = FakeEngine(0, raise_for([1], ValueError("too long")))
        replica = FakeReplica(raise_for([2], RuntimeError("no")))
        gap = Harness(tmp_path / "gap", online(max_failed_share=1), [failing], replica, held_out=4)
        return await gap.evaluation(0)

    gap = asyncio.run(main())
    assert [group.prompt.index for group, _ in gap.judged] == [0, 2, 3]
    assert [math.isnan(score) for _, score in gap.judged] == [False, True, False]
    assert gap.failed == 1


def test_an_evaluation_that_finished_while_others_are_asked_for_is_delivered_once(tmp_path):
    async def main():
        engine = FakeEngine(0)
        harness = Harness(tmp_path, online(max_lag=1), [engine], held_out=2)
        await harness.round(0, evaluations=[0])
        harness.fleet.publish(1)
        delivered = []
        while len(delivered) < 2:
            asked = [version for version in (0, 1) if version not in delivered]
            progress = await harness.collector.poll(1, round=1, evaluations=asked, wait_s=0.1)
            delivered += [evaluation.version for evaluation in progress.evaluations]
            assert not any(evaluation.empty for evaluation in progress.evaluations)
        return delivered, Counter(request.seed for request in engine.requests if request.evaluation)

    delivered, requests = asyncio.run(main())
    assert sorted(delivered) == [0, 1]
    assert set(requests.values()) == {2}, "once per version"


def test_groups_of_engines_that_went_back_to_an_older_policy_are_generated_again(tmp_path):
    """Engines listed with version 2 load version 1 for trainers that restarted, while requests wait in them."""

    async def main():
        released = asyncio.Event()
        engine = FakeEngine(2, lambda request: None if released.is_set() else released.wait())
        harness = Harness(tmp_path, online(), [engine])
        await harness.collector.poll(2, round=2, evaluations=[], wait_s=0.1)
        engine.version = 1
        harness.fleet.change()
        await asyncio.sleep(0.05)
        released.set()
        assert (await harness.round(1)).error is None
        harness.fleet.publish(2)
        assert (await harness.round(2)).error is None
        return [harness.ledger.manifest(round)["policy_versions"] for round in (1, 2)]

    assert asyncio.run(main()) == [{"1": 32}, {"2": 32}]


def test_an_evaluation_waits_for_engines_that_are_loading_its_version(tmp_path):
    async def main():
        harness = Harness(tmp_path, online(), [FakeEngine(3)], held_out=2)
        waiting = asyncio.ensure_future(harness.evaluation(2))
        await asyncio.sleep(0.3)
        harness.fleet.publish(2)
        return await waiting

    assert [group.policy_version for group, _ in asyncio.run(main()).judged] == [2, 2]


def test_lines_of_a_round_are_json_that_anybody_reads(tmp_path):
    asyncio.run(_one_round(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "rounds/000000/pairs.jsonl").read_text().splitlines()]
    assert {line["pairs"][0]["chosen"] for line in lines} == {3}
    assert {line["pairs"][0]["rejected_score"] for line in lines} == {0.0}


def with_answers(count):
    return [
        replace(prompt, answer=Completion("the answer", (5, 6, 7), False, sampled=False)) for prompt in prompts(count)
    ]


def test_self_play_prefers_the_answer_to_each_completion_of_the_policy(tmp_path):
    async def main():
        harness = Harness(tmp_path, online(source={"use": "self_play"}, candidates=2), [FakeEngine(0)])
        harness.collector.prompts = with_answers(PROMPTS)
        await harness.round(0)
        return harness.ledger, harness.replica

    ledger, judge = asyncio.run(main())
    pairs = ledger.read(0).pairs
    assert len(pairs) == 2 * 8
    assert {pairs[i].chosen for i in range(len(pairs))} == {(5, 6, 7)}
    assert all(pairs[i].rejected != (5, 6, 7) for i in range(len(pairs)))
    assert judge.batches == [], "no judge is asked"
    line = next(ledger.lines(0))
    answer = {"text": "the answer", "tokens": 3, "finished": False, "versions": [0, 0], "sampled": False}
    assert line["candidates"][-1] == answer
    counts = json.loads((ledger.path(0) / "manifest.json").read_text())["counts"]
    assert counts["candidates"] == 2 * 8, "the answers are not counted"
    assert counts["left_out"] == {}
    assert counts["truncated"] == 0
    assert counts["tokens_generated"] == counts["tokens"] == counts["tokens_stored"] - 8 * (3 + 1), (
        "prompts have one token"
    )


def test_replies_of_judges_go_with_the_rounds_that_are_not_kept(tmp_path):
    """Round r has tokens of policy version r - 1 on: of rounds 3 and 4, which are kept, version 2."""
    replies = [tmp_path / CACHE / f"{version:06d}" / "judge.jsonl" for version in range(6)]
    for file in replies:
        file.parent.mkdir(parents=True)
        file.touch()

    async def poll(keep_rounds, evaluations=()):
        harness = Harness(tmp_path, online(max_lag=1, keep_rounds=keep_rounds), [FakeEngine(0)])
        await harness.collector.poll(5, round=None, evaluations=evaluations, wait_s=0)

    asyncio.run(poll(None))
    assert all(file.exists() for file in replies)
    asyncio.run(poll(2, evaluations=[1]))
    assert [file.exists() for file in replies] == [False, True, True, True, True, True], "version 1 is being judged"
    asyncio.run(poll(2))
    assert [file.exists() for file in replies] == [False, False, True, True, True, True]


def test_an_evaluation_has_the_sums_and_the_means_of_the_judges_metrics(tmp_path):
    class Counting(FakeReplica):
        async def score(self, groups):
            return [
                replace(
                    judgement,
                    totals={"tokens": 10.0, "retries": 0.0},
                    means={"seconds": float(group.prompt.index), "never": math.nan},
                    parts={"format": (math.nan if group.prompt.index else 0.5,)},
                )
                for group, judgement in zip(groups, await super().score(groups), strict=True)
            ]

    async def main():
        harness = Harness(tmp_path, online(eval_prompts="h.jsonl"), [FakeEngine(0)], replica=Counting(), held_out=5)
        return await harness.evaluation(0)

    evaluation = asyncio.run(main())
    assert evaluation.judge_metrics == {"seconds": 2.0, "format_score": 0.5, "tokens": 5 * 10.0, "retries": 0.0}
    assert evaluation.failed == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (2 + 0.5) / 4),
        ({"eval_judge": {"use": "sentiment"}}, None),
        ({"judge": {"use": "policy"}}, (2 + 0.5) / 4),
        ({"eval_prompts": []}, None),
    ],
    ids=["same judge", "judge of its own", "judge by a rubric", "no held-out prompts"],
)
def test_chosen_completions_are_compared_with_held_out_ones_of_an_earlier_policy(tmp_path, settings, expected):
    """All chosen completions score 3, the best of four."""
    held_out = prompts(5)

    def evaluate(version, scores):
        groups = [asyncio.run(FakeEngine(version).generate(Request(p, SamplingConfig(), 1, 0, 1.0))) for p in held_out]
        judged = tuple(zip(groups, scores, strict=True))
        EvaluationStore(tmp_path).write(Evaluation(version, judged), None, None)

    async def main():
        harness = Harness(tmp_path, online(**{"eval_prompts": "h.jsonl"} | settings), [FakeEngine(1)])
        await harness.round(1)
        return harness.ledger

    evaluate(0, [1.0, 2.0, 3.0, 4.0, math.nan])
    evaluate(1, [9.0] * 5)  # of the policy that generates the round
    ledger = asyncio.run(main())
    assert ledger.read(1).metrics.get("judge/chosen_win_rate") == expected
    assert ledger.manifest(1)["judge"].get("chosen_win_rate") == expected


def test_a_round_that_the_trainer_judges_gets_its_pairs_from_scores_of_all_completions(tmp_path):
    async def main():
        config = online(judge={"use": "implicit"}, candidates=3)
        harness = Harness(tmp_path, config, [FakeEngine(0, raise_for([3], RequestTimedOut("late")))])
        await harness.round(0)
        return harness.ledger

    ledger = asyncio.run(main())
    data = ledger.read(0)
    assert not data.judged
    assert len(data.pairs) == 0
    stored = ledger.samples(0)
    samples = [stored[index] for index in range(len(stored))]
    assert stored.lengths.tolist() == [[len(s.prompt), len(s.completion)] for s in samples]
    failed = sum(line["error"] is not None for line in ledger.lines(0))
    assert len(samples) == 3 * (8 - failed)
    select = partial(select_pairs, best_vs_worst)
    scores, manifest = [-float(i % 3) for i in range(len(samples))], ledger.path(0) / "manifest.json"
    unjudged = manifest.read_text()
    ledger.judge(0, scores, select, max_failed_share=0.1)
    manifest.write_text(unjudged)  # as if it was killed before the last file
    assert not ledger.read(0).judged
    ledger.judge(0, scores, select, max_failed_share=0.1)
    data = ledger.read(0)
    assert data.judged
    assert len(data.pairs) == 8 - failed
    by_prompt = {sample.prompt: [s.completion for s in samples if s.prompt == sample.prompt] for sample in samples}
    for index in range(len(data.pairs)):
        pair = data.pairs[index]
        assert (pair.chosen, pair.rejected) == (by_prompt[pair.prompt][0], by_prompt[pair.prompt][2])
    assert checked_gaps(data.pairs).tolist() == [2.0] * len(data.pairs)
    assert data.metrics["judge/chosen_score"] == 0.0
    assert data.metrics["judge/rejected_score"] == -2.0
    assert data.metrics["rollout/kept"] == 8 - failed


def test_a_selector_that_raises_over_a_group_of_a_late_round_costs_that_group_only(tmp_path):
    async def main():
        harness = Harness(tmp_path, online(judge={"use": "implicit"}, candidates=2), [FakeEngine(0)])
        await harness.round(0)
        return harness.ledger

    def select(group, scores):
        if group.prompt.index == first:
            raise RuntimeError("odd group")
        return select_pairs(best_vs_worst, group, scores)

    ledger = asyncio.run(main())
    first = next(ledger.lines(0))["prompt_index"]
    scores = [float(i) for i in range(len(ledger.samples(0)))]
    with pytest.raises(TooManyFailed, match=r"1 of 8 groups of round 0 failed \(select: 1\), more than .* \(0\.1\)"):
        ledger.judge(0, scores, select, max_failed_share=0.1)
    assert not ledger.manifest(0)["judged"], "nothing was written"
    ledger.judge(0, scores, select, max_failed_share=0.2)
    assert len(ledger.read(0).pairs) == 7
    assert ledger.manifest(0)["counts"]["dropped"] == {"failed_select": 1}
    assert next(ledger.lines(0))["error"] == "RuntimeError: odd group"
