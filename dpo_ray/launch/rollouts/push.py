"""Weights on their way to the engines: the transport, and the pool as the receiver of a push from rank 0."""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from dpo_ray.config import Config
from dpo_ray.plugins import build
from dpo_ray.storage import error_summary
from dpo_ray.sync import TRANSPORTS
from dpo_ray.sync.base import WeightSync

logger = logging.getLogger(__name__)

BETWEEN_GPUS = ("nccl", "ipc")
"""Transports that are nothing without GPUs."""


def build_transport(config: Config, *, on_gpus: bool) -> WeightSync:
    """The configured transport; ``auto`` decided by what the cluster has.

    Raises:
        ValueError: it needs GPUs that are not there or not shared, or its arguments are wrong.
    """
    assert config.online is not None
    sync, shared = config.online.sync, config.cluster.colocate
    if sync.use in BETWEEN_GPUS and not on_gpus:
        raise ValueError(
            f"online.sync.use: {sync.use} moves weights between GPUs and the cluster has none; set auto or object_store"
        )
    if sync.use == "object_store" and shared and on_gpus:
        raise ValueError("online.sync.use: object_store is not for cluster.colocate on GPUs; set auto or ipc")
    on_cards = "ipc" if shared else "nccl"
    use = (on_cards if on_gpus else "object_store") if sync.use == "auto" else sync.use
    return build(use, sync.args, TRANSPORTS, "sync", dtype=config.model.dtype)


class PoolReceiver:
    """The engines as one receiver of weights: the EngineGroup of rank 0, straight from trainer to engines.

    Neither driver nor coordinator sees a tensor. Of a transport that replays, a message is put into the object store
    once and fetched once a node, and the references of a push are kept until the next one, for an engine that joins. An
    engine that dies during the push is left out until the next.

    Args:
        coordinator: knows the engines and replaces dead ones.
        timeout_s: longest wait for one call.
        workers_per_engine: GPUs of one engine.
        replays: see ``WeightSync.replays``.
    """

    def __init__(self, coordinator: Any, timeout_s: float, *, workers_per_engine: int, replays: bool) -> None:
        self.coordinator, self.timeout_s, self.replays = coordinator, timeout_s, replays
        self.host, self.workers_per_engine = ray.util.get_node_ip_address(), workers_per_engine
        self.engines: dict[int, Any] = {}
        self.dead: list[int] = []
        self.messages: list[Any] = []

    def start_update(self) -> Sequence[Hashable]:
        """Open an update on every engine that the pool has; returns their handles.

        An engine that is dead, or that an interrupted push left half loaded, is replaced; one that cannot be is left
        out until the next push.

        Raises:
            EngineFailed: none is left.
        """
        self.messages, self.dead = [], []
        self.engines = dict(enumerate(ray.get(self.coordinator.begin_push.remote())))
        opened = {index: engine.start_update.remote() for index, engine in self.engines.items()}
        for index, answer in opened.items():
            try:
                ray.get(answer, timeout=self.timeout_s)
            except RayError:
                self._replace(index)
        return list(self.engines.values())

    def _replace(self, index: int) -> None:
        try:
            engine = self.engines[index] = ray.get(self.coordinator.replace.remote(index))
            ray.get(engine.start_update.remote(), timeout=self.timeout_s)
        except RayError as error:
            del self.engines[index]
            self.dead.append(index)
            if not self.engines:
                raise
            logger.warning("no engine could be started in the place of engine %d: %s", index, error_summary(error))

    def init_transfer(self, infos: Sequence[dict[str, Any]]) -> None:
        """Initialize the receiving end of every engine."""
        of_engine = dict(zip(self.engines.values(), infos, strict=True))
        self._call_each(
            "preparing a transfer of weights", lambda engine: engine.init_transfer.remote(of_engine[engine])
        )

    def load(self, bucket: Any) -> None:
        """Send a message to every engine."""
        message = bucket
        if self.replays:
            message = ray.put(bucket)
            self.messages.append(message)
        self._call_each("loading weights", lambda engine: engine.load.remote(message))

    def finish_update(self, version: int) -> list[str]:
        """Put the weights to use; returns every digest."""
        digests = self._call_each("finishing a weight update", lambda engine: engine.finish_update.remote(version))
        # The list wraps the references, so that they travel as references and not as what they stand for.
        kept = [self.messages if self.replays else None]
        ray.get(self.coordinator.pushed.remote(version, kept, digests[0], self.dead), timeout=self.timeout_s)
        return digests

    def token_logps(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Every engine's log-probabilities of a text."""
        return self._call_each("scoring the probe text", lambda engine: engine.token_logps.remote(list(token_ids)))

    def _call_each(self, doing: str, call: Callable[[Any], Any]) -> list[Any]:
        """The answers of all engines; an engine found dead is left out from here on, if the push can do without it.

        Raises:
            TimeoutError: an engine did not answer in time.
            RayActorError: no engine is left, or one has died that the others wait for.
        """
        pending = {index: call(engine) for index, engine in self.engines.items()}
        missing = self._unanswered(list(pending.values()))
        if missing:
            raise TimeoutError(
                f"{doing}: {len(missing)} of {len(pending)} engines did not answer in {self.timeout_s:.0f} s "
                "(online.sync_timeout_s)"
            )
        answers = []
        for index, answer in pending.items():
            try:
                answers.append(ray.get(answer))
            except RayActorError:
                del self.engines[index]
                self.dead.append(index)
                if not self.engines or not self.replays:
                    raise
        return answers

    def _unanswered(self, waiting: list[Any]) -> list[Any]:
        """Calls without an answer in time. A failure ends the wait if the other engines wait for the failed one."""
        deadline = time.monotonic() + self.timeout_s
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            if not self.replays:
                ray.get(done)
        return waiting
