"""What the processes of the distributed tests run: real training on a tiny model, reported to a list."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.config.schema import Config
from dpo_ray.data.loader import PairLoader
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_tokenizer
from dpo_ray.model.scorer import pair_losses
from dpo_ray.objective import head
from dpo_ray.objective.head import Group, Head, LogitTransform
from dpo_ray.objective.logps import PairLogps, TokenScores
from dpo_ray.objective.losses import sigmoid
from dpo_ray.train.offline import train_offline
from dpo_ray.train.setup import set_up
from dpo_ray.types import Metrics

NAN_TOKENS = 20


def nan_for_one_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> torch.Tensor:
    """DPO, but NaN for pairs whose chosen completion has as many tokens as the eighth of ``ragged_texts``."""
    return torch.where(policy.chosen_tokens == NAN_TOKENS, torch.nan, sigmoid(policy, reference, beta=beta))


class ListReporter:
    """Keeps every line of metrics."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.lines: list[Metrics] = []
        self.resumed_at: int | None = None

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Not kept."""

    def note(self, text: str) -> None:
        """Not kept."""

    def resumed(self, step: int, rounds: int | None = None) -> None:
        """Remember where the run went on."""
        self.resumed_at = step

    def step(self, metrics: Metrics) -> None:
        """Keep a step."""
        self.lines.append(metrics)

    def evaluation(self, metrics: Metrics) -> None:
        """Keep an evaluation."""
        self.lines.append(metrics)

    def stop_asked(self) -> bool:
        """After the step that was given."""
        return self.lines[-1]["step"] == self.stop_after


def offline(rank: int, config: dict[str, Any], stop_after: int | None = None) -> list[Metrics]:
    """Train offline, asked by rank 0 to stop after a step; returns the lines of metrics."""
    parsed = Config.model_validate(config)
    tokenizer, folder = load_tokenizer(parsed.model.path), parsed.reference.cache_path / f"data-{rank}"
    pairs = prepare_pairs(parsed.data.train, tokenizer, parsed.data, folder=folder)
    held_out = prepare_pairs(parsed.data.eval, tokenizer, parsed.data, folder=folder) if parsed.data.eval else None
    reporter = ListReporter(stop_after if rank == 0 else None)
    train_offline(parsed, pairs=pairs, held_out=held_out, device=torch.device("cpu"), reporter=reporter)
    return reporter.lines


def offline_in_store(
    rank: int, environment: dict[str, str], config: dict[str, Any], stop_after: int | None = None
) -> list[Metrics]:
    """``offline`` with the credentials and endpoint of an object store."""
    # Ranks are forked from a server that began with another environment.
    os.environ.update(environment)
    return offline(rank, config, stop_after)


def gradients(rank: int, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The full gradients, by name, of the sum of log-probability margins of the first step's pairs."""
    parsed = Config.model_validate(config)
    tokenizer, folder = load_tokenizer(parsed.model.path), parsed.reference.cache_path / f"data-{rank}"
    pairs = prepare_pairs(parsed.data.train, tokenizer, parsed.data, folder=folder)
    t = set_up(parsed, torch.device("cpu"))
    batch = next(PairLoader(pairs, t.batch_shape, pairs_per_step=5, seed=0, shuffle=False))
    for micro in batch.micro_batches:
        losses = pair_losses(t.policy, micro.row, lambda policy, _: policy.chosen - policy.rejected, weighting="none")
        losses.total.backward()
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in t.policy.named_parameters()}
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

    def objective(group: Group, scores: TokenScores) -> Tensor:
        return torch.stack([(of.sum() / 100).square() for of in scores.logps.split(pair_tokens[group.pairs])])

    scores = head.token_logps(hidden, part, labels, chunk=16, with_squares=True)
    losses = head.pair_losses(hidden, part, labels, pair_tokens, objective, chunk=28)
    losses.total.backward()
    found: dict[str, Any] = {"logps": scores.logps, "squares": scores.log_sum_squares, "each": losses.each}
    found |= {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
    return {name: tensor.numpy() for name, tensor in found.items()}
