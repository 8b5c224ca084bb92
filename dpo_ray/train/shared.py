"""The parts that consecutive runs of one process share, as the trials of a sweep do: the model and its reference.

A run trains the weights of the model that the run before it has left, reset to the untrained ones. Reference
log-probabilities are read and verified once, and checkpoints are copied to the same host memory.
"""

import contextlib
import gc
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from dpo_ray.config import Config
from dpo_ray.data.store import PairStore
from dpo_ray.model.scorer import LogpsModel
from dpo_ray.parallel.collectives import local_tensor
from dpo_ray.parallel.fsdp import reshard
from dpo_ray.reference.reference import Reference
from dpo_ray.train.checkpoint import CachedStager
from dpo_ray.train.optim import build_optimizer
from dpo_ray.train.reference import build_references, load_frozen_reference
from dpo_ray.train.refresh import refreshed_weights
from dpo_ray.train.reporter import Reporter
from dpo_ray.train.trainer import Trainer, build_trainer, configured_losses


class SharedParts:
    """Stands for ``build_trainer`` and ``build_references`` in a process that trains one run after another.

    Every rank makes the same calls. After a run that failed, call ``clear``: its model may be in any state.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.trainer: Trainer | None = None
        self.untrained: list[Tensor] = []
        """This rank's shards of the trainable weights, on the host."""
        self.frozen: LogpsModel | None = None
        """The reference that stays beside the policy."""
        self.references: dict[str, tuple[Reference, Reference]] = {}
        self.stager = CachedStager()
        release_memory()

    def build_trainer(self, config: Config, device: torch.device, reporter: Reporter) -> Trainer:
        """See ``trainer.build_trainer``; the model is kept as long as the settings that shape it stay."""
        if self.trainer is None or _model_settings(self.trainer.config) != _model_settings(config):
            self.clear()  # before another model is loaded
            self.trainer = build_trainer(config, device, reporter)
            self.untrained = [local_tensor(weight).cpu().clone() for weight in _trainable(self.trainer)]
            return self.trainer
        reporter.phase("loading")
        torch.manual_seed(config.run.seed)
        reshard(self.trainer.policy)
        self._reset(_trainable(self.trainer))
        for parameter in self.trainer.policy.parameters():
            parameter.grad = None
        log_ratio_totals = torch.zeros(2, dtype=torch.float64)
        self.trainer = replace(
            self.trainer,
            config=config,
            pair_losses=configured_losses(config.loss, log_ratio_totals),
            log_ratio_totals=log_ratio_totals,
            optimizer=build_optimizer(self.trainer.policy, config.optim),
        )
        return self.trainer

    def load_frozen_reference(self, trainer: Trainer) -> LogpsModel | None:
        """See ``reference.load_frozen_reference``; the model is kept as long as the policy is."""
        if self.frozen is None:
            self.frozen = load_frozen_reference(trainer)
        else:
            self._reset(refreshed_weights(self.frozen).values())
        return self.frozen

    def build_references(
        self, trainer: Trainer, pairs: PairStore, held_out: PairStore | None, reporter: Reporter
    ) -> tuple[Reference, Reference]:
        """See ``reference.build_references``; cached log-probabilities of the same pairs are kept."""
        if trainer.config.reference_kind != "cached":
            return build_references(trainer, pairs, held_out, reporter, load_frozen=self.load_frozen_reference)
        key = repr((pairs.digest, held_out and held_out.digest))
        if key not in self.references:
            self.references[key] = build_references(trainer, pairs, held_out, reporter)
        return self.references[key]

    @torch.no_grad()
    def _reset(self, weights: Collection[Tensor]) -> None:
        """Gives the untrained values to all trainable weights, or to a copy of them; does nothing with no weights."""
        if weights:
            for weight, untrained in zip(weights, self.untrained, strict=True):
                local_tensor(weight).copy_(untrained)


def release_memory() -> None:
    """Frees what a run leaves: modules and their hooks refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after an error of the device
            torch.cuda.empty_cache()


def _model_settings(config: Config) -> str:
    """The settings on which the model, its weights before training and its reference depend."""
    seed = config.run.seed if config.model.lora is not None else None  # of the adapters
    return repr((config.model, config.shard, config.reference, config.reference_kind, seed))


def _trainable(trainer: Trainer) -> list[Tensor]:
    """The trainable weights, sharded."""
    return [parameter.detach() for parameter in trainer.policy.parameters() if parameter.requires_grad]
