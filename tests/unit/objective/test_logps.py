"""Log-probabilities of tokens summed into sequences, and their weights, by hand."""

import pytest
import torch

from dpo_ray.objective.logps import TokenLogps, sequence_sums, wpo_weights


def test_sequence_sums_add_tokens_to_their_sequences() -> None:
    sums = sequence_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 0, 2]), 3)
    assert sums.tolist() == [5.0, 0.0, 10.0]


def test_wpo_weights_are_geometric_means_of_a_labels_probability_over_a_drawn_tokens() -> None:
    # sequence 0: probabilities 1/2 and 1/8 where a drawn token has 1/2 and 1/2: (1 * 1/4) ** 1/2 = 1/2
    logps, squares = torch.tensor([0.5, 0.125, 0.25]).log(), torch.tensor([0.5, 0.5, 1.0]).log()
    weights = wpo_weights(TokenLogps(logps, squares), torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    assert weights.tolist() == pytest.approx([0.5, 0.25])
