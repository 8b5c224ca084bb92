"""Functions that the processes of the distributed tests run: heads, rows and gradients of a step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.config import Config
from dpo_ray.config.schema import ModelConfig
from dpo_ray.data.loader import PairLoader
from dpo_ray.data.packing import build_row
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_record_tokenizer
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer, Weighting, pair_losses, token_logps
from dpo_ray.objective import head
from dpo_ray.objective.head import Counts, Group, Head, LogitTransform
from dpo_ray.objective.logps import PairLogps, TokenLogps
from dpo_ray.parallel.context import NO_CONTEXT_PARALLEL, ContextParallel
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
