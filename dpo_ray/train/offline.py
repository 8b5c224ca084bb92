"""DPO on a fixed preference set (arXiv:2305.18290): the whole algorithm.

For a prompt x with chosen completion y_w and rejected completion y_l, the loss of a pair is (Eq. 7)

    -log sigmoid(beta * [(log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))])

and the loss of a step its mean over the step's pairs. ``objective/losses.py`` has this loss and its relatives,
``model/scorer.py`` computes log pi, ``train/reference.py`` provides log ref, ``train/step.py`` takes the gradient step.

Every rank runs the same lines the same number of times. Independent of Ray and of file formats: pairs come from a
source, metrics go to a reporter.
"""

import torch

from dpo_ray.config import Config
from dpo_ray.data.loader import Mixture, PairLoader, checked_gaps
from dpo_ray.data.store import PairStore
from dpo_ray.model.export import export_policy
from dpo_ray.parallel.collectives import any_rank
from dpo_ray.train.checkpoint import Checkpointer
from dpo_ray.train.evaluator import PairEvaluator
from dpo_ray.train.reference import build_references
from dpo_ray.train.reporter import Reporter
from dpo_ray.train.shared import SharedParts
from dpo_ray.train.state import TrainState
from dpo_ray.train.step import dpo_step
from dpo_ray.train.trainer import Trainer, build_trainer
from dpo_ray.types import Metrics, TrainResult


def train_offline(
    config: Config,
    *,
    pairs: PairStore,
    held_out: PairStore | None,
    device: torch.device,
    reporter: Reporter,
    shared: SharedParts | None = None,
) -> TrainResult:
    """Trains the policy on ``pairs``, to the end or until a stop is requested.

    Args:
        shared: parts of former runs of this process.
    """
    trainer = (shared.build_trainer if shared else build_trainer)(config, device, reporter)
    loader = _build_loader(trainer, pairs)

    # The untrained policy is the reference: its log-probabilities are computed before a checkpoint is loaded.
    build = shared.build_references if shared else build_references
    reference, held_out_reference = build(trainer, pairs, held_out, reporter)
    skips = config.optim.max_skipped_steps
    state = TrainState(trainer.policy, trainer.optimizer, trainer.log_ratio_totals, skips)
    with Checkpointer(config.run.path / "checkpoints", config, shared.stager if shared else None) as checkpointer:
        resumed = checkpointer.resume(state)
        loader.consumed = state.consumed
        steps_left = _steps_left(config, loader, state.step)
        total_steps, total_epochs = state.step + steps_left, loader.epochs_after(steps_left)
        evaluator = PairEvaluator(trainer, held_out, held_out_reference, reporter, total=total_steps)
        if resumed:
            reporter.note(f"resuming after step {state.step} of {total_steps}")
        reporter.start(state.step)

        metrics: Metrics = evaluator.maybe_run(0) if state.step == 0 else {}
        stopping = any_rank(reporter.stop_requested())
        while state.step < total_steps and not stopping:
            reporter.phase("training", state.step, total_steps)
            lr = state.next_learning_rate(config.optim, position=loader.epochs_after(), total=total_epochs)
            batch = next(loader)
            metrics, nonfinite_pairs = dpo_step(trainer, batch, reference, lr=lr)
            state.consumed = loader.consumed
            state.count_step(nonfinite_pairs, pairs)
            reporter.step({"step": state.step, "epoch": batch.epoch, **metrics})
            metrics |= evaluator.maybe_run(state.step)
            stopping = any_rank(reporter.stop_requested())
            if not stopping:
                checkpointer.maybe_save(state, state.step, total_steps, metrics)

        stopped = state.step < total_steps
        if stopped:
            metrics |= evaluator.maybe_run(state.step, stopping=True)
        checkpointer.maybe_save(state, state.step, total_steps, metrics, stopping=stopped)
    if stopped:
        return TrainResult(metrics, stopped_at=f"step {state.step} of {total_steps}")
    if config.run.export:
        reporter.phase("exporting")
        export_policy(trainer.policy, config.model, trainer.tokenizer, config.run.path)
    return TrainResult(metrics)


def _steps_left(config: Config, loader: PairLoader, step: int) -> int:
    """Optimizer steps to the end of the run: the unseen pairs of its epochs, whatever steps the seen ones took."""
    if config.run.steps is not None:
        return max(0, config.run.steps - step)
    return loader.steps_until(max(1, round(config.run.epochs * len(loader.mixture))))


def _build_loader(trainer: Trainer, pairs: PairStore) -> PairLoader:
    data, config = trainer.config.data, trainer.config
    return PairLoader(
        pairs,
        trainer.batch_shape,
        pairs_per_step=config.optim.pairs_per_step,
        seed=config.run.seed,
        shuffle=data.shuffle,
        mixture=Mixture(pairs.sizes, data.weights) if data.weights else None,
        gaps=checked_gaps(pairs) if config.loss.weighting == "gap" else None,
    )
