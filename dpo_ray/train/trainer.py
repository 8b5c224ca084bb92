"""The parts that both loops train with, built once per rank: tokenizer, policy, loss, optimizer and meshes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from dpo_ray.config import Config
from dpo_ray.config.losses import LossConfig
from dpo_ray.data.loader import BatchShape
from dpo_ray.data.tokenizer import load_tokenizer
from dpo_ray.model.adapters import REFERENCE_ADAPTER
from dpo_ray.model.architecture import packing_obstacle
from dpo_ray.model.load import load_sharded
from dpo_ray.model.scorer import PairLosses, Scorer, pair_losses
from dpo_ray.objective.build import build_loss
from dpo_ray.objective.precision import ROUNDED, Products
from dpo_ray.ops.attention import MASKED
from dpo_ray.ops.calibration import cached_timings, describe, fastest
from dpo_ray.parallel.collectives import gather_values
from dpo_ray.parallel.context import ContextParallel
from dpo_ray.parallel.fsdp import build_compute_mesh, build_mesh
from dpo_ray.train.optim import build_optimizer
from dpo_ray.train.reporter import Reporter

FORWARD_BATCHES = {"cpu": 4}
"""Micro-batches of training that a forward pass without gradients computes at once, by device type; 1 elsewhere: a GPU
gains little, and its memory holds less than what training with recomputation leaves."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """Policy, optimizer, tokenizer, loss and device meshes of one rank."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    policy: Scorer
    pair_losses: Callable[..., PairLosses]
    """(policy, row, reference=...) -> the configured losses of the pairs in a row; see ``scorer.pair_losses``."""
    log_ratio_totals: torch.Tensor
    """(2,) float64 on the CPU: sum, nats, and number of the log-ratios of all completions in former steps."""
    optimizer: torch.optim.Optimizer
    mesh: DeviceMesh
    """Layout of the weights over the ranks."""
    compute_mesh: DeviceMesh
    """Layout of the work over the ranks; see ``build_compute_mesh``."""
    device: torch.device

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: the pairs of a step are split into this many parts."""
        return self.compute_mesh["data"].size()

    @property
    def dp_rank(self) -> int:
        """This rank's part of the pairs."""
        return self.compute_mesh.get_local_rank("data")

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The data-parallel ranks, which together hold every pair of a step once."""
        return self.compute_mesh.get_group("data")

    @property
    def grad_divide_factor(self) -> int:
        """FSDP averages gradients over this many ranks; multiply the loss by it to get a sum."""
        return self.dp_size * self.policy.context.ranks

    @property
    def batch_shape(self) -> BatchShape:
        """Split of a step's pairs into this rank's micro-batches."""
        return self._batch_shape(self.config.optim.tokens_per_micro_batch)

    @property
    def forward_shape(self) -> BatchShape:
        """Split of pairs for forward passes without gradients, which save no activations."""
        dense_mask = self.policy.model.config.get_text_config()._attn_implementation == MASKED
        batches = 1 if dense_mask else FORWARD_BATCHES.get(self.device.type, 1)  # its cost grows with the square
        return self._batch_shape(batches * self.config.optim.tokens_per_micro_batch)

    def _batch_shape(self, tokens_per_micro_batch: int) -> BatchShape:
        # Per layer, a token costs about 24 h^2 floating-point operations in matrix products, each token that it
        # attends to 4 h.
        attention_cost = 1 / (6 * self.policy.model.config.get_text_config().hidden_size)
        tokens = tokens_per_micro_batch * self.policy.context.ranks
        layout = self.policy.layout(self.config.optim.layout)
        return BatchShape(self.dp_rank, self.dp_size, tokens, attention_cost, layout)


def build_trainer(config: Config, device: torch.device, reporter: Reporter) -> Trainer:
    """Builds the parts of a run. A collective: torch.distributed is initialized."""
    reporter.phase("loading")
    torch.manual_seed(config.run.seed)
    mesh, compute_mesh = build_mesh(config.shard, device), build_compute_mesh(config.shard, device)
    ranks = compute_mesh["context"]
    context = ContextParallel(ranks.get_local_rank(), ranks.size(), ranks.get_group())
    copies = (REFERENCE_ADAPTER,) if config.reference_kind == "adapters" else ()
    policy = load_sharded(
        config.model,
        config.shard,
        mesh,
        device,
        context=context,
        products=choose_products(config, device, reporter),
        trainable=True,
        adapter_copies=copies,
    )
    if obstacle := packing_obstacle(policy.model.config):
        kind = policy.model.config.model_type
        reporter.note(f"one completion per row, padded, instead of packed rows: the model, a {kind}, {obstacle}")
    log_ratio_totals = torch.zeros(2, dtype=torch.float64)
    return Trainer(
        config,
        load_tokenizer(config.model.path, config.model.chat_template),
        policy,
        configured_losses(config.loss, log_ratio_totals),
        log_ratio_totals,
        build_optimizer(policy, config.optim),
        mesh,
        compute_mesh,
        device,
    )


def configured_losses(config: LossConfig, log_ratio_totals: torch.Tensor) -> Callable[..., PairLosses]:
    """``Trainer.pair_losses``."""
    loss = build_loss(config, log_ratio_totals)
    return partial(pair_losses, loss=loss, weighting=config.weighting, router_aux=config.router_aux)


def choose_products(config: Config, device: torch.device, reporter: Reporter) -> Products:
    """The paths of bfloat16 products on a CPU that are the fastest for all ranks. A collective."""
    setting = config.model.cpu_products
    if device.type != "cpu" or config.model.dtype != "bfloat16":
        return ROUNDED
    if setting != "auto":
        return Products.forced(setting)
    products = fastest(gather_values(cached_timings(config.reference.cache_path)))
    reporter.note(describe(products))
    return products
