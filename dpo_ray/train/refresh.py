"""A reference that is refreshed from the policy as rounds begin (TR-DPO, arXiv:2404.09656).

The copy is sharded like the policy, so each rank updates its own shards and nothing is gathered. It is a second model,
or with LoRA a second set of adapters in the policy.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo_ray.config.schema import ReferenceConfig
from dpo_ray.data.packing import PackedRow
from dpo_ray.model.adapters import ADAPTER, REFERENCE_ADAPTER
from dpo_ray.model.scorer import HeadFn, LogpsModel, Scorer
from dpo_ray.parallel.collectives import local_tensor
from dpo_ray.parallel.fsdp import reshard


class RefreshedReference:
    """A reference model with a copy of the trained weights; called like a Scorer.

    Args:
        policy: its trained weights are copied.
        model: computes log-probabilities with the copy.
        holder: the module whose parameters are the copy; the policy itself if it holds a copy of its adapters.
        reference: when and how the copy is refreshed.
    """

    def __init__(self, policy: Scorer, model: LogpsModel, holder: nn.Module, reference: ReferenceConfig) -> None:
        assert reference.refresh_every is not None
        self.policy, self.model, self.holder = policy, model, holder
        self.every, self.alpha = reference.refresh_every, reference.mixup_alpha

    def __call__(self, row: PackedRow, head_fn: HeadFn) -> Any:
        return self.model(row, head_fn)

    def weights(self) -> dict[str, Tensor]:
        """The copy by names in the policy, sharded; assigning to a tensor in place changes the reference."""
        # A forward pass may have left parameters gathered, and the next one would use these instead of the shards.
        reshard(self.holder)
        copies = dict(self.holder.named_parameters())
        named = {name: self._name_of_copy(name) for name, p in self.policy.named_parameters() if p.requires_grad}
        return {name: copies[copy].detach() for name, copy in named.items()}

    def _name_of_copy(self, name: str) -> str:
        return name.replace(f".{ADAPTER}.", f".{REFERENCE_ADAPTER}.") if self.holder is self.policy else name

    @torch.no_grad()
    def refresh(self) -> None:
        """Replaces the reference by alpha * policy + (1 - alpha) * reference."""
        reshard(self.policy)
        copies, policy = self.weights(), dict(self.policy.named_parameters())
        for name, copy in copies.items():
            local_tensor(copy).mul_(1 - self.alpha).add_(local_tensor(policy[name]), alpha=self.alpha)


def refresh_reference(frozen: LogpsModel | None, round: int) -> None:
    """Refreshes a reference that is due as ``round`` begins; in round 0 it is the policy already.

    Refreshed no earlier, so that evaluations of the last round's policy are compared with the last round's reference.
    """
    if isinstance(frozen, RefreshedReference) and round > 0 and round % frozen.every == 0:
        frozen.refresh()


def refreshed_weights(frozen: LogpsModel | None) -> Mapping[str, Tensor]:
    """The weights of a refreshed reference, which a checkpoint must hold; none of any other reference."""
    return frozen.weights() if isinstance(frozen, RefreshedReference) else {}
