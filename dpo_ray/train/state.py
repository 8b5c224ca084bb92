"""The state that a checkpoint holds: weights, optimizer, random state and counters."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from dpo_ray.config.schema import OptimConfig
from dpo_ray.data.loader import PairSource
from dpo_ray.train.optim import learning_rate

logger = logging.getLogger(__name__)

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
"""The frozen model under adapters is not saved."""
CONFIGURED = ("betas", "eps", "weight_decay")
"""Settings of parameter groups that are not loaded. The others may be state, as in schedule-free optimizers."""
PAIRS_NAMED = 8
"""Maximum number of pairs of a skipped step that the log names."""


class NotFinite(ValueError):
    """Loss or gradient was NaN or infinite in too many steps in a row."""


@dataclass(slots=True)
class TrainState:
    """The contents of a checkpoint, as a DCP ``Stateful``."""

    policy: nn.Module
    optimizer: torch.optim.Optimizer
    log_ratio_totals: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """The trainer's tensor."""
    max_skipped_steps: int = 0
    """Maximum number of skipped steps in a row."""
    reference_weights: Callable[[], Mapping[str, Tensor]] = dict
    """Weights of a reference that is refreshed from the policy, sharded, by name; none of one that can be rebuilt."""
    step: int = 0
    """Optimizer steps taken."""
    round: int = 0
    """Finished rounds; online only."""
    consumed: int = 0
    """Pairs consumed over all ranks and epochs; offline only."""
    warmed: float = 0.0
    """Position in the schedule at the end of warm-up, in epochs offline and in rounds online."""
    skipped: int = 0
    """Steps skipped since the last one taken; not saved."""

    def next_learning_rate(self, optim: OptimConfig, *, position: float, total: float) -> float:
        """Learning rate of the next step, at ``position`` of ``total`` epochs (offline) or rounds (online).

        Warm-up counts steps, and the end of it is kept: a run resumed with other steps does not warm up again.
        """
        if self.step <= optim.warmup_steps:
            self.warmed = position
        return learning_rate(optim, step=self.step, position=position, warmed=self.warmed, total=total)

    def count_step(self, nonfinite_pairs: Sequence[int], pairs: PairSource) -> None:
        """Counts an optimizer step.

        Args:
            nonfinite_pairs: the pairs at fault if the step was skipped.
            pairs: the source that they index.

        Raises:
            NotFinite: more than ``max_skipped_steps`` steps in a row were skipped.
        """
        self.step += 1
        if not nonfinite_pairs:
            self.skipped = 0
            return
        self.skipped += 1
        more = f" and {len(nonfinite_pairs) - PAIRS_NAMED} more" if len(nonfinite_pairs) > PAIRS_NAMED else ""
        names = ", ".join(pairs.name_of(i) for i in nonfinite_pairs[:PAIRS_NAMED]) + more
        message = f"step {self.step}: loss or gradient is not finite; the step is skipped. Its pairs: {names}"
        if self.skipped > self.max_skipped_steps:
            raise NotFinite(
                f"{message}. {self.skipped} steps in a row (optim.max_skipped_steps: {self.max_skipped_steps}): look "
                "at these pairs, lower optim.lr or raise optim.warmup_steps; the saved checkpoints are older"
            )
        logger.warning(message)

    def state_dict(self) -> dict[str, Any]:
        """Sharded weights and optimizer state, counters, and this rank's random state."""
        model, optimizer = get_state_dict(self.policy, self.optimizer, options=TRAINED_ONLY)
        reference = dict(self.reference_weights())
        return {
            **({"reference": reference} if reference else {}),
            "model": model,
            "optimizer": optimizer,
            "counters": torch.tensor([self.step, self.round, self.consumed, self.warmed], dtype=torch.float64),
            "log_ratio_totals": self.log_ratio_totals,
            f"rng_{dist.get_rank()}": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state returned by ``state_dict``; the optimizer keeps its configured settings."""
        settings = [{key: g[key] for key in CONFIGURED if key in g} for g in self.optimizer.param_groups]
        set_state_dict(
            self.policy,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINED_ONLY,
        )
        for group, configured in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(configured)
        for name, weight in self.reference_weights().items():
            weight.copy_(state["reference"][name])
        self.log_ratio_totals.copy_(state["log_ratio_totals"])
        *counters, self.warmed = state["counters"].tolist()
        self.step, self.round, self.consumed = map(int, counters)
        if (rng := state.get(f"rng_{dist.get_rank()}")) is not None:
            torch.set_rng_state(rng)
