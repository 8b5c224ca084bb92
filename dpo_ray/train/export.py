"""Exports any checkpoint as a Hugging Face directory, in one process and without a cluster."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dpo_ray.config.schema import ModelConfig, RunConfig
from dpo_ray.data.tokenizer import load_tokenizer
from dpo_ray.model.adapters import add_adapters
from dpo_ray.model.architecture import is_composite, read_model_config
from dpo_ray.model.export import named_weights, save_adapter, save_policy, weight_name, write_model_folder
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer
from dpo_ray.objective.precision import DTYPES
from dpo_ray.train.checkpoint_files import (
    best_checkpoint,
    damaged_files,
    finished_checkpoints,
    open_reader,
    read_marker,
)

WEIGHTS = "model."
"""Prefix of weights in a checkpoint; the policy module adds the same prefix once more."""


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint at ``path``, or the newest or best checkpoint of a run directory.

    Raises:
        ValueError: there is no checkpoint, or it is unfinished or damaged.
    """
    if (path / "checkpoints").is_dir():
        finished = finished_checkpoints(path / "checkpoints")
        if not finished:
            raise ValueError(f"{path}: the run has no finished checkpoint")
        if best:
            run = RunConfig.model_validate(read_marker(finished[-1])["config"]["run"])
            chosen = best_checkpoint(finished, run)
            if chosen is None:
                raise ValueError(f"{path}: no checkpoint has run.best_metric ({run.best_metric})")
            path = chosen
        else:
            path = finished[-1]
    try:
        damaged = damaged_files(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no finished checkpoint; give a run directory or checkpoints/NNNNNN in one") from None
    if damaged:
        raise ValueError(f"{path}: the checkpoint is damaged: {damaged[0]} has changed or is missing")
    return path


def export_checkpoint(checkpoint: Path, folder: Path, *, merge: bool = False) -> None:
    """Writes the policy of a finished checkpoint to ``folder``.

    Args:
        folder: must not exist; created atomically. A Hugging Face directory, or with adapters a peft directory.
        merge: export the model with its adapters merged.

    Raises:
        ValueError: ``folder`` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} already exists; choose a new folder")
    # The other sections may have values that are rejected today.
    model = ModelConfig.model_validate(read_marker(checkpoint)["config"]["model"])
    weights = _trained_weights(checkpoint)

    def write(draft: Path) -> None:
        dtype = DTYPES[model.dtype]
        if model.lora is None:
            # Weights of other modalities than text are frozen, so they are not in the checkpoint.
            has_frozen = is_composite(read_model_config(model.path))
            built = build_model(model, with_weights=has_frozen, dtype=dtype)
            if has_frozen:
                weights.update({name: w for name, w in built.state_dict().items() if name not in weights})
            names = {name for name, _ in (*built.named_parameters(), *built.named_buffers())}  # tied weights once
            head, embedding = (
                weight_name(built.get_output_embeddings(), built),
                weight_name(built.get_input_embeddings(), built),
            )
            if not torch.equal(weights[head], weights[embedding]):
                names.add(head)
            unique = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items() if name in names}
            save_policy(unique, model, draft)
        elif merge:
            built = build_model(model, with_weights=True, dtype=dtype)
            add_adapters(built, model.lora)
            built.load_state_dict(weights, strict=False)
            with torch.no_grad():
                save_policy(dict(named_weights(Scorer(built), dtype)), model, draft)
        else:
            save_adapter(weights, model, draft)

    write_model_folder(folder, write, load_tokenizer(model.path, model.chat_template))


def _trained_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained weights by their names in the model, read from all shards."""
    written = open_reader(checkpoint).read_metadata().state_dict_metadata
    weights = {
        name.removeprefix(WEIGHTS): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in written.items()
        if name.startswith(f"{WEIGHTS}{WEIGHTS}") and isinstance(entry, TensorStorageMetadata)
    }
    dcp.load({"model": weights}, storage_reader=open_reader(checkpoint), no_dist=True)
    return {name.removeprefix(WEIGHTS): weight for name, weight in weights.items()}
