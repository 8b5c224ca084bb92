"""Rounds with pairs of other sources, and rounds that the trainer judges, on one and on two ranks."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_ray.config import Config
from dpo_ray.sync.base import WeightSync
from dpo_ray.train.logps import SampleList, compute_sample_logps
from dpo_ray.train.online import train_online
from dpo_ray.train.trainer import build_trainer
from dpo_ray.types import Metrics, TokenPair, TokenSample
from tests.distributed.conftest import assert_same, over
from tests.distributed.processes import run_ranks
from tests.distributed.runs import ListReporter
from tests.distributed.test_online import PAIRS, DrawnRounds, FreshModel, config, steps_of
from tests.pair_list import PairList

__all__ = ["config"]  # a fixture


def trained(
    rank: int, config: dict[str, Any], judged: bool = True
) -> tuple[list[Metrics], dict[int, np.ndarray], list[np.ndarray]]:
    """Train with six fixed pairs; returns the metrics, the stored reference values and the implicit scores."""
    parsed, rounds, reporter = Config.model_validate(config), DrawnRounds(), ListReporter()
    rounds.judged = judged
    draw = np.random.default_rng(1)
    part = lambda: tuple(draw.integers(0, 256, draw.integers(2, 30)).tolist())  # noqa: E731
    fixed = PairList([TokenPair(part(), part(), part()) for _ in range(6)], "fixed")
    sync = cast(WeightSync, FreshModel(parsed.model.path))
    device = torch.device("cpu")
    train_online(parsed, rounds=rounds, fixed=fixed, sync=sync, device=device, reporter=reporter)
    return reporter.lines, rounds.references, rounds.implicit


class Recording:
    """Remembers the completions that were read, also by iteration."""

    def __init__(self, samples: SampleList) -> None:
        self.samples, self.lengths = samples, samples.lengths
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> TokenSample:
        sample = self.samples[index]
        self.read.append(index)
        return sample


def read_by_rank(rank: int, config: dict[str, Any]) -> list[int]:
    """Indices of the completions that this rank reads to score a round."""
    trainer = build_trainer(Config.model_validate(config), torch.device("cpu"), ListReporter())
    samples = Recording(DrawnRounds().samples(0))
    compute_sample_logps(trainer, trainer.policy, samples)
    return samples.read


def logps(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    """Log-probability of a completion by transformers, in float64."""
    tokens = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        of_tokens = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    return of_tokens[len(prompt) - 1 :].sum().item()


def test_mixed_and_replayed_pairs_train_alike_on_any_number_of_ranks_with_the_reference_values_of_their_rounds(
    config: dict[str, Any], tiny_model: Path
) -> None:
    """4 new pairs, 2 fixed ones and, from the second round on, 2 of earlier rounds, in steps of two pairs."""
    config["data"] = {"train": [str(tiny_model)]}
    config["online"]["source"] = {"mix": 0.25, "replay": 0.25}
    ((alone, references, _),) = run_ranks(1, trained, config)
    assert len(steps_of(alone)) == 3 + 4 + 4
    for lines, found, _ in run_ranks(2, trained, over(2, config)):
        assert_same(steps_of(alone), steps_of(lines), absolute=1e-3)
        assert all(np.abs(found[round] - values).max() < 1e-3 for round, values in references.items())

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    for round, values in references.items():
        pairs = DrawnRounds().pairs[round * PAIRS : (round + 1) * PAIRS]
        expected = [[logps(model, pair.prompt, ids) for ids in (pair.chosen, pair.rejected)] for pair in pairs]
        assert np.abs(values - np.array(expected)).max() < 1e-3, "nats, of the untrained model"


def test_each_rank_reads_the_completions_that_it_scores_and_no_others(config: dict[str, Any]) -> None:
    first, second = run_ranks(2, read_by_rank, over(2, config))
    assert sorted([*first, *second]) == list(range(2 * PAIRS))


def test_the_implicit_judge_scores_by_how_far_the_policy_has_moved_from_the_reference(config: dict[str, Any]) -> None:
    """All zero before training, also with a penalty of length, which is subtracted afterwards."""
    config["data"] = {"train": [config["model"]["path"]]}
    config["online"] |= {"judge": {"use": "implicit"}, "source": {"mix": 0.5}}
    ((alone, _, scores),) = run_ranks(1, trained, config, False)
    assert len(scores) == 3
    assert [line["perf/judge_s"] > 0 for line in alone if "round" in line] == [True] * 3
    assert np.abs(scores[0]).max() == 0.0
    assert np.abs(scores[1]).max() > 1e-3
    for lines, _, found in run_ranks(2, trained, over(2, config), False):
        assert_same(steps_of(alone)[:4], steps_of(lines)[:4], absolute=1e-3)
        assert np.abs(found[1] - scores[1]).max() < 1e-4

    config["online"]["judge"]["args"] = {"length_penalty": 0.05}
    ((_, _, penalized),) = run_ranks(1, trained, config, False)
    lengths = [[len(pair.chosen), len(pair.rejected)] for pair in DrawnRounds().pairs[PAIRS : 2 * PAIRS]]
    assert np.abs(penalized[0]).max() == 0.0
    assert penalized[1] == pytest.approx(scores[1] - 0.05 * np.array(lengths), abs=1e-4)
