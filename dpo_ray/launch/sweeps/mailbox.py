"""The mailbox between the slots of a sweep, whose workers ask, and the driver, which answers."""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import ray

from dpo_ray.launch.cluster import same_node
from dpo_ray.sweep.scheduling import Decision
from dpo_ray.types import Metrics

ASK_TIMEOUT_S = 30.0
"""Longest wait for an answer before the question is asked again."""
ANSWER_TIMEOUT_S = 120.0
"""Longest wait for the actor itself, beyond ASK_TIMEOUT_S."""


Kind = Literal["idle", "begun", "report", "paused", "finished", "failed"]


class Message(NamedTuple):
    """A question of a slot."""

    id: str
    """Differs between questions; the same when a question is asked again."""
    slot: int
    kind: Kind
    trial: str | None = None
    body: Any = None
    """``report``: (metrics, final); ``failed``: (error, retryable)."""


class Task(NamedTuple):
    """The answer to ``idle``: a trial, with the values of its configuration."""

    trial: str
    config: dict[str, Any]
    rollouts: Any = None
    """The actors of an online trial."""


NO_MORE = Task("", {})
"""There is no further trial for the slot."""


class Mailbox:
    """An actor with the open questions of all slots."""

    def __init__(self) -> None:
        self.questions: dict[str, tuple[Message, asyncio.Future[Any]]] = {}
        """Open questions by id."""
        self.unseen: list[Message] = []
        self.news = asyncio.Event()

    async def ask(self, message: Message) -> Any:
        """Waits for the driver's answer; ``None`` if there is none in ASK_TIMEOUT_S."""
        if message.id not in self.questions:
            if message.kind == "idle":  # the workers that asked before are dead
                self.questions = {id: (m, f) for id, (m, f) in self.questions.items() if m.slot != message.slot}
            self.questions[message.id] = (message, asyncio.get_running_loop().create_future())
            self.unseen.append(message)
            self.news.set()
        _, answer = self.questions[message.id]
        try:
            value = await asyncio.wait_for(asyncio.shield(answer), ASK_TIMEOUT_S)
        except TimeoutError:
            return None
        self.questions.pop(message.id, None)
        return value

    async def receive(self, timeout_s: float) -> list[Message]:
        """The questions that the driver has not seen; waits for one."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.news.wait(), timeout_s)
        self.news.clear()
        unseen, self.unseen = self.unseen, []
        return unseen

    async def answer(self, message: Message, value: Any) -> None:
        """Answers a question, unless it is no longer open."""
        if message.id in self.questions and not self.questions[message.id][1].done():
            self.questions[message.id][1].set_result(value)


def start_mailbox() -> Any:
    """A Mailbox on the driver's node, so that it survives the loss of any other node."""
    return ray.remote(num_cpus=0)(Mailbox).options(max_concurrency=1000, scheduling_strategy=same_node()).remote()


@dataclass(frozen=True, slots=True)
class Channel:
    """The mailbox as one slot sees it."""

    mailbox: Any
    slot: int

    def message(self, kind: Kind, trial: str | None = None, body: Any = None) -> Message:
        """A question."""
        return Message(uuid4().hex, self.slot, kind, trial, body)

    def ask(self, kind: Kind, trial: str, body: Any = None) -> Any:
        """The driver's answer; waits without end, since the workers of a dead driver are killed."""
        message = self.message(kind, trial, body)
        while (answer := self.ask_once(message)) is None:
            pass
        return answer

    def ask_once(self, message: Message) -> Any:
        """The driver's answer, or None if it has none yet."""
        return ray.get(self.mailbox.ask.remote(message), timeout=ASK_TIMEOUT_S + ANSWER_TIMEOUT_S)

    def report(self, trial: str, metrics: Metrics, *, final: bool) -> Decision:
        """Reports an evaluation; returns what the trial does next."""
        return self.ask("report", trial, (metrics, final))
