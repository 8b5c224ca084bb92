"""Weights from the training workers to the engines: choice of the transport, and the engines as rank 0 sees them."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from dpo_ray.config import Config
from dpo_ray.launch.rollouts.remote_engine import StoredMessage
from dpo_ray.plugins import build
from dpo_ray.storage import error_summary
from dpo_ray.types import EngineLost, Probe

if TYPE_CHECKING:
    from dpo_ray.sync.base import WeightSync

BETWEEN_GPUS = ("nccl", "ipc")
"""Transports that need GPUs."""
RETRY_S = 0.5
"""Seconds between two calls to a fleet that restarts."""
CALL_TIMEOUTS = 2
"""Timeouts that a call may take after the start of an update: a fleet that restarts gets the earlier ones again."""
ANSWER_S = 30.0
"""Extra wait for the fleet's answer: its own waits for engines time out first, with a better message."""


def build_transport(config: Config, *, on_gpus: bool) -> "WeightSync":
    """The configured transport, with ``auto`` resolved for the cluster.

    With ``online.max_lag`` > 0 it sends weights while training continues.

    Raises:
        ValueError: the transport does not suit the cluster, or its arguments are wrong.
    """
    from dpo_ray.sync import TRANSPORTS  # imports torch, which most processes do not need

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
    return build(use, sync.args, TRANSPORTS, "sync", dtype=config.model.dtype, background=config.online.max_lag > 0)


def begin_timeout_s(config: Config) -> float:
    """Longest start of an update: engines may have to start, and to finish their running requests."""
    assert config.online is not None
    return config.cluster.start_timeout_s + config.online.generate_timeout_s + config.online.sync_timeout_s


def longest_wait_s(config: Config) -> float:
    """Longest time that the other ranks wait in a collective for rank 0, which waits for the other actors of the run.

    It waits for the start of an update; or for the end of one, then for a collector that restarts and for engines to
    fall asleep.
    """
    assert config.online is not None
    sync_s = config.online.sync_timeout_s
    return max(begin_timeout_s(config), CALL_TIMEOUTS * sync_s + config.cluster.start_timeout_s + sync_s) + 2 * ANSWER_S


class FleetEngines:
    """The ``EngineGroup`` of rank 0: a synchronous client of the fleet.

    Unless the update is collective, each message is put into the object store of this node, which keeps those of the
    last update for engines that start later, and repeats the whole update to a fleet that restarts.

    Args:
        fleet: handle of the FleetActor.
        timeout_s: longest wait for one call.
        begin_timeout_s: longest wait for the start of an update; None is ``timeout_s``.
        workers_per_engine: GPUs of one engine.
    """

    def __init__(
        self, fleet: Any, timeout_s: float, *, workers_per_engine: int, begin_timeout_s: float | None = None
    ) -> None:
        self.fleet, self.timeout_s, self.workers_per_engine = fleet, timeout_s, workers_per_engine
        self.begin_timeout_s = timeout_s if begin_timeout_s is None else begin_timeout_s
        self.host = ray.util.get_node_ip_address()
        self._collective = self._closed = False
        self._calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        """The calls of the current update: method and arguments."""
        self._kept: list[Any] = []
        """The calls of the last finished update, with its messages, until the next begins: engines may be loading."""

    def begin_update(self, version: int, *, collective: bool) -> Sequence[str]:
        """Start an update; see ``EngineGroup``. A fleet that restarts is waited for."""
        self._collective, self._calls = collective, []
        members = self._call("begin_update", version, collective=collective)
        self._kept = []
        return members

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        """Pass each participating engine its initialization info."""
        self._call("init_transfer", infos)

    def load(self, message: Any) -> None:
        """Send a message to every engine."""
        self._call("load", message if self._collective else StoredMessage(ray.put(message)))

    def end_update(self, digest: str, probe: Probe) -> None:
        """Finish the update."""
        self._call("end_update", digest, probe)
        self._kept, self._calls = self._calls, []

    def close(self) -> None:
        """Let no thread that still publishes call the fleet again, which may serve another run by then."""
        self._closed = True

    def _call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the fleet.

        Raises:
            EngineLost: the update is collective, and must begin again.
            RuntimeError: the run has ended.
            TimeoutError: the fleet did not answer in time.
        """
        limit_s = self.begin_timeout_s if method == "begin_update" else CALL_TIMEOUTS * self.timeout_s
        deadline = time.monotonic() + limit_s + ANSWER_S
        first = len(self._calls)
        self._calls.append((method, arguments, keywords))
        while True:
            try:
                answers = [self._answer(deadline, *call) for call in self._calls[first:]]
                return answers[-1]
            except GetTimeoutError:
                raise TimeoutError(
                    f"{method} of a weight update: the fleet did not answer in {limit_s:.0f} s (online.sync_timeout_s)"
                ) from None
            except (RayActorError, EngineLost) as error:
                reason = error_summary(error)
                if self._collective and method != "begin_update":
                    raise EngineLost(reason) from None
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{method} of a weight update: the fleet was not up in {limit_s:.0f} s "
                        f"(online.sync_timeout_s): {reason}"
                    ) from None
            first = 0  # a fleet that has restarted does not know the update
            time.sleep(RETRY_S)

    def _answer(self, deadline: float, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        if self._closed:
            raise RuntimeError(f"{method} of a weight update after the end of the run")
        answer = getattr(self.fleet, method).remote(*arguments, **keywords)
        return ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
