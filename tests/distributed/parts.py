"""Functions that the processes of the distributed tests run: heads, rows and gradients of a step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ray.config import Config
from dpo_ray.config.schema import ModelConfig
from dpo_ray.data.loader import PairLoader
from dpo_ray.data.packing import build_row
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_record_tokenizer
from dpo_ray.model.export import AdapterWeights, CheckpointWeights
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer, Weighting, pair_losses, token_logps
from dpo_ray.objective import head
from dpo_ray.objective.head import Counts, Group, Head, LogitTransform
from dpo_ray.objective.logps import PairLogps, TokenLogps
from dpo_ray.parallel.collectives import broadcast_or_raise, gather_to_rank0
from dpo_ray.parallel.context import NO_CONTEXT_PARALLEL, ContextParallel
from dpo_ray.sync.lora import merged_weights
from dpo_ray.train.trainer import build_trainer
from dpo_ray.types import TokenPair
from tests.conftest import gradient
from tests.distributed.runs import ListReporter


def context_parallel_errors(rank: int, model: str, weighting: Weighting) -> dict[str, float]:
    """Largest differences between a forward and backward pass over sharded rows and one over whole rows.

    The rows: five pairs of uneven lengths, one with tokens without loss; one pair whose prompt is most of the row;
    no pairs.
    """
    draw = np.random.default_rng(0)
    text = lambda length: tuple(draw.integers(0, 256, length).tolist())  # noqa: E731
    pair = lambda prompt, chosen, rejected: TokenPair(text(prompt), text(chosen), text(rejected))  # noqa: E731
    pairs = [pair(*draw.integers(1, 40, 3)) for _ in range(4)]
    trajectory = pair(9, 24, 17)
    pairs.append(replace(trajectory, chosen=tuple(t if i // 5 % 2 else ~t for i, t in enumerate(trajectory.chosen))))
    rows = [build_row(some, "shared") for some in (pairs, [pair(201, 37, 56)], [])]

    def loss(policy: PairLogps, reference: PairLogps | None) -> torch.Tensor:
        weights = 1.0 if policy.weights is None else policy.weights
        return -torch.nn.functional.logsigmoid(0.1 * (policy.chosen - policy.rejected)) * weights

    results = []
    for context in (NO_CONTEXT_PARALLEL, ContextParallel(rank, dist.get_world_size(), dist.group.WORLD)):
        scorer = Scorer(build_model(ModelConfig(path=model), with_weights=True), context)
        logps = torch.cat([token_logps(scorer, row) for row in rows])
        losses = [pair_losses(scorer, row, loss, weighting=weighting) for row in rows]
        torch.stack([row_losses.total for row_losses in losses]).sum().backward()
        gradients = [gradient(parameter) for parameter in scorer.parameters()]
        if context is not NO_CONTEXT_PARALLEL:
            for local in gradients:
                dist.all_reduce(local)
        policy = torch.cat([row_losses.policy.chosen / row_losses.policy.chosen_tokens for row_losses in losses])
        results.append((torch.cat([row_losses.each for row_losses in losses]), logps, policy, gradients))
    (*whole, whole_gradients), (*sharded, sharded_gradients) = results
    errors = [float((one - other).abs().max()) for one, other in zip(whole, sharded, strict=True)]
    gradients = max(float((a - b).norm() / a.norm()) for a, b in zip(whole_gradients, sharded_gradients, strict=True))
    return dict(zip(("losses", "logps", "policy"), errors, strict=True), gradients=gradients)


def gradients(rank: int, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Full gradient of each parameter, for the sum of the log-probability margins of the first step's pairs."""
    parsed = Config.model_validate(config)
    tokenizer, folder = load_record_tokenizer(parsed), parsed.reference.cache_path / f"data-{rank}"
    pairs = prepare_pairs(parsed.data.train, tokenizer, folder=folder)
    trainer = build_trainer(parsed, torch.device("cpu"), ListReporter())
    batch = next(PairLoader(pairs, trainer.batch_shape, pairs_per_step=5, seed=0, shuffle=False))
    for micro in batch.micro_batches:
        losses = pair_losses(trainer.policy, micro.row, lambda policy, _: policy.chosen - policy.rejected)
        losses.total.backward()
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in trainer.policy.named_parameters()}
    return {name: grad.full_tensor().numpy() for name, grad in grads.items()}


def vocabulary_parallel_head(
    rank: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    pair_tokens: Sequence[int],
    transform: LogitTransform,
) -> dict[str, np.ndarray]:
    """Log-probabilities, losses and gradients of a head that is sharded over the vocabulary.

    The loss of a pair is the square of a hundredth of its tokens' summed log-probabilities.
    """
    rows = weight.shape[0] // dist.get_world_size()
    local = slice(rank * rows, (rank + 1) * rows)
    hidden, weight, bias = (x.clone().requires_grad_() for x in (hidden, weight[local], bias[local]))
    local_head = Head(weight, bias, transform, dist.group.WORLD, local.start)

    def objective(group: Group, tokens: TokenLogps) -> Tensor:
        return torch.stack([(pair.sum() / 100).square() for pair in tokens.logps.split(pair_tokens[group.pairs])])

    prompts = [Counts(1, 2, tokens) for tokens in pair_tokens]
    with patch.object(Head, "chunk", 16):
        tokens = head.token_logps(hidden, local_head, labels, with_squares=True)
    with patch.object(Head, "chunk", 28):
        losses = head.chunked_pair_losses(hidden, local_head, labels, prompts, objective)
    losses.total.backward()
    results: dict[str, Any] = {"logps": tokens.logps, "squares": tokens.log_sum_squares, "each": losses.each}
    results |= {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
    return {name: tensor.numpy() for name, tensor in results.items()}


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not isinstance(result, DTensor):
            self.elements = max(self.elements, result.numel())
        return result


def gathered(rank: int, mesh_shape: Sequence[int]) -> list[tuple[bool, bool, int]]:
    """For tensors of several shapes: is it on this rank, is it whole, and the largest allocation in elements."""
    mesh = init_device_mesh("cpu", tuple(mesh_shape))
    replicas = [Replicate()] * (len(mesh_shape) - 1)
    found = []
    for shape, placement in SHARDED:
        values = torch.arange(math.prod(shape), dtype=torch.bfloat16).reshape(shape)
        tensor = distribute_tensor(values, mesh, [*replicas, placement])
        with LargestAllocation() as largest, patch.object(DTensor, "full_tensor", side_effect=AssertionError):
            whole = gather_to_rank0(tensor)
        found.append((whole is not None, whole is not None and torch.equal(whole, values), largest.elements))
    return found


SHARDED = [((7, 30), Shard(0)), ((30, 7), Shard(1)), ((2, 90), Shard(0)), ((50,), Shard(0)), ((9, 9), Replicate())]
"""Shapes that two and three ranks divide unevenly, or not at all; the last of three ranks has nothing of the third."""


def gathered_from_two_dimensions(rank: int, mesh_shape: Sequence[int]) -> list[tuple[bool, bool, int]]:
    """``gathered`` for tensors sharded over tensor parallelism, the last dimension of the mesh, and over FSDP."""
    names = ("replicate", "shard", "tensor")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=names)
    found = []
    for shape, placement in SHARDED_TWICE:
        values = torch.arange(math.prod(shape), dtype=torch.bfloat16).reshape(shape)
        layer: Any = torch.nn.Module()
        sharded = distribute_tensor(values, mesh["tensor"], [placement])
        layer.register_parameter("weight", torch.nn.Parameter(sharded))
        fully_shard(layer, mesh=mesh[names[:-1]])
        with LargestAllocation() as largest, patch.object(DTensor, "full_tensor", side_effect=AssertionError):
            whole = gather_to_rank0(layer.weight.detach())
        found.append((whole is not None, whole is not None and torch.equal(whole, values), largest.elements))
    return found


SHARDED_TWICE = [((8, 6), Shard(0)), ((5, 6), Shard(1)), ((10, 6), Shard(0)), ((7,), Replicate())]
"""Shapes and how tensor parallelism shards them; FSDP shards rows, which it may divide unevenly."""


def published(rank: int, config: dict[str, Any]) -> tuple[list[str], float, int]:
    """Names that this rank gets to publish, largest difference to full tensors, number of full tensors."""
    policy = _policy(config)
    mine = list(CheckpointWeights(policy, torch.float32))
    full = dict(CheckpointWeights(policy, torch.float32, every_rank=True))
    differences = [float((weight - full[name]).abs().max()) for name, weight in mine]
    return [name for name, _ in mine], max(differences, default=0.0), len(full)


def merged_by_an_engine(rank: int, config: dict[str, Any]) -> tuple[list[str], float, int]:
    """Names of the weights that an engine changes, largest difference to the policy's, elements published."""
    policy = _policy(config)
    adapters, full = dict(AdapterWeights(policy)), dict(CheckpointWeights(policy, torch.bfloat16))
    if rank > 0:
        return [], 0.0, len(adapters)
    stored = load_file(Path(config["model"]["path"]) / "model.safetensors")
    fused, cpu = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")], torch.device("cpu")
    merged = dict(merged_weights(stored.items(), adapters, fused, dtype=torch.bfloat16, device=cpu))
    differences = [float((weight.float() - full[name].float()).abs().max()) for name, weight in merged.items()]
    return list(merged), max(differences), sum(tensor.numel() for tensor in adapters.values())


def _policy(config: dict[str, Any]) -> Scorer:
    """A sharded policy, with adapters that change its weights if it has any."""
    policy = build_trainer(Config.model_validate(config), torch.device("cpu"), ListReporter()).policy
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    return policy


def raised(rank: int) -> tuple[str, str]:
    """Results of calls on every rank: rank 0 returns its rank, then raises."""

    def fail() -> None:
        raise KeyError(f"rank {rank}")

    try:
        broadcast_or_raise(fail)
    except KeyError as error:
        return broadcast_or_raise(lambda: f"rank {rank}"), error.args[0]
    return "", ""
