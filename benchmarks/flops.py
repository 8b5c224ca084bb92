"""Floating-point operations of a training step."""

from typing import Any, NamedTuple

import numpy as np

from dpo_ray.data.assignment import attended


class Shape(NamedTuple):
    """Sizes of a decoder with gated MLPs, such as Llama."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The sizes in a transformers configuration."""
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.intermediate_size,
            config.vocab_size,
        )


def step_flops(shape: Shape, lengths: np.ndarray) -> tuple[float, float]:
    """Floating-point operations of one step: useful ones, and the count of implementations that run each prompt twice.

    A multiplication and an addition per weight and token, times three for forward and backward. The head counts at
    completion tokens (all tokens in the second number), attention at the (query, key) pairs inside the mask.

    Args:
        shape: the model's sizes.
        lengths: (B, 3) tokens of prompt, chosen and rejected.
    """
    hidden, layers, heads, key_heads, intermediate, vocabulary = shape
    head_size = hidden // heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * key_heads * head_size + 3 * hidden * intermediate)
    prompt, chosen, rejected = lengths.astype(float).T
    once, repeated = (prompt + chosen + rejected).sum(), (2 * prompt + chosen + rejected).sum()
    attention_cost = 4 * hidden * layers
    useful = 2 * weights * once + 2 * hidden * vocabulary * (chosen + rejected).sum()
    counted = 2 * (weights + hidden * vocabulary) * repeated
    whole = sum(((prompt + c) ** 2 / 2).sum() for c in (chosen, rejected))
    return 3 * (useful + attention_cost * attended(lengths).sum()), 3 * (counted + attention_cost * whole)
