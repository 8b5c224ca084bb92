"""What the processes of the distributed tests compute of a step: heads, rows and gradients, reported as numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.config.schema import Config, ModelConfig
from dpo_ray.data.loader import PairLoader
from dpo_ray.data.packing import build_row
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_tokenizer
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer, Weighting, pair_losses, token_logps
from dpo_ray.objective import head
from dpo_ray.objective.head import Group, Head, LogitTransform
from dpo_ray.objective.logps import PairLogps, TokenLogps
from dpo_ray.parallel.context import ALONE, Context
from dpo_ray.train.trainer import build_trainer
from dpo_ray.types import TokenPair
from tests.conftest import gradient


def off_by_sharing_rows(rank: int, model: str, weighting: Weighting) -> dict[str, float]:
    """Largest differences between the ranks' parts of rows, put together, and each rank's own pass over whole rows.

    The rows: five pairs of uneven lengths; one pair whose prompt is most of the row; none.
    """
    draw = np.random.default_rng(0)
    pair = lambda *lengths: TokenPair(*(tuple(draw.integers(0, 256, n).tolist()) for n in lengths))  # noqa: E731
    pairs = [pair(*draw.integers(1, 40, 3)) for _ in range(5)]
    rows = [build_row(some, "shared") for some in (pairs, [pair(201, 37, 56)], [])]

    def loss(policy: PairLogps, pairs: slice) -> torch.Tensor:
        weights = 1.0 if policy.weights is None else policy.weights
        return -torch.nn.functional.logsigmoid(0.1 * (policy.chosen - policy.rejected)) * weights

    found = []
    for context in (ALONE, Context(rank, dist.get_world_size(), dist.group.WORLD)):
        scorer = Scorer(build_model(ModelConfig(path=model), with_weights=True), context)
        logps = torch.cat([token_logps(scorer, row) for row in rows])
        losses = [pair_losses(scorer, row, loss, weighting=weighting) for row in rows]
        torch.stack([of_row.total for of_row in losses]).sum().backward()
        gradients = [gradient(parameter) for parameter in scorer.parameters()]
        if context is not ALONE:
            for local in gradients:
                dist.all_reduce(local)
        policy = torch.cat([of / n for x in losses for of, n in ((x.policy.chosen, x.policy.chosen_tokens),)])
        found.append((torch.cat([of_row.each for of_row in losses]), logps, policy, gradients))
    (*whole, by_weight), (*shared, by_weight_shared) = found
    off_by = [float((one - other).abs().max()) for one, other in zip(whole, shared, strict=True)]
    gradients = max(float((a - b).norm() / a.norm()) for a, b in zip(by_weight, by_weight_shared, strict=True))
    return dict(zip(("losses", "logps", "policy"), off_by, strict=True), gradients=gradients)


def gradients(rank: int, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The full gradients, by name, of the sum of log-probability margins of the first step's pairs."""
    parsed = Config.model_validate(config)
    tokenizer, folder = load_tokenizer(parsed.model.path), parsed.reference.cache_path / f"data-{rank}"
    pairs = prepare_pairs(parsed.data.train, tokenizer, parsed.data, folder=folder)
    trainer = build_trainer(parsed, torch.device("cpu"))
    batch = next(PairLoader(pairs, trainer.batch_shape, pairs_per_step=5, seed=0, shuffle=False))
    for micro in batch.micro_batches:
        losses = pair_losses(trainer.policy, micro.row, lambda policy, _: policy.chosen - policy.rejected)
        losses.total.backward()
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in trainer.policy.named_parameters()}
    return {name: grad.full_tensor().numpy() for name, grad in grads.items()}


def shared_head(
    rank: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    pair_tokens: Sequence[int],
    transform: LogitTransform,
) -> dict[str, np.ndarray]:
    """Log-probabilities, losses and gradients of a head whose rows are dealt to the ranks.

    The loss of a pair is the square of a hundredth of its tokens' summed log-probabilities.
    """
    rows = weight.shape[0] // dist.get_world_size()
    mine = slice(rank * rows, (rank + 1) * rows)
    hidden, weight, bias = (of.clone().requires_grad_() for of in (hidden, weight[mine], bias[mine]))
    part = Head(weight, bias, transform, dist.group.WORLD, mine.start)

    def objective(group: Group, scores: TokenLogps) -> Tensor:
        return torch.stack([(of.sum() / 100).square() for of in scores.logps.split(pair_tokens[group.pairs])])

    scores = head.token_logps(hidden, part, labels, chunk=16, with_squares=True)
    losses = head.chunked_pair_losses(hidden, part, labels, pair_tokens, objective, chunk=28)
    losses.total.backward()
    found: dict[str, Any] = {"logps": scores.logps, "squares": scores.log_sum_squares, "each": losses.each}
    found |= {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
    return {name: tensor.numpy() for name, tensor in found.items()}
