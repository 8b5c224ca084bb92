"""Weights on their way out: to a Hugging Face directory, or one by one to the rollout engines."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from dpo_ray.config.schema import ModelConfig
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer
from dpo_ray.model.shard import DTYPES


def named_weights(policy: Scorer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The full weights under the names of the Hugging Face checkpoint, one at a time.

    Gathering is a collective: every rank iterates to the end. Tied weights come once.

    Args:
        dtype: what the receiver computes in; the cast is made before the gather, which halves it for bfloat16.
    """
    for name, parameter in policy.model.named_parameters():
        shard = parameter.detach().to(dtype)
        yield name, shard.full_tensor() if isinstance(shard, DTensor) else shard


def export_policy(policy: Scorer, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the policy as a Hugging Face directory in the compute dtype. Every rank calls; rank 0 writes.

    The folder appears whole or not at all; an earlier export there is replaced.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(policy, options=options)
    if dist.get_rank() == 0:
        dtype = DTYPES[model.dtype]
        weights = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in weights.items()}
        empty = build_model(model, with_weights=False, dtype=dtype)
        empty.config.use_cache = True
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        empty.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    dist.barrier()
