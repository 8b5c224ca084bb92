"""What a run resumes from: the weights, the optimizer, and three counters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dpo_ray.train.setup import Setup


@dataclass(slots=True)
class TrainState:
    """Everything that a checkpoint holds, as a DCP ``Stateful``."""

    t: Setup
    step: int = 0
    """Optimizer steps taken."""
    round: int = 0
    """Rounds finished; online only."""
    consumed: int = 0
    """Pairs consumed over all ranks and epochs; offline only."""

    def state_dict(self) -> dict[str, Any]:
        """Sharded weights and optimizer, counters, and this rank's random state."""
        model, optimizer = get_state_dict(self.t.policy, self.t.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "counters": torch.tensor([self.step, self.round, self.consumed]),
            f"rng_{self.t.rank}": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        set_state_dict(
            self.t.policy, self.t.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.step, self.round, self.consumed = state["counters"].tolist()
        if (rng := state.get(f"rng_{self.t.rank}")) is not None:
            torch.set_rng_state(rng)
