"""Full weights of a sharded policy: saved to a Hugging Face directory, or streamed to the rollout engines."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from dpo_ray.config.schema import ModelConfig
from dpo_ray.model.adapters import ADAPTER, adapter_factors, peft_config
from dpo_ray.model.load import build_model, head_is_tied, untie_head
from dpo_ray.model.quantized import NF4Linear
from dpo_ray.model.scorer import Scorer
from dpo_ray.objective.precision import DTYPES
from dpo_ray.parallel.collectives import full_tensor, gather_to_rank0, is_sharded
from dpo_ray.storage import atomic_folder, is_remote, storage_errors, upload_folder

BASE_LAYER = ".base_layer."
"""peft inserts it into the names of weights with adapters."""
CONFIG_FILES = ("config.json", "adapter_config.json")
"""Files that make a folder a Hugging Face or peft directory."""
PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
"""Files that models with other modalities than text have beside those of the tokenizer."""


def named_weights(policy: Scorer, dtype: torch.dtype, *, every_rank: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Full weights with adapters merged, one at a time, under their names in the model.

    Each weight is gathered by a collective, so every rank must iterate to the end; ranks other than 0 get no weights.
    Tied weights are yielded once.

    Args:
        dtype: the receiver's compute dtype. Sharded weights are cast before they are gathered, which halves the traffic
            for bfloat16; merged ones afterwards. Unsharded weights are yielded without a copy, in their own dtype.
        every_rank: yield the weights on every rank.
    """
    gather = full_tensor if every_rank else gather_to_rank0
    for name, parameter in policy.model.named_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(f"{BASE_LAYER}weight"):
            layer: Any = policy.model.get_submodule(name.removesuffix(f"{BASE_LAYER}weight"))
            a, b, scale = adapter_factors(layer)
            base, a, b = (gather(tensor.detach()) for tensor in (parameter, a, b))
            weight = None
            if base is not None and a is not None and b is not None:
                if isinstance(layer.base_layer, NF4Linear):
                    base = layer.base_layer.dequantize(base)
                weight = (base.float() + scale * (b @ a)).to(dtype)
        else:
            weight = gather(parameter.detach().to(dtype) if is_sharded(parameter) else parameter.detach())
        if weight is not None:
            yield name.replace(BASE_LAYER, "."), weight


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """``named_weights`` as a Hugging Face checkpoint has them: other names, and experts one by one, in some models.

    Each iteration gathers them anew.
    """

    policy: Scorer
    dtype: torch.dtype
    every_rank: bool = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in named_weights(self.policy, self.dtype, every_rank=self.every_rank):
            yield from revert_weight_conversion(self.policy.model, {name: weight}).items()


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """The adapters alone, in float32, on rank 0. Each iteration gathers them anew.

    For each weight NAME of the checkpoint that they change by scale * B A: ``NAME.lora_A`` (rank, in), ``NAME.lora_B``
    (out, rank) and ``NAME.lora_scale`` (3,), whose sum is the scale also after rounding to bfloat16.
    """

    policy: Scorer

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, _ in self.policy.model.named_parameters():
            if not name.endswith(f"{BASE_LAYER}weight"):
                continue
            a, b, scale = adapter_factors(self.policy.model.get_submodule(name.removesuffix(f"{BASE_LAYER}weight")))
            a, b = (gather_to_rank0(factor.detach()) for factor in (a, b))
            if a is not None and b is not None:
                stored = self._name_in_checkpoint(name.replace(BASE_LAYER, "."))
                yield from {f"{stored}.lora_A": a, f"{stored}.lora_B": b}.items()
                yield f"{stored}.lora_scale", exact_sum(scale)

    def _name_in_checkpoint(self, name: str) -> str:
        (stored,) = revert_weight_conversion(self.policy.model, {name: torch.empty(0)})
        return stored


def exact_sum(number: float) -> Tensor:
    """(3,) values of bfloat16, as float32, whose sum is a float32 number: each takes 8 of its 24 bits."""
    rest, parts = torch.tensor(number, dtype=torch.float32), []
    for _ in range(3):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    return torch.stack(parts)


def export_policy(policy: Scorer, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
    """Save the policy to the run directory, replacing an earlier export. Every rank must call; rank 0 writes.

    ``policy/`` is a Hugging Face directory in the compute dtype. With ``model.lora``, ``adapter/`` is always
    written, and ``policy/`` only if ``model.lora.merge`` is set.
    """
    if model.lora is not None:
        adapters = ((name, p.detach()) for name, p in policy.model.named_parameters() if p.requires_grad)
        gathered = ((name, gather_to_rank0(weight)) for name, weight in adapters)
        weights = {name: weight.cpu() for name, weight in gathered if weight is not None}
        if dist.get_rank() == 0:
            write_model_folder(run_dir / "adapter", partial(save_adapter, weights, model), tokenizer)
    if model.lora is None or model.lora.merge:
        dtype = DTYPES[model.dtype]
        merged = {name: weight.to("cpu", dtype) for name, weight in named_weights(policy, dtype)}
        names = policy.model.state_dict().keys()
        merged |= {name: buffer.cpu() for name, buffer in policy.model.named_buffers() if name in names}
        if dist.get_rank() == 0:
            write_model_folder(run_dir / "policy", lambda folder: save_policy(merged, model, folder), tokenizer)
    dist.barrier()


def save_adapter(weights: dict[str, Tensor], model: ModelConfig, folder: Path) -> None:
    """Save full adapter weights, under their names in the model, as a peft directory."""
    from peft import get_peft_model

    assert model.lora is not None
    built = build_model(model, with_weights=False)
    config = peft_config(model.lora, built)
    config.base_model_name_or_path = model.path
    empty = get_peft_model(built, config, adapter_name=ADAPTER)
    empty.save_pretrained(str(folder), state_dict={f"base_model.model.{name}": w for name, w in weights.items()})


def save_policy(weights: Mapping[str, Tensor], model: ModelConfig, folder: Path) -> None:
    """Save full weights, under their names in the model, as a Hugging Face directory."""
    empty = build_model(model, with_weights=False, dtype=DTYPES[model.dtype])
    if head_is_tied(empty) and weight_name(empty.get_output_embeddings(), empty) in weights:
        untie_head(empty)
    empty.config.use_cache = True
    with contextlib.suppress(OSError):  # a model without this file uses its configuration
        empty.generation_config = GenerationConfig.from_pretrained(model.path)
    empty.save_pretrained(folder, state_dict=dict(weights))
    for name in PROCESSOR_FILES:
        if file := cached_file(model.path, name, _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(file, folder / name)


def weight_name(layer: nn.Module | None, model: nn.Module) -> str:
    """Name of the weight of a layer of ``model``."""
    return next(f"{name}.weight" for name, module in model.named_modules() if module is layer)


def write_model_folder(folder: Path, write: Callable[[Path], None], tokenizer: PreTrainedTokenizerBase) -> None:
    """Call ``write(draft)``, save the tokenizer beside it, and atomically replace ``folder`` with the draft.

    Object stores cannot move a folder: there, the config file is uploaded last and marks the folder as complete.
    """
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="dpo_ray-") as local:
            write_model_folder(Path(local) / folder.name, write, tokenizer)
            with storage_errors(folder):
                upload_folder(Path(local) / folder.name, folder, last=CONFIG_FILES)
        return
    with atomic_folder(folder, replace=True) as draft:
        write(draft)
        tokenizer.save_pretrained(draft)
