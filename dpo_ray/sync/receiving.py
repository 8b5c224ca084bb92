"""What receiving ends share: they note what arrives, and what does not.

``DigestMixin`` knows the methods of vLLM's own weight-transfer engines and no more; each transport chooses its engine.
"""

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from dpo_ray.sync.base import Checksum


class RecordingModel:
    """Stands in for a model of vLLM during an update: what is loaded goes on to the model, and is taken note of."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.digest = Checksum()
        self.missing = {name for name, _ in model.named_parameters()}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load some tensors under their checkpoint names; returns the names of the parameters they went to."""
        weights = list(weights)
        for name, tensor in weights:
            self.digest.update(name, tensor)
        loaded = self.model.load_weights(weights)
        self.missing -= loaded
        return loaded


def validate_paths(missing: Collection[str]) -> None:
    """Raise a ValueError when an update left parameters out: their layers would keep old or undefined weights."""
    if missing:
        raise ValueError(
            f"the push left out {len(missing)} parameters of the engine's model, "
            f"first {min(missing)!r}; a layer would keep old or undefined weights"
        )


class DigestMixin:
    """Mixed in before an engine of vLLM: its updates load through a ``RecordingModel``.

    A message comes as the value of ``bucket``, as with every transport; the engine below sees it as its own update.
    """

    model: Any
    model_config: Any
    digest = ""
    """Of the last finished update."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        """The message as the engine's own record."""
        return super().parse_update_info(update_dict["bucket"])  # pyrefly: ignore

    def start_weight_update(self) -> None:
        """Open an update; the worker puts the model back when the update ends or fails."""
        noting = RecordingModel(self.model)  # before the engine takes the parameters' memory away
        super().start_weight_update()  # pyrefly: ignore
        self.set_weight_update_target(noting, self.model_config)  # pyrefly: ignore

    def finish_weight_update(self) -> None:
        """Finish the update, if nothing is missing."""
        noting: RecordingModel = self.model
        validate_paths(noting.missing)
        self.digest = noting.digest.hexdigest()
        self.reset_weight_update_target()  # pyrefly: ignore
        super().finish_weight_update()  # pyrefly: ignore


class DigestOfWorker:
    """Mixed into vLLM's worker."""

    weight_transfer_engine: Any  # the worker's; set by vLLM

    def received_digest(self) -> str:
        """Digest of the last update."""
        return self.weight_transfer_engine.digest
