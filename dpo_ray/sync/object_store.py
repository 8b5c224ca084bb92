"""Weights through an object store: packed into buckets by rank 0, read by every engine. Works on CPUs and on GPUs.

Both ends are here. The sender knows only ``EngineGroup``, which puts each bucket where engines can read it; the
receiving end runs in vLLM's workers, so that half of the file imports vLLM, and only when it is asked for.
"""

import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_ray.sync.base import Bucket, Digest, Sender, WireTensor, bytes_of, check_received, in_buckets
from dpo_ray.sync.receiving import DigestOfWorker, validate_paths

logger = logging.getLogger(__name__)


def pack(weights: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype, bucket_bytes: int) -> Iterator[Bucket]:
    """Buckets of whole tensors, in order, none larger than ``bucket_bytes`` unless a single tensor is."""
    wired = (WireTensor.of(name, weight, dtype) for name, weight in weights)
    return (Bucket(tuple(tensors)) for tensors in in_buckets(wired, lambda t: t.array.nbytes, bucket_bytes))


class ObjectStoreSync(Sender):
    """The sending end: see ``WeightSync``.

    Args:
        bucket_mib: size of a message. Rank 0 and the object store hold about one each.
        dtype: torch dtype that weights travel in; the engines' own, or vLLM casts what it receives.
    """

    worker_extension = f"{__name__}.ObjectStoreWorker"
    replays = True

    def __init__(self, bucket_mib: int = 256, dtype: str = "bfloat16") -> None:
        super().__init__()
        self._bucket_bytes = bytes_of(bucket_mib)
        self._dtype: torch.dtype = getattr(torch, dtype)

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> str:
        """Send all weights and put them to use as ``version``; see ``WeightSync.push``."""
        self.require_connected()
        if self.engines is None:
            for _ in weights:  # a collective that rank 0 takes part in
                pass
            return ""
        sent = Digest()
        self.engines.start_update()
        for bucket in pack(weights, dtype=self._dtype, bucket_bytes=self._bucket_bytes):
            self.engines.load(bucket)
            sent.update(bucket)
            logger.debug("version %d: sent %d tensors, %.1f MiB", version, len(bucket.tensors), bucket.nbytes / 2**20)
        return check_received(self.engines.finish_update(version), sent.hexdigest(), version)


class LayerByLayer:
    """Mixed in before vLLM's receiver: loads buckets into the model as a layer's tensors come together.

    Tensors of one fused layer (query, key, value) may lie in different buckets: vLLM keeps them until the layer is
    complete.
    """

    model: Any  # a model of vLLM, with its load_weights and config
    model_config: Any
    device: torch.device
    digest = ""
    """Of the last finished update."""

    def start_weight_update(self) -> None:
        """Open an update."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._received = Digest()
        self._missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Any) -> None:
        """Load a bucket."""
        bucket: Bucket = update_info.bucket
        self._missing -= self.model.load_weights((tensor.name, tensor.tensor()) for tensor in bucket.tensors)
        self._received.update(bucket)

    def finish_weight_update(self) -> None:
        """Put the weights to use, if nothing is missing."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        validate_paths(self._missing)
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        if self.device.type == "cpu" and head is not None and self.model.config.tie_word_embeddings:
            # On CPUs a tied head multiplies with a packed copy, which the reload of the embedding leaves as it was.
            head.quant_method.process_weights_after_loading(head)
        self.digest = self._received.hexdigest()


@functools.cache
def _receiving_end() -> type:
    """Define the classes that run in vLLM's workers, and register the receiver with vLLM."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        """Nothing to agree on beforehand."""

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        """One message."""

        bucket: Bucket

    class ObjectStoreReceiver(LayerByLayer, WeightTransferEngine[InitInfo, UpdateInfo]):
        """Holds nothing between updates."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            pass

        def shutdown(self) -> None:
            pass

    class ObjectStoreWorker(DigestOfWorker):
        """Mixed into vLLM's worker."""

    WeightTransferEngineFactory.register_engine(ObjectStoreSync.worker_extension, ObjectStoreReceiver)
    return ObjectStoreWorker


def __getattr__(name: str) -> Any:
    # vLLM's base classes exist only where vLLM is: a trainer imports this module without it.
    if name == "ObjectStoreWorker":
        return _receiving_end()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
