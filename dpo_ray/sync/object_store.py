"""Weights through an object store: rank 0 packs them into buckets and every engine reads them. For CPUs and GPUs.

The sender uses ``EngineGroup`` only, which puts each bucket into the store, and never waits for an engine. The receiver
runs in vLLM's workers, so its half of this file imports vLLM on first use.
"""

import functools
from typing import Any

from dpo_ray.sync.base import EngineGroup, Sender
from dpo_ray.sync.tensors import NamedTensor, WireTensor


class ObjectStoreSync(Sender):
    """The sender; see ``WeightSync``.

    Args:
        bucket_mib: largest size of a message. The object store holds all messages until the next publish, since
            engines load them at their own pace.
        dtype: torch dtype of the transfer; vLLM casts to the engines' dtype if it differs.
        background: see ``Sender``.
    """

    worker_extension = f"{__name__}.ObjectStoreWorker"

    def _send(self, engines: EngineGroup, bucket: list[NamedTensor], version: int) -> None:
        engines.load([WireTensor.from_tensor(name, tensor) for name, tensor in bucket])


@functools.cache
def __getattr__(name: str) -> Any:
    """``ObjectStoreWorker``, the class to mix into vLLM's workers; its first use registers the receiver with vLLM."""
    if name != "ObjectStoreWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from dpo_ray.sync.receiver import DigestMixin, DigestWorker, StoredMessages, finish_reload, start_reload

    class BucketEngine(StoredMessages, WeightTransferEngine[Any, Any]):
        """Loads buckets into the model. vLLM keeps the parts of a fused layer until the layer is complete."""

        model: Any

        def start_weight_update(self) -> None:
            start_reload(self.model, self.device)

        def receive_weights(self, update_info: list[WireTensor]) -> None:
            self.model.load_weights((tensor.name, tensor.to_tensor()) for tensor in update_info)

        def finish_weight_update(self) -> None:
            finish_reload(self.model, self.model_config, self.device)

    class ObjectStoreReceiver(DigestMixin, BucketEngine):
        """Receiver with a digest."""

    WeightTransferEngineFactory.register_engine(ObjectStoreSync.worker_extension, ObjectStoreReceiver)
    return DigestWorker
