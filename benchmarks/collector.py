"""Throughput and memory of one collector with many engines; engines and judges are fakes, the ledger is real.

Engines answer at once, each with tokens and texts of its own; a judge may take its time, so that groups wait for it.
Ray's calls are not part of it.

python -m benchmarks.collector --prompts 100000 --engines 1000
"""

import argparse
import asyncio
import resource
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_ray.config.rounds import OnlineConfig
from dpo_ray.launch.rollouts.collector import SEQUENCES_PER_ENGINE
from dpo_ray.rollout.collector import Collector
from dpo_ray.rollout.dispatch import Dispatcher
from dpo_ray.rollout.engine import EngineStatus, Request
from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.rollout.judging import JudgePool
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.rollout.membership import Member, Membership
from dpo_ray.rollout.selectors import best_vs_worst, select_pairs
from dpo_ray.types import Completion, CompletionGroup, Judgement, Prompt

CANDIDATES = 4


class InstantEngine:
    """Completes every prompt at once with completions of ``tokens`` tokens."""

    def __init__(self, tokens: int) -> None:
        self.ids, self.text = array("i", range(1000, 1000 + tokens)), "word " * tokens

    async def generate(self, request: Request) -> CompletionGroup:
        """Four completions."""
        await asyncio.sleep(0)
        completions = [Completion(f"{self.text}{i}", self.ids[:], finished=True) for i in range(CANDIDATES)]
        return CompletionGroup(request.prompt, tuple(completions), request.seed)


class SteadyJudge:
    """Scores 0 to 3, ``seconds`` after it was asked."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def score(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        """The same scores for every group."""
        await asyncio.sleep(self.seconds)
        return [Judgement((0.0, 1.0, 2.0, 3.0)) for _ in groups]

    async def idle(self) -> None:
        """At once."""

    async def ready(self) -> None:
        """At once."""

    async def restart(self) -> None:
        """Nothing to restart."""


async def collect(folder: Path, prompts: int, engines: int, tokens: int, judge_s: float) -> float:
    """Collects one round; returns seconds."""
    engine = InstantEngine(tokens)
    members = tuple(Member(f"{i}.1", engine, 0) for i in range(engines))  # pyrefly: ignore

    async def membership(after: int, wait_s: float) -> Membership:
        if after == 0:
            await asyncio.sleep(wait_s)
        return Membership(0, members, engines)

    async def statuses() -> dict[str, EngineStatus]:
        return {}

    async def suspect(member: str, reason: str) -> None:
        raise AssertionError(f"{member}: {reason}")

    online = OnlineConfig(prompts=("p.jsonl",), rounds=1, prompts_per_round=prompts, candidates=CANDIDATES)
    dispatcher = Dispatcher(membership, suspect)
    judge = JudgePool([SteadyJudge(judge_s)], batch=16, capacity=Capacity(32), timeout_s=60, retries=0)
    collector = Collector(
        online,
        seed=0,
        keep_rounds=None,
        prompts=[Prompt(i, ({"role": "user", "content": "?"},), tuple(range(100))) for i in range(prompts)],
        held_out=[],
        ledger=Ledger(folder),
        engines=dispatcher,
        judge=judge.score,
        eval_judge=judge.score,
        select=lambda group, scores: select_pairs(best_vs_worst, group, scores),
        in_flight=engines * SEQUENCES_PER_ENGINE // CANDIDATES,
        statuses=statuses,
        progress=lambda *said: None,
    )
    background = [asyncio.ensure_future(judge.run()), asyncio.ensure_future(dispatcher.follow())]
    started = time.perf_counter()
    progress = await collector.poll(0, round=0, evaluations=[], wait_s=3600)
    assert progress.finished, progress.error
    seconds = time.perf_counter() - started
    for task in background:
        task.cancel()
    return seconds


def read_share(folder: Path, ranks: int) -> float:
    """Seconds in which one of ``ranks`` ranks opens a round and reads its share."""
    started = time.perf_counter()
    pairs = Ledger(folder).read(0).pairs
    for index in range(0, len(pairs), ranks):
        np.sum(pairs.tokens(index))
    return time.perf_counter() - started


def main() -> None:
    """Prints groups per second, memory, and how long ranks take to read their shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--engines", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=1000, help="per completion")
    parser.add_argument("--judge-s", type=float, default=0.0, help="seconds per call of 16 groups, 2 at a time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = asyncio.run(
            collect(Path(folder), arguments.prompts, arguments.engines, arguments.tokens, arguments.judge_s)
        )
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.*")) / 2**30
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{arguments.prompts:,} groups of {CANDIDATES} x {arguments.tokens} tokens from {arguments.engines} "
            f"engines: {arguments.prompts / seconds:,.0f} groups/s, {memory:.2f} GiB at most, {size:.2f} GiB on disk"
        )
        shares = ", ".join(f"1/{ranks}: {read_share(Path(folder), ranks):.2f} s" for ranks in (1, 8, 64))
        print(f"reading a rank's share of the pairs: {shares}")


if __name__ == "__main__":
    main()
