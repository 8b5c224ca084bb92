"""LoRA adapters (peft) in a frozen model: adding them, disabling them for the reference, merging them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dpo_ray.config.schema import LoraConfig
from dpo_ray.model.quantized import quantize_base
from dpo_ray.storage import error_summary

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig
    from transformers import PreTrainedModel

    from dpo_ray.data.packing import PackedRow
    from dpo_ray.model.scorer import HeadFn, Scorer

ADAPTER = "default"
"""peft's name of the adapters."""


def add_adapters(model: "PreTrainedModel", lora: LoraConfig) -> None:
    """Add adapters that initially change nothing; freeze the other weights, quantized if ``lora.quantize`` is set.

    Raises:
        ValueError: ``model.lora.targets`` matches no module, or a module that cannot have adapters.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    try:
        inject_adapter_in_model(peft_config(lora), model, adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"model.lora.targets: {lora.targets!r}: {error_summary(error)}") from None
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (
            not isinstance(module.get_base_layer(), nn.Linear) or module is model.get_output_embeddings()
        ):
            raise ValueError(f"model.lora.targets: {name} cannot have adapters; only linear layers except the head can")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (".lora_" in name):
            raise AssertionError(f"{name} is {'not ' * (not parameter.requires_grad)}trainable")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if lora.quantize is not None:
        quantize_base(model)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without its adapters.

    peft's own switch also changes ``requires_grad``, from which FSDP derives its dtypes.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class WithoutAdapters:
    """A policy with its adapters disabled, as its own reference model; called like a Scorer."""

    def __init__(self, policy: "Scorer") -> None:
        self.policy = policy

    def __call__(self, row: "PackedRow", head_fn: "HeadFn") -> Any:
        """See ``Scorer.forward``."""
        with adapters_off(self.policy):
            return self.policy(row, head_fn)


def adapter_product(layer: Any, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Weight update of a linear layer by its adapters: scale * B A, (out, in).

    Args:
        layer: peft's layer.
        gather: returns the full tensor of a sharded one; a collective.
    """
    a, b = (gather(getattr(layer, name)[ADAPTER].weight) for name in ("lora_A", "lora_B"))
    return layer.scaling[ADAPTER] * (b @ a)


def peft_config(lora: LoraConfig) -> "PeftConfig":
    """peft's configuration of the adapters."""
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type="CAUSAL_LM",
    )
