"""Functions that distributed tests run on every rank: training of a tiny model, reported to a list."""

import os
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dpo_ray.config import Config
from dpo_ray.config.schema import ModelConfig, ShardConfig
from dpo_ray.data.packing import build_row
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_record_tokenizer
from dpo_ray.model import load
from dpo_ray.model.scorer import pair_losses
from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import sigmoid
from dpo_ray.ops import float8
from dpo_ray.parallel.fsdp import build_mesh
from dpo_ray.train.offline import train_offline
from dpo_ray.train.shared import SharedParts
from dpo_ray.types import Metrics, TokenPair

NAN_TOKENS = 20


def nan_for_one_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> torch.Tensor:
    """DPO, but NaN for pairs whose chosen completion has as many tokens as the eighth of ``ragged_texts``."""
    return torch.where(policy.chosen_tokens == NAN_TOKENS, torch.nan, sigmoid(policy, reference, beta=beta))


def fails_in_training(policy: PairLogps, reference: PairLogps, *, beta: float) -> torch.Tensor:
    """DPO without a backward pass."""
    if policy.chosen.requires_grad:
        raise RuntimeError("no gradient today")
    return sigmoid(policy, reference, beta=beta)


class ListReporter:
    """Records all metrics."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.lines: list[Metrics] = []

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

    def start(self, step: int, round: int = 0) -> None:
        """Ignored."""

    def step(self, metrics: Metrics) -> None:
        """Record a step."""
        self.lines.append(metrics)

    def round(self, metrics: Metrics) -> None:
        """Record a round."""
        self.lines.append(metrics)

    def evaluation(self, metrics: Metrics) -> None:
        """Record an evaluation."""
        self.lines.append(metrics)

    def stop_requested(self) -> bool:
        """True after step ``stop_after``."""
        return bool(self.lines) and self.lines[-1]["step"] == self.stop_after


def offline(rank: int, config: dict[str, Any], stop_after: int | None = None) -> list[Metrics]:
    """Train offline; rank 0 asks to stop after a step. Returns the metrics."""
    parsed = Config.model_validate(config)
    tokenizer, folder = load_record_tokenizer(parsed), parsed.reference.cache_path / f"data-{rank}"
    pairs = prepare_pairs(parsed.data.train, tokenizer, folder=folder)
    held_out = prepare_pairs(parsed.data.eval, tokenizer, folder=folder) if parsed.data.eval else None
    reporter = ListReporter(stop_after if rank == 0 else None)
    train_offline(parsed, pairs=pairs, held_out=held_out, device=torch.device("cpu"), reporter=reporter)
    return reporter.lines


def offline_in_turn(rank: int, configs: list[dict[str, Any]], fresh: bool) -> list[list[Metrics]]:
    """Offline runs in the same processes, which share their parts or build them anew; returns the metrics of each."""
    shared, lines = SharedParts(), []
    for config in configs:
        parsed = Config.model_validate(config)
        folder, reporter = parsed.reference.cache_path / f"data-{rank}", ListReporter()
        pairs = prepare_pairs(parsed.data.train, load_record_tokenizer(parsed), folder=folder)
        train_offline(
            parsed,
            pairs=pairs,
            held_out=None,
            device=torch.device("cpu"),
            reporter=reporter,
            shared=None if fresh else shared,
        )
        lines.append(reporter.lines)
    return lines


def groups_after_failures(rank: int, config: dict[str, Any]) -> list[int]:
    """Process groups of this process after a first run that fails in training, and after a second."""
    groups = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no gradient today"):
            offline(rank, config)
        groups.append(len(dist.distributed_c10d._world.pg_map))
    return groups


def offline_counting_graphs(rank: int, config: dict[str, Any]) -> tuple[list[Metrics], int]:
    """``offline``; also returns the number of graphs that torch.compile made."""
    from torch._dynamo.utils import counters

    lines = offline(rank, config)
    return lines, counters["stats"]["unique_graphs"]


def offline_uncompiled(rank: int, config: dict[str, Any]) -> list[Metrics]:
    """``offline`` with torch.compile disabled, also inside libraries."""
    with torch.compiler.set_stance("force_eager"):
        return offline(rank, config)


def offline_emulating_float8(rank: int, config: dict[str, Any]) -> list[Metrics]:
    """``offline`` with float8 products emulated in full precision."""
    emulated = partial(float8.use_float8, emulate=True)
    with mock.patch.multiple(load, validate_float8_device=lambda device: None, use_float8=emulated):
        return offline(rank, config)


def gathered_ahead(rank: int, model: dict[str, Any], sharding: dict[str, Any]) -> dict[str, list[Any]]:
    """Names of prefetched layers in order, for the forward and the backward pass."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    settings, device = ShardConfig.model_validate(sharding), torch.device("cpu")
    mesh = build_mesh(settings, device)
    policy = load.load_sharded(ModelConfig.model_validate(model), settings, mesh, device, trainable=True)
    asked: dict[str, list[Any]] = {"forward": [], "backward": []}
    prefetch = FSDPParamGroup._prefetch_unshard

    def noted(group: Any, kind: str) -> None:
        asked[kind].append(group._module_fqn)
        prefetch(group, kind)

    with mock.patch.object(FSDPParamGroup, "_prefetch_unshard", staticmethod(noted)):
        row = build_row([TokenPair((1, 2), (3, 4), (5,))], "shared")
        pair_losses(policy, row, lambda logps, pairs: logps.chosen - logps.rejected).total.backward()
    return asked


def offline_in_store(
    rank: int, environment: dict[str, str], config: dict[str, Any], stop_after: int | None = None
) -> list[Metrics]:
    """``offline`` with the credentials and endpoint of an object store."""
    # Ranks are forked from a server whose environment is older.
    os.environ.update(environment)
    return offline(rank, config, stop_after)
