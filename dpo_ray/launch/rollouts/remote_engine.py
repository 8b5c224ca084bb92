"""An engine in an actor, for the processes that call it. Light to import."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError

from dpo_ray.rollout.engine import EngineStatus, MessageLost, Request
from dpo_ray.storage import error_summary
from dpo_ray.types import CompletionGroup

UNAVAILABLE_S = 1.0
"""Seconds between two calls of an engine that is alive and cannot be reached."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of a transport in the object store, which each engine's node fetches once."""

    ref: Any
    """Object reference. Ray passes it on as it is, since it is not an argument itself."""


@dataclass(frozen=True, slots=True)
class RemoteEngine:
    """The ``Engine`` of an EngineActor. An exception of the engine is raised as it is, its death as a RayActorError."""

    handle: Any

    async def generate(self, request: Request) -> CompletionGroup:
        return await actor_result(self.handle.generate.remote(request))

    async def status(self) -> EngineStatus:
        """An engine that cannot be reached for a moment is called again."""
        while True:
            try:
                return await actor_result(self.handle.status.remote())
            except ActorUnavailableError:
                await asyncio.sleep(UNAVAILABLE_S)

    async def abort(self) -> None:
        await actor_result(self.handle.abort.remote())

    async def start_update(self) -> None:
        await actor_result(self.handle.start_update.remote())

    async def init_transfer(self, info: Mapping[str, Any]) -> None:
        await actor_result(self.handle.init_transfer.remote(info))

    async def load(self, message: Any) -> None:
        """Ray fetches a stored message to the engine's node."""
        try:
            await actor_result(self.handle.load.remote(message.ref if isinstance(message, StoredMessage) else message))
        except ObjectLostError as error:
            raise MessageLost(error_summary(error)) from None

    async def finish_update(self, version: int) -> str:
        return await actor_result(self.handle.finish_update.remote(version))

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        return await actor_result(self.handle.token_logps.remote(token_ids))

    async def serve(self) -> None:
        await actor_result(self.handle.serve.remote())

    async def sleep(self) -> None:
        await actor_result(self.handle.sleep.remote())


async def actor_result(call: Awaitable[Any], *, died: Exception | None = None) -> Any:
    """The result of an actor's method, whose own exception is raised without Ray's wrapper.

    Args:
        died: raised if the actor died; None raises the RayActorError.
    """
    try:
        return await call
    except RayTaskError as error:
        raise error.cause or error from None
    except RayActorError as error:
        raise died or error from None
