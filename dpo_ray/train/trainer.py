"""What both loops build before they start: tokenizer, policy, loss and optimizer."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from dpo_ray.config.schema import Config
from dpo_ray.data.loader import BatchShape
from dpo_ray.data.tokenize import load_tokenizer
from dpo_ray.model.load import load_sharded
from dpo_ray.model.scorer import Scorer
from dpo_ray.objective.losses import PairLoss, build_loss
from dpo_ray.parallel.context import build_context
from dpo_ray.parallel.fsdp import build_compute_mesh, build_mesh
from dpo_ray.train.optim import build_optimizer


@dataclass(frozen=True, slots=True)
class Trainer:
    """The parts of a run on one rank."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    policy: Scorer
    pair_loss: PairLoss
    optimizer: torch.optim.Optimizer
    mesh: DeviceMesh
    """How the weights are laid over the ranks."""
    work: DeviceMesh
    """Who computes what; see ``build_compute_mesh``."""
    device: torch.device
    rank: int
    ranks: int

    @property
    def shares(self) -> int:
        """Into how many parts the pairs of a step are dealt."""
        return self.work["data"].size()

    @property
    def share(self) -> int:
        """Which of them is this rank's."""
        return self.work.get_local_rank("data")

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The ranks that together have all pairs of a step, each once."""
        return self.work.get_group("data")

    @property
    def averaged(self) -> int:
        """Ranks over which FSDP takes the mean of gradients, of which each has those of its own pairs and tokens."""
        return self.shares * self.policy.context.ranks

    @property
    def batch_shape(self) -> BatchShape:
        """How steps are cut for this rank."""
        optim = self.config.optim
        # A token meets about 24 h^2 multiplications and additions a layer in matrix products, an attended pair 4 h.
        attention_cost = 1 / (6 * self.policy.model.config.hidden_size)
        tokens = optim.tokens_per_micro_batch * self.policy.context.ranks
        return BatchShape(self.share, self.shares, tokens, attention_cost, optim.layout)


def build_trainer(config: Config, device: torch.device) -> Trainer:
    """Build the parts. Every rank calls it; torch.distributed is initialised."""
    torch.manual_seed(config.run.seed)
    mesh, work = build_mesh(config.shard, device), build_compute_mesh(config.shard, device)
    policy = load_sharded(config.model, config.shard, mesh, device, context=build_context(work), trainable=True)
    return Trainer(
        config,
        load_tokenizer(config.model.path, config.model.chat_template),
        policy,
        build_loss(config.loss),
        build_optimizer(policy, config.optim),
        mesh,
        work,
        device,
        dist.get_rank(),
        dist.get_world_size(),
    )


def load_reference_model(t: Trainer) -> Scorer:
    """The untrained policy, sharded like the policy and kept in the compute dtype."""
    return load_sharded(t.config.model, t.config.shard, t.mesh, t.device, context=t.policy.context, trainable=False)


def any_rank(flag: bool) -> bool:
    """Whether any rank says so: what one rank hears, all do at the same step."""
    said = torch.tensor(int(flag))
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said)
