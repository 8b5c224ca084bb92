"""Log-probabilities of completions, of tokens and summed over sequences.

N = completion tokens, S = sequences, B = pairs
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of the two completions of B pairs under one model."""

    chosen: Tensor
    """(B,) summed over tokens, nats."""
    rejected: Tensor
    """(B,)"""
    chosen_tokens: Tensor
    """(B,) completion lengths in tokens."""
    rejected_tokens: Tensor
    """(B,)"""
    weights: Tensor | None = None
    """(B,) factors of the pairs' losses, without history; None weighs all pairs alike."""

    def of(self, pairs: slice) -> "PairLogps":
        """Those of some of the pairs."""
        weights = None if self.weights is None else self.weights[pairs]
        return PairLogps(
            self.chosen[pairs], self.rejected[pairs], self.chosen_tokens[pairs], self.rejected_tokens[pairs], weights
        )


class TokenLogps(NamedTuple):
    """What a head says of N labels. A tuple, so that FSDP finds the tensors in what a module returns."""

    logps: Tensor
    """(N,) log-probability of each label, float32, nats."""
    log_sum_squares: Tensor
    """(N,) log of the sum of squared probabilities over the vocabulary, without history; (0,) unless asked for."""


def sequence_sums(values: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Sum token values into their sequences.

    Args:
        values: (N,) float32.
        sequence: (N,) index in [0, S) of the sequence each token belongs to.
        sequences: S.

    Returns:
        (S,) float32.
    """
    return values.new_zeros(sequences).index_add(0, sequence, values)


def as_pairs(logps: Tensor, tokens: Tensor, weights: Tensor | None = None) -> PairLogps:
    """Pairs from (2B,) sequences that alternate chosen, rejected; the weight of a pair is the product of its two."""
    product = None if weights is None else weights[0::2] * weights[1::2]
    return PairLogps(logps[0::2], logps[1::2], tokens[0::2], tokens[1::2], product)


def wpo_weights(scores: TokenLogps, sequence: Tensor, tokens: Tensor) -> Tensor:
    """How likely the policy is to write each sequence: the weights of WPO.

    The geometric mean, over the sequence's tokens, of the label's probability over what a token drawn from the policy
    has on average (arXiv:2406.11827, Eq. 2 with the alignment of its section 3.2).

    Args:
        scores: of N tokens, with sums of squares.
        sequence: (N,) index in [0, S).
        tokens: (S,) lengths.

    Returns:
        (S,) float32, without history.
    """
    aligned = scores.logps.detach() - scores.log_sum_squares
    return (sequence_sums(aligned, sequence, tokens.numel()) / tokens).exp()
