"""LoRA adapters (peft) in a frozen model: adding them, disabling or exchanging them for the reference."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dpo_ray.config.schema import LoraConfig
from dpo_ray.model.architecture import other_modalities
from dpo_ray.model.quantized import quantize_base
from dpo_ray.storage import error_summary

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig
    from transformers import PreTrainedModel

    from dpo_ray.data.packing import PackedRow
    from dpo_ray.model.scorer import HeadFn, Scorer

ADAPTER = "default"
"""peft's name of the adapters."""
REFERENCE_ADAPTER = "reference"
"""Name of the copy of the adapters that makes the policy its own refreshed reference."""


def add_adapters(model: "PreTrainedModel", lora: LoraConfig, *, copies: Sequence[str] = ()) -> None:
    """Add adapters that initially change nothing; freeze the other weights, quantized if ``lora.quantize`` is set.

    Args:
        copies: names of frozen copies of the adapters, which take no part in the model's own forward pass.

    Raises:
        ValueError: ``model.lora.targets`` matches no module, or a module that cannot have adapters.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    try:
        inject_adapter_in_model(peft_config(lora, model), model, adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"model.lora.targets: {lora.targets!r}: {error_summary(error)}") from None
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (
            not isinstance(module.get_base_layer(), nn.Linear) or module is model.get_output_embeddings()
        ):
            raise ValueError(f"model.lora.targets: {name} cannot have adapters; only linear layers except the head can")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name in copies:
        _copy_adapters(model, name)
    if lora.quantize is not None:
        quantize_base(model)


def _copy_adapters(model: nn.Module, name: str) -> None:
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            # peft's own way to add a second set would adapt the layers inside the first one.
            for part in (module.lora_A, module.lora_B, module.lora_dropout):
                part[name] = copy.deepcopy(part[ADAPTER]).requires_grad_(False)
            module.scaling[name] = module.scaling[ADAPTER]


class SwitchedAdapters:
    """A policy with its adapters off, or a copy of them in their place, as its own reference; called like a Scorer.

    FSDP shards and gathers a copy with the policy, so that nothing is exchanged between passes but its name.

    Args:
        name: one of ``copies`` of ``add_adapters``; None switches the adapters off.
    """

    def __init__(self, policy: "Scorer", name: str | None) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.policy = policy
        self.layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
        # Not peft's own switch, which also changes requires_grad, from which FSDP derives its dtypes.
        self.switched = {"_disable_adapters": True} if name is None else {"_active_adapter": [name]}
        self.usual = {"_disable_adapters": False} if name is None else {"_active_adapter": [ADAPTER]}

    def __call__(self, row: "PackedRow", head_fn: "HeadFn") -> Any:
        self._set(self.switched)
        try:
            return self.policy(row, head_fn)
        finally:
            self._set(self.usual)

    def _set(self, attributes: Mapping[str, Any]) -> None:
        for layer in self.layers:
            vars(layer).update(attributes)


def adapter_factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """A (rank, in), B (out, rank) and scale of the adapters of one of peft's linear layers: its update is scale * B A.

    A and B may be sharded.
    """
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]


def peft_config(lora: LoraConfig, model: "PreTrainedModel") -> "PeftConfig":
    """peft's configuration of the adapters, none of them in parts of ``model`` for other modalities than text."""
    from peft import LoraConfig as PeftConfig

    others = set(other_modalities(model))
    excluded = [re.escape(name) for name, module in model.named_modules() if module in others]
    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        exclude_modules=rf"({'|'.join(excluded)})\..*" if excluded else None,
        task_type="CAUSAL_LM",
    )
