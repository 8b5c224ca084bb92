"""Weights on their way out: to a Hugging Face directory, or one by one to the rollout engines."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dpo_ray.config.schema import ModelConfig
from dpo_ray.model.adapters import adapter_product, save_adapter
from dpo_ray.model.load import build_model
from dpo_ray.model.quantized import NF4Linear
from dpo_ray.model.scorer import Scorer
from dpo_ray.objective.precision import DTYPES
from dpo_ray.storage import is_remote, storage_errors, upload_folder

BASE = ".base_layer."
"""What peft puts into the name of a weight that has adapters."""
CONFIGURATIONS = ("config.json", "adapter_config.json")
"""Files without which a folder is no Hugging Face or peft directory."""


def named_weights(policy: Scorer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The full weights under the names of the Hugging Face checkpoint, adapters added in, one at a time.

    Gathering is a collective: every rank iterates to the end. Tied weights come once.

    Args:
        dtype: what the receiver computes in; without adapters the cast is made before the gather, which halves it for
            bfloat16.
    """
    for name, parameter in policy.model.named_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(f"{BASE}weight"):
            layer = policy.model.get_submodule(name.removesuffix(f"{BASE}weight"))
            merged = _base_weight(layer, parameter).float() + adapter_product(layer, _gathered)
            yield name.replace(BASE, "."), merged.to(dtype)
        else:
            yield name.replace(BASE, "."), _gathered(parameter.detach().to(dtype))


def export_policy(policy: Scorer, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
    """Write the policy to the run directory. Every rank calls; rank 0 writes.

    ``policy/`` is a Hugging Face directory in the compute dtype; with ``model.lora`` there is ``adapter/``, and
    ``policy/`` only if ``model.lora.merge`` asks for it. A folder appears whole or not at all; an earlier export is
    replaced.
    """
    if model.lora is not None:
        adapters = ((name, p) for name, p in policy.model.named_parameters() if ".lora_" in name)
        weights = _kept_on_first((name, _gathered(p.detach())) for name, p in adapters)
        if dist.get_rank() == 0:
            write_whole(run_dir / "adapter", partial(write_adapter, weights, model), tokenizer)
    if model.lora is None or model.lora.merge:
        merged = _kept_on_first(named_weights(policy, DTYPES[model.dtype]))
        kept = policy.model.state_dict().keys()
        merged |= {name: buffer.cpu() for name, buffer in policy.model.named_buffers() if name in kept}
        if dist.get_rank() == 0:
            write_whole(run_dir / "policy", lambda folder: save_policy(merged, model, folder), tokenizer)
    dist.barrier()


def write_adapter(weights: dict[str, Tensor], model: ModelConfig, folder: Path) -> None:
    """Write full adapter weights as a peft directory."""
    assert model.lora is not None
    save_adapter(weights, build_model(model, with_weights=False), model.path, model.lora, folder)


def save_policy(weights: Mapping[str, Tensor], model: ModelConfig, folder: Path) -> None:
    """Write full weights as a Hugging Face directory.

    Args:
        weights: under the names of the Hugging Face checkpoint; tied weights once.
        model: whose architecture it is.
        folder: made anew.
    """
    empty = build_model(model, with_weights=False, dtype=DTYPES[model.dtype])
    empty.config.use_cache = True
    with contextlib.suppress(OSError):  # without one of its own, a model has what its configuration says
        empty.generation_config = GenerationConfig.from_pretrained(model.path)
    empty.save_pretrained(folder, state_dict=dict(weights))


def _base_weight(layer: Any, parameter: Tensor) -> Tensor:
    """(out, in) the frozen weight that a layer adds its adapters to."""
    base, held = layer.base_layer, _gathered(parameter)
    return base.restore(held) if isinstance(base, NF4Linear) else held


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _kept_on_first(weights: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Weights in host memory, on rank 0 only; all ranks take part in gathering them."""
    first = dist.get_rank() == 0
    return {name: weight.cpu() for name, weight in weights if first}


def write_whole(folder: Path, write: Callable[[Path], None], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make ``folder`` of what ``write`` writes and the tokenizer; whole or not at all, replacing another.

    An object store cannot move a folder: there it is not whole until its ``config.json`` is there, which comes last.
    """
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="dpo_ray-") as local:
            write_whole(Path(local) / folder.name, write, tokenizer)
            with storage_errors(folder):
                upload_folder(Path(local) / folder.name, folder, last=CONFIGURATIONS)
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
