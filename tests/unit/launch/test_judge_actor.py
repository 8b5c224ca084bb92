"""A judge's process: the calls in progress in it."""

import asyncio
import pickle
import threading
from collections.abc import Sequence

import pytest

from dpo_ray.config import Config
from dpo_ray.launch.rollouts import judge_actor
from dpo_ray.launch.rollouts.judge_actor import JudgeActor
from dpo_ray.types import Completion, CompletionGroup, Judgement, Prompt

GROUP = CompletionGroup(Prompt(0, (), (1,)), (Completion("a", (2,), True), Completion("b", (3,), True)), 0)


def test_a_judge_is_idle_once_the_calls_in_progress_have_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end = threading.Event(), threading.Event()

    def judge(groups: Sequence[CompletionGroup]) -> list[list[float]]:
        began.set()
        may_end.wait(5.0)
        return [[0.0, 1.0]] * len(groups)

    async def main() -> None:
        config = Config.model_validate({"model": {"path": "m"}, "online": {"prompts": "p.jsonl"}})
        actor = JudgeActor(config.model_dump(mode="json"), "judge", 0, set(), pickle.dumps(None))
        async with asyncio.timeout(5.0):
            await actor.idle()
            call = asyncio.ensure_future(actor.score([GROUP]))
            await asyncio.to_thread(began.wait, 5.0)
            idle = asyncio.ensure_future(actor.idle())
            await asyncio.wait([idle], timeout=0.1)
            assert not idle.done()
            may_end.set()
            await idle
            assert await call == [Judgement((0.0, 1.0))]

    monkeypatch.setattr(judge_actor, "log_to_run", lambda run_dir, name: None)
    monkeypatch.setattr(judge_actor, "bind_judge", lambda component, context: lambda: judge)
    asyncio.run(main())
