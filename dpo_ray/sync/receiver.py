"""The part of a receiver in vLLM's workers that all transports share: it records the weights that arrive.

Uses only methods of vLLM's ``WeightTransferEngine``; each transport chooses its subclass.
"""

import pickle
from collections.abc import Iterable
from typing import Any

import torch

from dpo_ray.sync.tensors import Digest, NamedTensor


class RecordingModel:
    """Stands in for vLLM's model during an update: passes weights on to it and records them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.digest = Digest()
        self.missing = {name for name, _ in model.named_parameters()}
        self.loaded: set[str] = set()

    def load_weights(self, weights: Iterable[NamedTensor]) -> set[str]:
        """Load tensors under their checkpoint names; returns the names of the parameters that they fill."""
        weights = list(weights)
        self.digest.update(weights)
        loaded = self.model.load_weights(weights)
        self.missing -= loaded
        self.loaded |= loaded
        return loaded

    def unchanged(self) -> list[str]:
        """Parameters whose weights the model's loader copied by itself, so that reloading, which buffers, lost them."""
        return [
            f"{prefix}.{name}"
            for prefix, layer in self.model.named_modules()
            for name, parameter in layer.named_parameters(recurse=False)
            if parameter.is_meta and f"{prefix}.{name}" in self.loaded and name not in _buffered(layer)
        ]


def _buffered(layer: Any) -> set[str]:
    """Names of the parameters whose weights vLLM keeps until the layer is complete."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return {name for name, _ in get_layerwise_info(layer).loaded_weights}


class DigestMixin:
    """Mixed in before a ``WeightTransferEngine``: its updates load through a ``RecordingModel``.

    Every transport sends a message as the value of ``bucket``; the ``WeightTransferEngine`` gets it as update info.
    """

    model: Any
    model_config: Any
    digest = ""
    """Digest of the last finished update."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        """Parse a message, which is pickled if the engine has a process of its own."""
        bucket = update_dict["bucket"]
        bucket = pickle.loads(bucket) if isinstance(bucket, bytes) else bucket
        return super().parse_update_info(bucket)  # pyrefly: ignore

    def start_weight_update(self) -> None:
        """Start an update; vLLM's worker restores the model when the update ends or fails."""
        recording = RecordingModel(self.model)  # before the engine takes the parameters' memory away
        super().start_weight_update()  # pyrefly: ignore
        self.set_weight_update_target(recording, self.model_config)  # pyrefly: ignore

    def finish_weight_update(self) -> None:
        """Switch to the received weights.

        Raises:
            ValueError: a parameter got no weights, or vLLM cannot reload it.
        """
        recording: RecordingModel = self.model
        if recording.missing:
            raise ValueError(
                f"the push left out {len(recording.missing)} parameters of the engine's model, "
                f"first {min(recording.missing)!r}; a layer would keep old or undefined weights"
            )
        if unchanged := recording.unchanged():
            raise ValueError(
                f"vLLM cannot update {len(unchanged)} parameters of {type(recording.model).__name__}, "
                f"first {unchanged[0]!r}: they would keep their old weights; train this model by the command offline"
            )
        self.digest = recording.digest.hexdigest()
        self.reset_weight_update_target()  # pyrefly: ignore
        super().finish_weight_update()  # pyrefly: ignore


class StoredMessages:
    """Mixed in before a ``WeightTransferEngine`` whose messages come through an object store, as they are."""

    def init_transfer_engine(self, init_info: Any) -> None:
        """Nothing to connect."""

    def parse_update_info(self, update_dict: Any) -> Any:
        """The message."""
        return update_dict

    def shutdown(self) -> None:
        """Nothing to disconnect."""


def start_reload(model: Any, device: torch.device) -> None:
    """Let ``model.load_weights`` replace the weights of a model in use. vLLM loads each layer once it is complete."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    if device.type == "cpu":
        # On CPUs experts are packed only while their kernel is built, so reloading must build it again.
        for layer in model.modules():
            method: Any = getattr(layer, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
    initialize_layerwise_reload(model)


def finish_reload(model: Any, model_config: Any, device: torch.device) -> None:
    """Put the layers in use that got weights; the others keep theirs."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
    head = getattr(model, "lm_head", None)
    if device.type == "cpu" and head is not None:
        # On CPUs a head multiplies with a packed copy, which reloading the embedding it is tied to does not update.
        # Untied in the configuration is not enough: vLLM ties a stored head that equals the embedding.
        head.quant_method.process_weights_after_loading(head)


class DigestWorker:
    """Mixed into vLLM's worker."""

    vllm_config: Any
    weight_transfer_engine: Any
    _weight_update_active: bool
    """Set by vLLM, like the others."""

    def abandon_update(self) -> None:
        """Abandon the unfinished update, so that another can start.

        vLLM loads layer by layer: layers that are complete keep the new weights, the others get back the old ones.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, get_layerwise_info

        engine = self.weight_transfer_engine
        engine.reset_weight_update_target()
        for layer in engine.model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights.clear()
            info.load_numel = 0  # vLLM puts the old tensors of a layer back if nothing was loaded
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(engine.model, engine.model_config)
        self._weight_update_active = False

    def received_digest(self) -> str:
        """Digest of the last update."""
        return self.weight_transfer_engine.digest
