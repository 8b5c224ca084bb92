"""Weights through an object store: rank 0 packs them into buckets and every engine reads them. For CPUs and GPUs.

The sender uses ``EngineGroup`` only, which puts each bucket into the store, and never waits for an engine. The receiver
runs in vLLM's workers, so its half of this file imports vLLM on first use.
"""

import functools
from typing import Any

from dpo_ray.sync.base import EngineGroup, NamedTensor, Sender, WireTensor


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
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from dpo_ray.sync.receiver import DigestMixin, DigestWorker

    class BucketEngine(WeightTransferEngine[Any, Any]):
        """Loads buckets into the model. vLLM keeps the parts of a fused layer until the layer is complete."""

        model: Any

        def init_transfer_engine(self, init_info: Any) -> None: ...

        def parse_update_info(self, update_dict: Any) -> Any:
            return update_dict  # a list of WireTensor already

        def start_weight_update(self) -> None:
            if self.device.type == "cpu":
                # On CPUs experts are packed only while their kernel is built, so reloading must build it again.
                for layer in self.model.modules():
                    method: Any = getattr(layer, "quant_method", None)
                    if getattr(method, "moe_kernel", None) is not None:
                        method.moe_kernel = None
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: list[WireTensor]) -> None:
            self.model.load_weights((tensor.name, tensor.to_tensor()) for tensor in update_info)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            head = getattr(self.model, "lm_head", None)
            if self.device.type == "cpu" and head is not None:
                # On CPUs a head multiplies with a packed copy, which reloading the embedding it is tied to does not
                # update. Untied in the configuration is not enough: vLLM ties a stored head that equals the embedding.
                head.quant_method.process_weights_after_loading(head)

        def shutdown(self) -> None: ...

    class ObjectStoreReceiver(DigestMixin, BucketEngine):
        """Receiver with a digest."""

    WeightTransferEngineFactory.register_engine(ObjectStoreSync.worker_extension, ObjectStoreReceiver)
    return DigestWorker
