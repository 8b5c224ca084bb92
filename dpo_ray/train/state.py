"""What a run resumes from: the weights, the optimizer, and three counters."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from dpo_ray.data.loader import PairSource
from dpo_ray.train.trainer import Trainer

logger = logging.getLogger(__name__)

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""A model under adapters is not written again and again."""
NAMED = 8
"""Pairs of a skipped step that are named."""


class NotFinite(ValueError):
    """Loss or gradient was NaN or infinite in too many steps in a row."""


@dataclass(slots=True)
class TrainState:
    """Everything that a checkpoint holds, as a DCP ``Stateful``."""

    t: Trainer
    step: int = 0
    """Optimizer steps taken."""
    round: int = 0
    """Rounds finished; online only."""
    consumed: int = 0
    """Pairs consumed over all ranks and epochs; offline only."""
    skipped: int = 0
    """Steps skipped since the last one that was taken; not kept."""

    def count_step(self, nonfinite_pairs: Sequence[int], pairs: PairSource) -> None:
        """Count an optimizer step.

        Args:
            suspects: of a step that was skipped, the pairs at fault.
            pairs: what they index.

        Raises:
            NotFinite: more steps in a row were skipped than ``optim.max_skipped_steps`` allows.
        """
        self.step += 1
        if not nonfinite_pairs:
            self.skipped = 0
            return
        self.skipped += 1
        more = f" and {len(nonfinite_pairs) - NAMED} more" if len(nonfinite_pairs) > NAMED else ""
        named = ", ".join(pairs.name_of(i) for i in nonfinite_pairs[:NAMED]) + more
        most = self.t.config.optim.max_skipped_steps
        message = f"step {self.step}: loss or gradient is not finite; the step is skipped. Its pairs: {named}"
        if self.skipped > most:
            raise NotFinite(
                f"{message}. {self.skipped} steps in a row (optim.max_skipped_steps: {most}): look at these pairs, "
                "lower optim.lr or lengthen optim.warmup_steps; the checkpoints on disk are from before"
            )
        logger.warning(message)

    def state_dict(self) -> dict[str, Any]:
        """Sharded weights and optimizer, counters, and this rank's random state."""
        model, optimizer = get_state_dict(self.t.policy, self.t.optimizer, options=TRAINED)
        return {
            "model": model,
            "optimizer": optimizer,
            "counters": torch.tensor([self.step, self.round, self.consumed]),
            f"rng_{self.t.rank}": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        set_state_dict(
            self.t.policy,
            self.t.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINED,
        )
        self.step, self.round, self.consumed = state["counters"].tolist()
        if (rng := state.get(f"rng_{self.t.rank}")) is not None:
            torch.set_rng_state(rng)
