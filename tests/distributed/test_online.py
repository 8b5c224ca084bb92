"""The online loop over gloo: equal rounds for any sharding, with a fresh model as the engine."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.config import Config
from dpo_ray.rollout.collector import Progress
from dpo_ray.rollout.evaluation import Evaluation, kl_divergence
from dpo_ray.rollout.ledger import RoundData
from dpo_ray.rollout.updates import check_probe
from dpo_ray.sync.base import WeightSync
from dpo_ray.train.checkpoint_files import finished_checkpoints
from dpo_ray.train.logps import SampleList
from dpo_ray.train.online import train_online
from dpo_ray.types import Completion, CompletionGroup, Metrics, Probe, Prompt, TokenPair, TokenSample
from tests.distributed.conftest import assert_same, over
from tests.distributed.processes import run_ranks
from tests.distributed.runs import ListReporter
from tests.pair_list import PairList

ROUNDS, PAIRS = 3, 4


class DrawnRounds:
    """Rounds of random tokens, the same for every policy; keeps the log-probabilities of evaluations."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        draw = np.random.default_rng(0)
        part = lambda: tuple(draw.integers(0, 256, draw.integers(2, 30)).tolist())  # noqa: E731
        self.pairs = [TokenPair(part(), part(), part()) for _ in range(rounds * PAIRS)]
        self.gaps = draw.uniform(0, 3, rounds * PAIRS).tolist()
        self.scores: list[Any] = []
        self.implicit: list[np.ndarray] = []
        self.references: dict[int, np.ndarray] = {}
        self.judged = True

    def poll(self, version: int, *, round: int | None, evaluations: Sequence[int], wait_s: float) -> Progress:
        """Every round is there, and so are the evaluations: samples are the rejected completions of the last round."""
        groups = tuple(
            CompletionGroup(Prompt(i, (), pair.prompt), (Completion("", pair.rejected, finished=True),), 0)
            for i, pair in enumerate(self.pairs[-PAIRS:])
        )
        return Progress(True, tuple(Evaluation(version, samples=groups) for version in evaluations))

    def read(self, round: int) -> RoundData:
        """Four pairs."""
        of_round = slice(round * PAIRS, (round + 1) * PAIRS)
        pairs = PairList(self.pairs[of_round], f"round {round}", self.gaps[of_round])
        return RoundData(round, pairs, round, {}, self.judged, self.references.get(round))

    def samples(self, round: int) -> SampleList:
        """The completions of all pairs of a round."""
        pairs = self.pairs[round * PAIRS : (round + 1) * PAIRS]
        return SampleList(TokenSample(pair.prompt, ids) for pair in pairs for ids in (pair.chosen, pair.rejected))

    def judge(self, round: int, scores: Sequence[float]) -> RoundData:
        """The pairs of a round with the better completion as chosen."""
        self.implicit.append(np.array(scores).reshape(-1, 2))
        pairs = self.pairs[round * PAIRS : (round + 1) * PAIRS]
        swapped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
        better = [
            a if first > second else b for a, b, (first, second) in zip(pairs, swapped, self.implicit[-1], strict=True)
        ]
        return RoundData(round, PairList(better), round, {})

    def write_reference(self, round: int, logps: np.ndarray) -> None:
        """Kept for later rounds."""
        self.references[round] = logps

    def recorded(self, version: int) -> bool:
        """Never."""
        return False

    def metrics_of(self, version: int) -> Metrics:
        """None is recorded."""
        raise NotImplementedError

    def record(self, evaluation: Evaluation, policy: np.ndarray | None, reference: np.ndarray | None) -> Metrics:
        """Keep the policy's and the reference's log-probabilities."""
        assert policy is not None
        assert reference is not None
        self.scores.append((evaluation.version, policy, reference))
        return kl_divergence(policy.tolist(), reference.tolist())


class RecordedRounds(DrawnRounds):
    """Rounds whose evaluations are all on disk."""

    def recorded(self, version: int) -> bool:
        """Always."""
        return True

    def metrics_of(self, version: int) -> Metrics:
        """A tenth of the version."""
        return {"kl": version / 10}


class FreshModel:
    """A weight transport to a transformers model that rank 0 builds for each version in place of an engine."""

    every_rank = adapters_only = False

    def __init__(self, path: str) -> None:
        self.path = path

    def publish(self, weights: Iterable[tuple[str, Tensor]], *, version: int, probe: Probe) -> None:
        """Load all tensors into a model with other weights, and compare log-probabilities."""
        from transformers import AutoConfig, AutoModelForCausalLM

        whole = {name: of.clone() for name, of in weights}  # every rank takes part in gathering
        if dist.get_rank() > 0:
            return
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.path))
        lacking, unknown = model.load_state_dict(whole, strict=False)
        assert (lacking, unknown) == (["lm_head.weight"], []), "the head is the embedding"
        tokens = torch.tensor([probe.token_ids])
        with torch.no_grad():
            logps = model(tokens).logits[0, :-1].log_softmax(-1)
        engine = logps.gather(-1, tokens[0, 1:, None]).squeeze(-1).tolist()
        check_probe(probe, engine)

    def check(self) -> None:
        """Nothing is in progress."""

    def wait(self) -> None:
        """Nothing is in progress."""


class FailingPush(FreshModel):
    """A transport that fails after the first round."""

    def publish(self, weights: Iterable[tuple[str, Tensor]], *, version: int, probe: Probe) -> None:
        """Fail at once on every rank."""
        if version:
            raise RuntimeError("no engine took the update")


def checkpoints_after_a_failed_push(rank: int, config: dict[str, Any]) -> list[str]:
    """Train until the push fails; returns the finished checkpoints at this moment."""
    parsed = Config.model_validate(config)
    sync = cast(WeightSync, FailingPush(parsed.model.path))
    with pytest.raises(RuntimeError, match="no engine took the update"):
        train_online(parsed, rounds=DrawnRounds(), sync=sync, device=torch.device("cpu"), reporter=ListReporter())
    return [path.name for path in finished_checkpoints(parsed.run.path / "checkpoints")]


def online(
    rank: int, config: dict[str, Any], source: type[DrawnRounds] = DrawnRounds, stop_after: int | None = None
) -> tuple[list[Metrics], list[Any]]:
    """Train through the rounds with an engine on every rank; returns the metrics and the computed log-probabilities."""
    parsed = Config.model_validate(config)
    rounds, reporter, sync = source(), ListReporter(stop_after), cast(WeightSync, FreshModel(parsed.model.path))
    train_online(parsed, rounds=rounds, sync=sync, device=torch.device("cpu"), reporter=reporter)
    return reporter.lines, rounds.scores


class PhaseReporter(ListReporter):
    """Records how many pairs the reference has scored, whenever a pass over them is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.scored: list[int] = []

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Record a complete pass."""
        if name == "scoring" and done == total:
            self.scored.append(done)


def online_counting_scored_pairs(rank: int, config: dict[str, Any]) -> tuple[list[Metrics], list[int]]:
    """Train through the rounds; returns the metrics and the pairs of each pass of the reference."""
    parsed, reporter = Config.model_validate(config), PhaseReporter()
    sync = cast(WeightSync, FreshModel(parsed.model.path))
    train_online(parsed, rounds=DrawnRounds(), sync=sync, device=torch.device("cpu"), reporter=reporter)
    return reporter.lines, reporter.scored


def three_rounds(folder: Path, model: Path) -> dict[str, Any]:
    """Three rounds of four pairs, two steps in each, in float32."""
    return {
        "run": {"dir": str(folder), "name": "run", "save_every": None, "export": False, "eval_every": 1},
        "model": {"path": str(model), "dtype": "float32"},
        "reference": {"cache_dir": str(folder / "cache")},
        "optim": {"lr": 1e-3, "pairs_per_step": 2, "tokens_per_micro_batch": 128, "schedule": "constant"},
        "cluster": {"train_workers": 1},
        "online": {"prompts": str(folder), "rounds": ROUNDS, "prompts_per_round": PAIRS, "probe_tolerance": 1e-4},
    }


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """The three rounds in the test's own folder."""
    return three_rounds(tmp_path, tiny_model)


def steps_of(lines: list[Metrics]) -> list[Metrics]:
    """The lines of optimizer steps."""
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "shard",
    [{}, {"context_parallel": 2}, {"tensor_parallel": 2}],
    ids=["weights", "rows", "layers"],
)
def test_two_ranks_that_share_weights_rows_or_layers_report_the_rounds_of_one(
    config: dict[str, Any], shard: dict[str, int]
) -> None:
    ((alone, scored_alone),) = run_ranks(1, online, config)
    assert [line["round"] for line in alone if "round" in line] == [0, 1, 2]
    assert abs(alone[-1]["kl"]) > 0.1, "the policy has moved away from the reference"
    for lines, scored in run_ranks(2, online, over(2, config, **shard)):
        assert_same(steps_of(alone), steps_of(lines), absolute=1e-3)
        for one, other in zip(alone, lines, strict=True):
            assert one.get("kl") == pytest.approx(other.get("kl"), abs=1e-3)
        for (version, policy, reference), found in zip(scored_alone, scored, strict=True):
            assert found[0] == version
            assert np.abs(found[1] - policy).max() < 1e-3, "nats a completion"
            assert np.abs(found[2] - reference).max() < 1e-3


def test_two_ranks_weigh_pairs_by_the_mean_gap_of_the_whole_step(config: dict[str, Any]) -> None:
    weighted = config | {"loss": {"weighting": "gap"}}
    # One pair per micro-batch: ranks and micro-batches have means of their own, and only that of the step counts.
    weighted["optim"] = {**config["optim"], "pairs_per_step": 4, "tokens_per_micro_batch": 16}
    unweighted = weighted | {"loss": {}}
    ((alone, _),), ((plain, _),) = run_ranks(1, online, weighted), run_ranks(1, online, unweighted)
    first, first_plain = steps_of(alone)[0], steps_of(plain)[0]
    assert first["loss"] == pytest.approx(first_plain["loss"]), "ln 2 for each pair, and weights of mean 1"
    assert first["optim/grad_norm"] != pytest.approx(first_plain["optim/grad_norm"], rel=0.02)
    for lines, _ in run_ranks(2, online, over(2, weighted)):
        assert_same(steps_of(alone), steps_of(lines), absolute=1e-3)
        norms, alone_norms = ([step["optim/grad_norm"] for step in steps_of(run)] for run in (lines, alone))
        assert norms == pytest.approx(alone_norms, rel=1e-3)


def test_two_epochs_of_a_round_take_one_pass_of_the_reference(config: dict[str, Any]) -> None:
    config["run"]["eval_every"] = None
    ((once, scored_once),) = run_ranks(1, online_counting_scored_pairs, config)
    config["online"]["epochs_per_round"] = 2
    ((twice, scored),) = run_ranks(1, online_counting_scored_pairs, config)
    assert scored == scored_once == [PAIRS] * ROUNDS
    assert (len(steps_of(once)), len(steps_of(twice))) == (2 * ROUNDS, 4 * ROUNDS)
    assert_same(steps_of(once)[:2], steps_of(twice)[:2], absolute=1e-5)
    first, second = (sum(step["rewards/margins"] for step in steps_of(twice)[i : i + 2]) for i in (0, 2))
    assert second > first, "the second epoch has the pairs of the first"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_push_that_fails_costs_no_trained_round(config: dict[str, Any], ranks: int) -> None:
    config["run"] |= {"save_every": 1, "eval_every": None}
    for finished in run_ranks(ranks, checkpoints_after_a_failed_push, over(ranks, config)):
        assert finished == ["000001"]


def test_the_checkpoint_with_the_best_evaluation_is_kept_beside_the_newest(config: dict[str, Any]) -> None:
    """The KL grows with each round, so the first of three is the one with the least."""
    config["run"] |= {"save_every": 1, "keep_checkpoints": 1, "best_metric": "kl", "best_mode": "min"}
    run_ranks(2, online, over(2, config))
    kept = sorted((Path(config["run"]["dir"]) / "run/checkpoints").glob("[0-9]*"))
    assert [path.name for path in kept] == ["000001", "000003"]
    first, last = (json.loads((path / "complete.json").read_text())["metrics"]["kl"] for path in kept)
    assert abs(first) < abs(last)


def test_a_checkpoint_is_ranked_after_a_stop_before_the_next_one_can_supersede_it(config: dict[str, Any]) -> None:
    """The run stops before the evaluation of its first checkpoint is there, which turns out to be the best."""
    config["run"] |= {"save_every": 1, "keep_checkpoints": 1, "best_metric": "kl", "best_mode": "min"}
    run_ranks(1, online, config, DrawnRounds, 2)
    folder = Path(config["run"]["dir"]) / "run/checkpoints"
    (marker,) = folder.glob("[0-9]*/complete.json")
    assert "kl" not in json.loads(marker.read_text())["metrics"]
    (lines, _) = run_ranks(1, online, config, RecordedRounds)[0]
    kept = {path.parent.name: json.loads(path.read_text())["metrics"] for path in folder.glob("[0-9]*/complete.json")}
    assert set(kept) == {"000001", "000003"}
    assert kept["000001"]["kl"] == 0.1
    assert lines[-1]["round"] == 2
    assert [line["kl"] for line in lines if "kl" in line] == [0.1], "on the line of the round after it"
