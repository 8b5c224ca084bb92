"""The implicit reward of DPO: how much likelier a completion is under the policy than under the reference."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Implicit:
    """Scores ``beta * (log pi(y|x) - log ref(y|x)) - length_penalty * tokens``, the reward of ``loss.beta``.

    The reward that DPO fits (arXiv:2305.18290, equation 5), as judge of the policy's own completions and with a penalty
    of their length: DICE (arXiv:2406.09760). The training workers compute it when a round is complete.

    Args:
        length_penalty: reward per token; alpha of DICE, whose authors count characters.

    Raises:
        ValueError: ``length_penalty`` is not a number.
    """

    def __init__(self, length_penalty: float = 0.0) -> None:
        if not isinstance(length_penalty, int | float):
            raise ValueError(f"judge 'implicit': length_penalty is {length_penalty!r}; it must be a number")
        self.length_penalty = float(length_penalty)

    def scores(
        self, policy: "np.ndarray", reference: "np.ndarray", tokens: "np.ndarray", *, beta: float
    ) -> "np.ndarray":
        """Scores of completions, each given by its log-probabilities (nats) and its number of tokens."""
        return beta * (policy - reference) - self.length_penalty * tokens

    def __call__(self, groups: object) -> list[list[float]]:
        """Never called: a run scores its rounds by ``scores``."""
        raise ValueError(
            "judge 'implicit' is computed by the training workers, for online.judge only; it is no part of another "
            "judge and no online.eval_judge"
        )
