"""Low-rank adapters (peft) in a frozen model: put in, switched off for the reference, taken out as their own export."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dpo_ray.config.schema import LoraConfig
from dpo_ray.model.quantized import quantize_base

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig
    from transformers import PreTrainedModel

    from dpo_ray.data.packing import PackedRow
    from dpo_ray.model.scorer import ReadOut, Scorer

ADAPTER = "default"
"""The name under which peft keeps the adapters."""


def add_adapters(model: "PreTrainedModel", lora: LoraConfig) -> None:
    """Put adapters that change nothing yet into ``model`` and freeze everything else, in four bits if so configured.

    Raises:
        ValueError: no module has a name in ``model.lora.targets``, or one cannot be quantized.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    try:
        inject_adapter_in_model(_peft_config(lora), model, adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"model.lora.targets: {lora.targets!r}: {str(error).splitlines()[0]}") from None
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (
            not isinstance(module.get_base_layer(), nn.Linear) or module is model.get_output_embeddings()
        ):
            raise ValueError(f"model.lora.targets: {name} cannot have adapters; linear layers can, but the head")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (".lora_" in name):
            raise AssertionError(f"{name} is {'not ' * (not parameter.requires_grad)}trainable")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if lora.quantize is not None:
        quantize_base(model)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run ``model`` as if it had no adapters.

    Not peft's own switch, which also turns off their gradients: FSDP decides about dtypes by what is trainable.
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
    """A policy as its own reference: scores like a Scorer, with the adapters switched off."""

    def __init__(self, policy: "Scorer") -> None:
        self.policy = policy

    def __call__(self, row: "PackedRow", read_out: "ReadOut") -> Any:
        """As ``Scorer.forward``."""
        with adapters_off(self.policy):
            return self.policy(row, read_out)


def adapter_product(layer: Any, gather: Any) -> Tensor:
    """What the adapters of a linear layer add to its weight: scale * B A, (out, in).

    Args:
        layer: peft's layer.
        gather: makes a full tensor of a sharded one; a collective.
    """
    a, b = (gather(getattr(layer, name)[ADAPTER].weight) for name in ("lora_A", "lora_B"))
    return layer.scaling[ADAPTER] * (b @ a)


def save_adapter(
    weights: dict[str, Tensor], base: "PreTrainedModel", base_path: str, lora: LoraConfig, folder: Path
) -> None:
    """Write adapters as a peft directory.

    Args:
        weights: full adapter weights under the names that they have in the model.
        base: the model's architecture, without weights.
        base_path: hub id or directory of the base model, written to the adapter's configuration.
        folder: created.
    """
    from peft import get_peft_model

    config = _peft_config(lora)
    config.base_model_name_or_path = base_path
    empty = get_peft_model(base, config, adapter_name=ADAPTER)
    empty.save_pretrained(str(folder), state_dict={f"base_model.model.{name}": w for name, w in weights.items()})


def _peft_config(lora: LoraConfig) -> "PeftConfig":
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type="CAUSAL_LM",
    )
