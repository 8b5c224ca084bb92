"""Weight pushes from rank 0 to the engines of the pool: building the transport, calling every engine."""

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
"""Transports that need GPUs."""


def build_transport(config: Config, *, on_gpus: bool) -> WeightSync:
    """The configured transport, with ``auto`` resolved for the cluster.

    Raises:
        ValueError: the transport does not suit the cluster, or its arguments are wrong.
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
    """The EngineGroup of rank 0: sends weights from the trainer directly to all engines.

    No tensor passes through the driver or the coordinator. With a transport that replays, each message is put into the
    object store once and fetched once per node; the references are kept until the next push, for engines that join, and
    an engine that dies during a push is left out until the next one.

    Args:
        coordinator: handle of the Coordinator, which owns the engines.
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
        """Start an update on every engine of the pool; returns their handles.

        An engine that is dead, or half loaded by an interrupted push, is replaced; if that fails, it is left out until
        the next push.

        Raises:
            EngineFailed: no engine is left.
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
            logger.warning("engine %d could not be replaced: %s", index, error_summary(error))

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
        """Switch every engine to the received weights; returns their digests."""
        digests = self._call_each("finishing a weight update", lambda engine: engine.finish_update.remote(version))
        # Inside a list, Ray passes references on as they are; as arguments it would replace them by their values.
        kept = [self.messages if self.replays else None]
        ray.get(self.coordinator.pushed.remote(version, kept, digests[0], self.dead), timeout=self.timeout_s)
        return digests

    def token_logps(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Each engine's log-probability of each token after the first, nats."""
        return self._call_each("computing log-probabilities", lambda engine: engine.token_logps.remote(list(token_ids)))

    def _call_each(self, doing: str, call: Callable[[Any], Any]) -> list[Any]:
        """Call every engine and return all results; if the transport replays, dead engines are left out from here on.

        Raises:
            TimeoutError: an engine did not answer in time.
            RayActorError: no engine is left, or an engine died and the transport does not replay.
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
        """Calls that time out. Without replay a failure raises at once, since the others wait for the dead engine."""
        deadline = time.monotonic() + self.timeout_s
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            if not self.replays:
                ray.get(done)
        return waiting
