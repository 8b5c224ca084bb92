"""Weight transports: they move the policy's weights from the training workers to the rollout engines."""

from collections.abc import Callable

from dpo_ray.sync.base import WeightSync
from dpo_ray.sync.ipc import IPCSync
from dpo_ray.sync.lora import LoraSync
from dpo_ray.sync.nccl import NCCLSync
from dpo_ray.sync.object_store import ObjectStoreSync

TRANSPORTS: dict[str, Callable[..., WeightSync]] = {
    "object_store": ObjectStoreSync,
    "nccl": NCCLSync,
    "ipc": IPCSync,
    "lora": LoraSync,
}
