"""Log-probabilities per token and summed over completions.

N = completion tokens, S = sequences, B = pairs
"""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of the two completions of B pairs under one model."""

    chosen: Tensor
    """(B,) summed over tokens, nats."""
    rejected: Tensor
    """(B,) summed over tokens, nats."""
    chosen_tokens: Tensor
    """(B,) completion lengths in tokens."""
    rejected_tokens: Tensor
    """(B,) completion lengths in tokens."""
    weights: Tensor | None = None
    """(B,) weights of the pairs' losses, without gradient; None is 1 for each."""
    of_step: Tensor | None = None
    """(B, k) values that losses take from all pairs of the step, see ``losses.STEP_VALUES``; of a reference only."""
    unpaired: Tensor | None = None
    """(B,) 0 for pairs, and 1 or -1 for completions without a pair, see ``TokenPair.unpaired``."""
    follows: Tensor | None = None
    """(B,) True if the chosen completion is the rejected one of the pair before, as in a ranked list."""

    def of(self, pairs: slice) -> "PairLogps":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[pairs] for name, value in values.items() if value is not None})


class TokenLogps(NamedTuple):
    """Log-probabilities of N labels. A tuple, so that FSDP finds the tensors in a module's output."""

    logps: Tensor
    """(N,) log-probability of each label, float32, nats."""
    log_sum_squares: Tensor
    """(N,) log of the sum of squared probabilities over the vocabulary, without gradient; (0,) if not computed."""


def sequence_sums(values: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """(S,) sums of (N,) token values per sequence; ``sequence`` is (N,), the sequence of each token in [0, S)."""
    return values.new_zeros(sequences).index_add(0, sequence, values)


def as_pairs(
    logps: Tensor, tokens: Tensor, pairs: Tensor, unpaired: Tensor, weights: Tensor | None = None
) -> PairLogps:
    """Pairs of sequences.

    Args:
        logps: (S,) log-probability of each sequence, nats.
        tokens: (S,) length of each sequence.
        pairs: (B, 2) sequences that are chosen and rejected.
        unpaired: (B,) as in ``PairLogps``.
        weights: (B,) as in ``PairLogps``.
    """
    (chosen, rejected), (chosen_tokens, rejected_tokens) = logps[pairs].unbind(1), tokens[pairs].unbind(1)
    follows = torch.cat((pairs.new_zeros(min(len(pairs), 1)).bool(), pairs[1:, 0] == pairs[:-1, 1]))
    return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens, weights, unpaired=unpaired, follows=follows)


def wpo_weights(logps: TokenLogps, sequence: Tensor, tokens: Tensor) -> Tensor:
    """WPO weights: the likelihood of each sequence under the policy.

    Geometric mean over the tokens of p(label) / E[p(token)] with tokens sampled from the policy (arXiv:2406.11827,
    Eq. 2 with the alignment of section 3.2).

    Args:
        logps: N tokens, with sums of squares.
        sequence: (N,) index in [0, S).
        tokens: (S,) lengths.

    Returns:
        (S,) float32, without gradient.
    """
    aligned = logps.logps.detach() - logps.log_sum_squares
    return (sequence_sums(aligned, sequence, tokens.numel()) / tokens).exp()
