"""Iterative and online DPO: rounds of generate, judge, select, train, synchronise.

Online DPO is rounds of one optimizer step, iterative DPO rounds of thousands of prompts with
``reference.refresh: round``, asynchronous is ``max_lag`` > 0: all the same loop. The rounds come from a source that
knows engines and judges; this file knows neither.
"""

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from dpo_ray.config.schema import Config
from dpo_ray.data.loader import PairList, PairLoader
from dpo_ray.data.packing import build_sample_row
from dpo_ray.model.export import export_policy, named_weights
from dpo_ray.model.scorer import LogpsModel, pair_logps, token_logps
from dpo_ray.objective.precision import DTYPES
from dpo_ray.parallel.fsdp import reshard
from dpo_ray.reference.reference import Reference, cached_reference, live_reference, no_reference
from dpo_ray.sync.base import WeightSync
from dpo_ray.train.checkpoint import Checkpointer
from dpo_ray.train.logps import compute_sample_logps, frozen_reference, score
from dpo_ray.train.offline import Reporter
from dpo_ray.train.optim import learning_rate
from dpo_ray.train.state import TrainState
from dpo_ray.train.step import dpo_step
from dpo_ray.train.trainer import Trainer, any_rank, build_trainer
from dpo_ray.types import Metrics, RoundData, TokenSample, TrainResult

logger = logging.getLogger(__name__)


class Rounds(Protocol):
    """Where rounds come from. Every rank calls every method with the same arguments and gets the same answer."""

    def take(self, round: int, *, wait_s: float) -> RoundData | None:
        """The pairs of a round, written by a policy at most ``max_lag`` rounds old; None while they are not there."""

    def held_out(self, version: int) -> Sequence[TokenSample]:
        """Completions of the held-out prompts by the engines' current weights; empty with nothing to evaluate."""

    def scored(self, version: int, policy: np.ndarray, reference: np.ndarray | None) -> None:
        """Log-probabilities of the held-out completions, to be kept beside their judge scores."""


STOP_POLL_S = 1.0
"""Between two looks at whether the run should end, while its candidates are written."""
PROBE_TEXT = (
    "Weights that travel between processes can arrive late, cut or mixed up, so after each push the trainer and every "
    "engine read this sentence and compare what they think of it, token by token."
)


def train_online(
    config: Config, *, rounds: Rounds, sync: WeightSync, device: torch.device, reporter: Reporter
) -> TrainResult:
    """Train through ``online.rounds`` rounds, or until asked to stop: then the round being trained is the last."""
    assert config.online is not None
    online = config.online
    reporter.phase("loading")
    t = build_trainer(config, device)
    frozen = frozen_reference(t)
    state, checkpoints = TrainState(t), Checkpointer(config.run.path / "checkpoints", config)
    if checkpoints.resume(state):
        reporter.note(f"resuming after round {state.round} of {online.rounds}")
    reporter.resumed(state.step, state.round)

    def synchronise() -> Metrics:
        reporter.phase("syncing")
        started = time.perf_counter()
        sync.push(named_weights(t.policy, DTYPES[config.model.dtype]), version=state.round)
        difference = sync.verify(*_probe(t), tolerance=online.probe_tolerance)
        return {"sync/probe_difference": difference, "perf/sync_s": time.perf_counter() - started}

    def evaluate() -> None:
        if samples := rounds.held_out(state.round):
            reporter.phase("evaluating")
            reference = compute_sample_logps(t, frozen, samples) if frozen else None
            rounds.scored(state.round, compute_sample_logps(t, t.policy, samples), reference)

    metrics: Metrics = {}
    synchronise()
    if state.round == 0:
        evaluate()

    saved = state.round
    while state.round < online.rounds and not any_rank(reporter.stop_asked()):
        started = time.perf_counter()
        if (data := _await_round(rounds, state.round, reporter)) is None:
            break
        waited = time.perf_counter() - started

        reporter.phase("training")
        started = time.perf_counter()
        kl = _kl(t, frozen, data.samples[: online.kl_samples])
        metrics = _train_on(t, data, frozen, state, reporter)
        timings = {"perf/wait_s": waited, "perf/train_s": time.perf_counter() - started}
        ended, lag = state.round, state.round - data.policy_version

        state.round += 1
        synced = synchronise()
        reporter.step({**metrics, "round": ended, "policy_lag": lag, **data.metrics, **kl, **timings, **synced})
        if config.run.save_every and (state.round == online.rounds or state.round % config.run.save_every == 0):
            checkpoints.save(state, state.round)
            saved = state.round
        if config.run.eval_every and state.round % config.run.eval_every == 0 and state.round < online.rounds:
            evaluate()
    if state.round < online.rounds:
        if saved != state.round:
            checkpoints.save(state, state.round)
        checkpoints.wait()
        return TrainResult(metrics, f"round {state.round} of {online.rounds}")
    evaluate()
    checkpoints.wait()

    if config.run.export:
        reporter.phase("exporting")
        export_policy(t.policy, config.model, t.tokenizer, config.run.path)
    return TrainResult(metrics)


def _await_round(rounds: Rounds, round: int, reporter: Reporter) -> RoundData | None:
    """The pairs of a round, or None when the run is asked to stop before it trains on them: they stay on disk."""
    data = None
    while True:
        if data is None:
            data = rounds.take(round, wait_s=STOP_POLL_S)
        if any_rank(reporter.stop_asked()):
            return None
        if not any_rank(data is None):
            return data


def _train_on(t: Trainer, data: RoundData, frozen: LogpsModel | None, state: TrainState, reporter: Reporter) -> Metrics:
    """Train on a round's pairs. Reports every step but the last, whose metrics it returns for the round's own line."""
    online, pairs = t.config.online, PairList(data.pairs, f"round {data.index}")
    assert online is not None
    if not len(pairs):
        logger.warning("round %d has no pairs: every group was dropped", data.index)
        return {"step": state.step}
    # Steps of equal size: a handful of pairs left over would make a step of its own, as large as the rest and noisier.
    steps = math.ceil(len(pairs) / t.config.optim.pairs_per_step)
    loader = PairLoader(
        pairs,
        t.batch_shape,
        pairs_per_step=math.ceil(len(pairs) / steps),
        seed=t.config.run.seed + data.index,
        shuffle=t.config.data.shuffle,
    )
    reference = _round_reference(t, pairs, frozen)
    steps_per_round = math.ceil(online.prompts_per_round / t.config.optim.pairs_per_step) * online.epochs_per_round
    metrics: Metrics = {}
    turns = loader.steps_per_epoch * online.epochs_per_round
    for turn in range(turns):
        if metrics:
            reporter.step(metrics)
        reporter.phase("training", turn, turns)
        batch = next(loader)
        lr = learning_rate(t.config.optim, data.index * steps_per_round + turn, online.rounds * steps_per_round)
        metrics, nonfinite_pairs = dpo_step(t, batch, reference, lr=lr)
        state.count_step(nonfinite_pairs, pairs)
        metrics = {"step": state.step, "epoch": data.index + batch.epoch / online.epochs_per_round, **metrics}
    return metrics


def _round_reference(t: Trainer, pairs: PairList, frozen: LogpsModel | None) -> Reference:
    """The frozen copy where there is one; else, with ``refresh: round``, the policy as the round begins."""
    if frozen is not None:
        return live_reference(partial(pair_logps, frozen))
    if t.config.reference_kind == "none":
        return no_reference
    return cached_reference(score(t, pairs, range(len(pairs))))


def _kl(t: Trainer, frozen: LogpsModel | None, samples: Sequence[TokenSample]) -> Metrics:
    """Divergence of the policy from the frozen reference, estimated on the policy's own samples, nats a sequence."""
    if frozen is None or not samples:
        return {}
    return {"kl": float((compute_sample_logps(t, t.policy, samples) - compute_sample_logps(t, frozen, samples)).mean())}


def _probe(t: Trainer) -> tuple[list[int], list[float]]:
    """A fixed text's tokens, and their log-probabilities after the first under the policy, nats."""
    tokens = t.tokenizer(PROBE_TEXT)["input_ids"][: t.config.max_model_len - 1]
    row = build_sample_row([TokenSample(tuple(tokens[:1]), tuple(tokens[1:]))]).to(t.device)
    logps = token_logps(t.policy, row).tolist()
    reshard(t.policy)
    return tokens, logps
