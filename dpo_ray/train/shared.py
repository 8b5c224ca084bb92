"""The parts that consecutive runs of one process share, as the trials of a sweep do: the model and its reference.

A run trains the weights of the model that the run before it has left, reset to the untrained ones. Reference
log-probabilities are read and verified once, and checkpoints are copied to the same host memory.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo_ray.config import Config
from dpo_ray.data.store import PairStore
from dpo_ray.parallel.fsdp import reshard
from dpo_ray.reference.reference import Reference
from dpo_ray.train.checkpoint import CachedStager
from dpo_ray.train.optim import build_optimizer
from dpo_ray.train.reference import build_references
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
        self.references: dict[str, tuple[Reference, Reference]] = {}
        self.stager = CachedStager()

    def build_trainer(self, config: Config, device: torch.device, reporter: Reporter) -> Trainer:
        """See ``trainer.build_trainer``; the model is kept as long as the settings that shape it stay."""
        if self.trainer is None or _model_settings(self.trainer.config) != _model_settings(config):
            self.clear()  # before another model is loaded
            self.trainer = build_trainer(config, device, reporter)
            self.untrained = [weight.detach().cpu().clone() for weight in _trainable(self.trainer)]
            return self.trainer
        reporter.phase("loading")
        torch.manual_seed(config.run.seed)
        reshard(self.trainer.policy)
        with torch.no_grad():
            for weight, untrained in zip(_trainable(self.trainer), self.untrained, strict=True):
                weight.copy_(untrained)
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

    def build_references(
        self, trainer: Trainer, pairs: PairStore, held_out: PairStore | None, reporter: Reporter
    ) -> tuple[Reference, Reference]:
        """See ``reference.build_references``; cached log-probabilities of the same pairs are kept."""
        if trainer.config.reference_kind != "cached":
            return build_references(trainer, pairs, held_out, reporter)
        key = repr((pairs.digest, held_out and held_out.digest))
        if key not in self.references:
            self.references[key] = build_references(trainer, pairs, held_out, reporter)
        return self.references[key]


def _model_settings(config: Config) -> str:
    """The settings on which the model, its weights before training and its reference depend."""
    seed = config.run.seed if config.model.lora is not None else None  # of the adapters
    return repr((config.model, config.shard, config.reference, config.reference_kind, seed))


def _trainable(trainer: Trainer) -> list[Tensor]:
    """This rank's shards of the trainable weights."""
    weights = [parameter for parameter in trainer.policy.parameters() if parameter.requires_grad]
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
