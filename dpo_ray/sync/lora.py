"""Adapters alone through an object store: megabytes instead of a whole policy. For CPUs and GPUs.

The receiver merges them into the weights on disk, from which the engine has started, and loads the layers that they
change: vLLM's own adapters do not compute log-probabilities of a prompt on CPUs, which the probe needs.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_ray.sync.base import EngineGroup, Sender
from dpo_ray.sync.tensors import Digest, NamedTensor, WireTensor

FACTORS = ("lora_A", "lora_B", "lora_scale")
"""Endings of the names of a weight's adapters, see ``publish``."""


@dataclass(frozen=True, slots=True)
class AdapterMessage:
    """A message of ``LoraSync``."""

    adapters: list[WireTensor]
    dtype: str
    """Name of the torch dtype of the merged weights."""


class LoraSync(Sender):
    """The sender; see ``WeightSync``. ``publish`` takes adapters in float32.

    For each weight NAME that they change by scale * B A: ``NAME.lora_A`` (rank, in), ``NAME.lora_B`` (out, rank) and
    ``NAME.lora_scale``, whose sum is the scale. They travel in the dtype in which the trainer computes with them.

    Args:
        bucket_mib: largest size of a message.
        dtype: torch dtype of the adapters and of the weights, before and after merging.
        background: see ``Sender``.
    """

    worker_extension = f"{__name__}.LoraWorker"
    adapters_only = True

    def __init__(self, bucket_mib: int = 64, dtype: str = "bfloat16", background: bool = False) -> None:
        super().__init__(bucket_mib, dtype, background)
        self._merged_dtype = dtype

    def _send(self, engines: EngineGroup, bucket: list[NamedTensor], version: int) -> None:
        adapters = [WireTensor.from_tensor(name, tensor) for name, tensor in bucket]
        engines.load(AdapterMessage(adapters, self._merged_dtype))


def changed_modules(adapters: Iterable[str], fused: Iterable[Iterable[str]]) -> set[str]:
    """Names of the modules whose weights an engine loads.

    Args:
        adapters: their names, see ``LoraSync``.
        fused: names of modules that the engine holds as one layer, such as ``q_proj``, ``k_proj`` and ``v_proj``. If
            adapters change one of them, the weights of all are loaded: a layer is loaded whole.
    """
    modules = {name.rsplit(".", 2)[0] for name in adapters}
    for group in map(tuple, fused):
        for module in list(modules):
            parent, dot, last = module.rpartition(".")
            if last in group:
                modules |= {f"{parent}{dot}{sibling}" for sibling in group}
    return modules


class BaseWeights:
    """The weights on disk of the modules that adapters change, read from the checkpoint once.

    From safetensors files they are views of the mapped file: pages of the system's cache, which the workers of a node
    share and the system may drop and read again. From other formats, each worker holds them in host memory: with
    adapters of all linear layers, the bytes of the checkpoint without embedding and head.

    Args:
        read: iterates over the checkpoint.
    """

    def __init__(self, read: Callable[[], Iterable[NamedTensor]]) -> None:
        self._read = read
        self._modules: set[str] = set()
        self._weights: list[NamedTensor] = []

    def of(self, modules: set[str]) -> list[NamedTensor]:
        """The weights of the modules, in the order of the checkpoint."""
        if modules != self._modules:
            self._weights = [(name, weight) for name, weight in self._read() if name.rpartition(".")[0] in modules]
            self._modules = modules
        return self._weights


def merged_weights(
    stored: Iterable[NamedTensor],
    adapters: Mapping[str, Tensor],
    fused: Iterable[Iterable[str]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[NamedTensor]:
    """The weights of all modules that adapters change, in the order of the checkpoint.

    Args:
        stored: the checkpoint, or its weights of these modules.
        adapters: see ``LoraSync``.
        fused: see ``changed_modules``.
        dtype: dtype of the weights, before and after merging.
        device: where they are computed.

    Raises:
        ValueError: the adapters of a weight are incomplete, or the checkpoint has no weight of that name.
    """
    names = {name.rsplit(".", 1)[0] for name in adapters}
    if incomplete := [name for name in names if any(f"{name}.{factor}" not in adapters for factor in FACTORS)]:
        raise ValueError(f"the adapters of {len(incomplete)} weights are incomplete, first {min(incomplete)}")
    modules = changed_modules(adapters, fused)
    for name, weight in stored:
        if name.rpartition(".")[0] not in modules:
            continue
        weight = weight.to(device, dtype)
        if name in names:
            names.remove(name)
            a, b, scale = (adapters[f"{name}.{factor}"].to(device, torch.float32) for factor in FACTORS)
            weight = (weight.float() + scale.sum() * (b @ a)).to(dtype)
        yield name, weight
    if names:
        raise ValueError(f"the checkpoint has no weights for {len(names)} adapters, first {min(names)}")


@functools.cache
def __getattr__(name: str) -> Any:
    """``LoraWorker``, the class to mix into vLLM's workers; its first use registers the receiver with vLLM."""
    if name != "LoraWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    from dpo_ray.sync.receiver import DigestMixin, DigestWorker, StoredMessages, finish_reload, start_reload

    class LoraEngine(StoredMessages, WeightTransferEngine[Any, Any]):
        """Keeps all adapters until the update ends, then merges and loads."""

        model: Any
        adapters: Mapping[str, Tensor] = {}

        @functools.cached_property
        def base(self) -> BaseWeights:
            loader: Any = get_model_loader(self.vllm_config.load_config)
            return BaseWeights(functools.partial(loader.get_all_weights, self.model_config, self.model))

        def receive_weights(self, update_info: AdapterMessage) -> None:
            self.dtype: torch.dtype = getattr(torch, update_info.dtype)
            self.adapters = {**self.adapters, **{tensor.name: tensor.to_tensor() for tensor in update_info.adapters}}

    class LoraReceiver(DigestMixin, LoraEngine):
        """Receiver with a digest of the adapters."""

        def start_weight_update(self) -> None:
            self.adapters = {}
            start_reload(self.model, self.device)

        def finish_weight_update(self) -> None:
            received = Digest()
            received.update(self.adapters.items())
            fused = getattr(self.model, "packed_modules_mapping", {}).values()
            stored = self.base.of(changed_modules(self.adapters, fused))
            merged = merged_weights(stored, self.adapters, fused, dtype=self.dtype, device=self.device)
            self.model.load_weights(merged)
            for layer_name, layer in self.model.named_modules():
                info = get_layerwise_info(layer)
                if info.can_load() and info.load_numel:  # vLLM would fill the rest with undefined values
                    raise ValueError(f"adapters change a part of {layer_name}, whose other weights were not found")
            finish_reload(self.model, self.model_config, self.device)
            self.adapters = {}
            self.digest = received.hexdigest()

    WeightTransferEngineFactory.register_engine(LoraSync.worker_extension, LoraReceiver)
    return DigestWorker
