"""The reference of a run: cached log-probabilities, a frozen model, the policy with other adapters, or none.

The untrained policy is the reference, so that the cache is filled without loading a second model. The reference must
therefore be built before a checkpoint is loaded.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from dpo_ray.data.loader import PairSource
from dpo_ray.data.store import PairStore
from dpo_ray.model.adapters import REFERENCE_ADAPTER, SwitchedAdapters
from dpo_ray.model.architecture import model_digest
from dpo_ray.model.load import load_sharded
from dpo_ray.model.scorer import LogpsModel, Scorer, pair_logps
from dpo_ray.parallel.collectives import broadcast_from_rank0
from dpo_ray.reference.cache import cached_logps
from dpo_ray.reference.reference import Reference, cached_reference, live_reference, no_reference
from dpo_ray.reference.store import ReferenceStore, store_digest
from dpo_ray.storage import folder_at
from dpo_ray.train.logps import compute_logps
from dpo_ray.train.refresh import RefreshedReference
from dpo_ray.train.reporter import Reporter
from dpo_ray.train.trainer import Trainer


def load_frozen_reference(trainer: Trainer) -> LogpsModel | None:
    """The reference model that stays beside the policy for the whole run; None if there is none."""
    policy, reference = trainer.policy, trainer.config.reference
    match trainer.config.reference_kind:
        case "live":
            frozen = _load_copy(trainer)
            return RefreshedReference(policy, frozen, frozen, reference) if reference.refreshes_copy else frozen
        case "adapters":
            return RefreshedReference(policy, SwitchedAdapters(policy, REFERENCE_ADAPTER), policy, reference)
        case "adapters_off":
            return SwitchedAdapters(policy, None)
    return None


def _load_copy(trainer: Trainer) -> Scorer:
    """The untrained model, sharded like the policy, in the compute dtype unless refreshes change it by small steps."""
    config = trainer.config
    return load_sharded(
        config.model,
        config.shard,
        trainer.mesh,
        trainer.device,
        context=trainer.policy.context,
        products=trainer.policy.products,
        trainable=False,
        frozen_dtype=torch.float32 if config.reference.mixup_alpha < 1 else None,
    )


def build_references(
    trainer: Trainer,
    pairs: PairStore,
    held_out: PairStore | None,
    reporter: Reporter,
    load_frozen: Callable[[Trainer], LogpsModel | None] = load_frozen_reference,
) -> tuple[Reference, Reference]:
    """References of the training pairs and of the held-out pairs; notes how they were obtained."""
    kind = trainer.config.reference_kind
    if kind == "none":
        reporter.note("reference: none")
        return no_reference, no_reference
    if (frozen := load_frozen(trainer)) is not None:
        reporter.note(f"reference: {kind}, computed with each step")
        reference = live_reference(partial(pair_logps, frozen))
        return reference, reference
    reference = _cached_reference(trainer, pairs, "reference cache", reporter)
    if held_out is None:
        return reference, no_reference
    return reference, _cached_reference(trainer, held_out, "held-out reference cache", reporter)


def round_reference(
    trainer: Trainer,
    pairs: PairSource,
    frozen: LogpsModel | None,
    reporter: Reporter,
    *,
    known: np.ndarray | None = None,
) -> Reference:
    """The frozen reference model if there is one; with ``reference.refresh: round`` the policy as the round begins.

    Each pair is scored once, before the first epoch: forward passes alone take larger micro-batches than training.

    Args:
        known: (n, 2) log-probabilities of the pairs under the frozen reference, nats; those that are NaN are computed.
    """
    if trainer.config.reference_kind == "none":
        return no_reference
    model = trainer.policy if frozen is None else frozen
    logps = np.full((len(pairs), 2), np.nan) if known is None or frozen is None else known.copy()
    missing = np.flatnonzero(np.isnan(logps).any(1))
    logps[missing] = compute_logps(trainer, model, pairs, missing.tolist(), partial(reporter.phase, "scoring"))
    return cached_reference(logps)


def replayable_reference(
    trainer: Trainer, pairs: PairSource, frozen: LogpsModel | None, reporter: Reporter
) -> np.ndarray | None:
    """(n, 2) reference log-probabilities of a round's new pairs, nats, if later rounds can use them; otherwise None."""
    online = trainer.config.online
    if online is None or not online.source.replay or frozen is None or trainer.config.reference.refresh != "never":
        return None
    return compute_logps(trainer, frozen, pairs, range(len(pairs)), partial(reporter.phase, "scoring"))


def _cached_reference(trainer: Trainer, pairs: PairStore, name: str, reporter: Reporter) -> Reference:
    logps, summary = cached_logps(
        _open_store(trainer),
        pairs,
        partial(compute_logps, trainer, trainer.policy, pairs),
        partial(reporter.phase, "scoring"),
    )
    reporter.note(f"{name}: {summary}")
    return cached_reference(logps)


def _open_store(trainer: Trainer) -> ReferenceStore:
    """The store for this reference model and all settings that affect its log-probabilities."""
    config, device = trainer.config, trainer.device
    attention = trainer.policy.model.config.get_text_config()._attn_implementation
    weights = broadcast_from_rank0(lambda: model_digest(config.model.path, config.reference.cache_path / "models"))
    numerics = f"{config.model.dtype}-{device.type}-{attention}"
    if device.type == "cpu" and config.model.dtype == "bfloat16" and trainer.policy.products.linear == "bfloat16":
        numerics += "-rounded_outputs"  # linear layers on the other paths give the same up to float32
    if config.model.lora is not None and config.model.lora.quantize:
        numerics += f"-{config.model.lora.quantize}-{config.model.lora.targets}"
    if config.model.fp8:
        numerics += "-fp8"
    name, remote = store_digest(weights, numerics), config.reference.object_store
    return ReferenceStore(
        config.reference.cache_path / "reference" / name, folder_at(remote) / name if remote else None
    )
