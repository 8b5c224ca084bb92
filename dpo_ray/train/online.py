"""Iterative and online DPO: rounds of generate, judge, select, train, synchronize.

Online DPO is rounds of one optimizer step, iterative DPO rounds of thousands of prompts with
``reference.refresh: round``, asynchronous DPO ``max_lag`` > 0: all the same loop, and the same ``dpo_step`` as offline.
Independent of engines and judges: ``RoundClient`` publishes weights and waits for the pairs of a round.
"""

import logging
import math
from dataclasses import replace
from functools import partial

import torch

from dpo_ray.config import Config
from dpo_ray.config.rounds import JudgeConfig
from dpo_ray.data.loader import PairLoader, PairSource, checked_gaps
from dpo_ray.model.export import export_policy
from dpo_ray.model.scorer import LogpsModel
from dpo_ray.parallel.collectives import any_rank
from dpo_ray.rollout.judges.implicit import Implicit
from dpo_ray.rollout.ledger import RoundData
from dpo_ray.sync.base import WeightSync
from dpo_ray.train.checkpoint import Checkpointer
from dpo_ray.train.evaluator import PromptEvaluator
from dpo_ray.train.logps import compute_sample_logps
from dpo_ray.train.reference import load_frozen_reference, replayable_reference, round_reference
from dpo_ray.train.refresh import refresh_reference, refreshed_weights
from dpo_ray.train.reporter import PhaseTimer, Reporter
from dpo_ray.train.round_client import RoundClient
from dpo_ray.train.round_pairs import Sources
from dpo_ray.train.rounds import Rounds
from dpo_ray.train.shared import SharedParts
from dpo_ray.train.state import TrainState
from dpo_ray.train.step import dpo_step
from dpo_ray.train.trainer import Trainer, build_trainer
from dpo_ray.types import Metrics, TrainResult

logger = logging.getLogger(__name__)


def train_online(
    config: Config,
    *,
    rounds: Rounds,
    sync: WeightSync,
    device: torch.device,
    reporter: Reporter,
    fixed: PairSource | None = None,
    shared: SharedParts | None = None,
) -> TrainResult:
    """Trains through ``online.rounds`` rounds; a requested stop takes effect after the round in training.

    Args:
        fixed: the pairs of data.train, for ``online.source.mix``.
        shared: parts of former runs of this process.
    """
    assert config.online is not None
    online = config.online
    trainer = (shared.build_trainer if shared else build_trainer)(config, device, reporter)
    frozen = (shared.load_frozen_reference if shared else load_frozen_reference)(trainer)
    evaluator = PromptEvaluator(trainer, rounds, frozen, reporter, total=online.rounds)
    skips = config.optim.max_skipped_steps
    reference_weights = partial(refreshed_weights, frozen)
    state = TrainState(trainer.policy, trainer.optimizer, trainer.log_ratio_totals, skips, reference_weights)
    with Checkpointer(config.run.path / "checkpoints", config, shared.stager if shared else None) as checkpointer:
        if checkpointer.resume(state):
            reporter.note(f"resuming after round {state.round} of {online.rounds}")
        reporter.start(state.step, state.round)
        client = RoundClient(trainer, rounds, sync, evaluator, reporter)
        sources = Sources(online, fixed, rounds.read, config.run.seed)

        metrics: Metrics = {}
        sync_s = client.publish(state.round)
        evaluator.resume(state.round)
        if state.round:
            client.rank_checkpoints(checkpointer)
        while state.round < online.rounds and not any_rank(reporter.stop_requested()):
            timer = PhaseTimer({"perf/sync_s": sync_s})
            with timer("perf/wait_s"):
                data = client.wait_for_round(state.round)
            if data is None:
                break
            if frozen is not None and online.judged_by_trainer:
                with timer("perf/judge_s"):
                    reporter.phase("judging")
                    data = judge_by_policy(trainer, rounds, data, frozen, online.judge)
            with timer("perf/train_s"):
                data = complete_round(trainer, rounds, data, frozen, sources, reporter)
                metrics = train_on_round(trainer, data, frozen, state, reporter)
            state.round += 1
            lag = {"policy_lag": data.index - data.policy_version}
            of_round = {**data.metrics, **evaluator.take_metrics(), **lag, **timer.seconds}
            reporter.round({"step": state.step, "round": data.index, **of_round})
            checkpointer.maybe_save(state, state.round, online.rounds)  # before the push: a failed one costs no round
            sync_s = client.publish(state.round)
            evaluator.maybe_request(state.round)
            client.rank_checkpoints(checkpointer)

        stopped = state.round < online.rounds
        if stopped:
            checkpointer.maybe_save(state, state.round, online.rounds, stopping=True)
        else:
            client.wait_for_evaluations()
    if stopped:
        return TrainResult(metrics, stopped_at=f"round {state.round} of {online.rounds}")
    sync.wait()
    if config.run.export:
        reporter.phase("exporting")
        export_policy(trainer.policy, config.model, trainer.tokenizer, config.run.path)
    return TrainResult(metrics)


def judge_by_policy(
    trainer: Trainer, rounds: Rounds, data: RoundData, frozen: LogpsModel, judge: JudgeConfig
) -> RoundData:
    """The round with pairs by the implicit reward of DPO (``judge.use: implicit``); as it is if it has been judged."""
    if data.judged:
        return data
    samples = rounds.samples(data.index)
    if data.index == 0:  # the policy is the reference, and the length alone would decide
        return rounds.judge(0, [0.0] * len(samples))
    policy, reference = (compute_sample_logps(trainer, model, samples) for model in (trainer.policy, frozen))
    tokens = samples.lengths[:, 1]
    scores = Implicit(**judge.args).scores(policy, reference, tokens, beta=trainer.config.loss.beta)
    return rounds.judge(data.index, scores.tolist())


def complete_round(
    trainer: Trainer,
    rounds: Rounds,
    data: RoundData,
    frozen: LogpsModel | None,
    sources: Sources,
    reporter: Reporter,
) -> RoundData:
    """The round with what needs the policy: a refreshed reference, and pairs of other sources."""
    refresh_reference(frozen, data.index)
    if (known := replayable_reference(trainer, data.pairs, frozen, reporter)) is not None:
        rounds.write_reference(data.index, known)
    return sources.add_to(replace(data, reference=known))


def train_on_round(
    trainer: Trainer, data: RoundData, frozen: LogpsModel | None, state: TrainState, reporter: Reporter
) -> Metrics:
    """Trains on a round's pairs; returns the metrics of the last step."""
    config, pairs = trainer.config, data.pairs
    online, optim = config.online, config.optim
    assert online is not None
    metrics: Metrics = {}
    if not len(pairs):
        logger.warning("round %d has no pairs: every group was dropped", data.index)
        return metrics
    # Steps of equal size: a last step of a few leftover pairs would change the weights as much, with more noise.
    steps = math.ceil(len(pairs) / optim.pairs_per_step)
    loader = PairLoader(
        pairs,
        trainer.batch_shape,
        pairs_per_step=math.ceil(len(pairs) / steps),
        seed=config.run.seed + data.index,
        shuffle=config.data.shuffle,
        gaps=checked_gaps(pairs) if config.loss.weighting == "gap" else None,
    )
    reference = round_reference(trainer, pairs, frozen, reporter, known=data.reference)
    steps_per_round = math.ceil(online.prompts_per_round / optim.pairs_per_step) * online.epochs_per_round
    steps = loader.steps_per_epoch * online.epochs_per_round
    for step in range(steps):
        reporter.phase("training", step, steps)
        batch = next(loader)
        lr = state.next_learning_rate(
            optim, position=data.index + step / max(steps, steps_per_round), total=online.rounds
        )
        metrics, nonfinite_pairs = dpo_step(trainer, batch, reference, lr=lr)
        state.count_step(nonfinite_pairs, pairs)
        reporter.step({"step": state.step, "epoch": data.index + batch.epoch / online.epochs_per_round, **metrics})
    return metrics
