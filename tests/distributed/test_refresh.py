"""A reference that is refreshed from the policy: equal to weights mixed by hand, and part of the state of a run."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from dpo_ray.config import Config
from dpo_ray.sync.base import WeightSync
from dpo_ray.train.online import train_online
from dpo_ray.train.reference import load_frozen_reference
from dpo_ray.train.refresh import RefreshedReference
from dpo_ray.train.shared import SharedParts
from dpo_ray.train.trainer import build_trainer
from dpo_ray.types import Metrics, Probe, TokenPair
from tests.distributed.conftest import COMPARED, assert_same, over
from tests.distributed.parts import LargestAllocation
from tests.distributed.processes import run_ranks
from tests.distributed.runs import ListReporter
from tests.distributed.test_online import PAIRS, DrawnRounds, steps_of, three_rounds

BETA = 0.1
SLOW = pytest.mark.slow
Weights = dict[str, np.ndarray]


class WeightLog:
    """A weight transport that keeps what is published."""

    every_rank = False

    def __init__(self, *, adapters_only: bool) -> None:
        self.adapters_only = adapters_only
        self.versions: dict[int, Weights] = {}

    def publish(self, weights: Iterable[tuple[str, Tensor]], *, version: int, probe: Probe) -> None:
        """Keep the weights of a version; every rank takes part in gathering."""
        self.versions[version] = {name: weight.float().numpy().copy() for name, weight in weights}

    def check(self) -> None:
        """Nothing is in progress."""

    def wait(self) -> None:
        """Nothing is in progress."""


def online(
    rank: int, config: dict[str, Any], stop_after: int | None = None, shared: SharedParts | None = None
) -> tuple[list[Metrics], list[Any], Any]:
    """Train through the rounds; returns the metrics, log-probabilities of evaluations, and weights by version."""
    parsed = Config.model_validate(config)
    assert parsed.online is not None
    rounds, reporter = DrawnRounds(parsed.online.rounds), ListReporter(stop_after if rank == 0 else None)
    sync = WeightLog(adapters_only=parsed.model.lora is not None)
    device = torch.device("cpu")
    train_online(parsed, rounds=rounds, sync=cast(WeightSync, sync), device=device, reporter=reporter, shared=shared)
    return reporter.lines, rounds.scores, sync.versions


def online_in_turn(rank: int, configs: list[dict[str, Any]], fresh: bool) -> list[tuple[list[Metrics], list[Any], Any]]:
    """``online`` for one run after another in the same processes, which share their parts or build them anew."""
    shared = SharedParts()
    return [online(rank, config, shared=None if fresh else shared) for config in configs]


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """Three rounds of four pairs, two steps in each, in float32."""
    return three_rounds(tmp_path, tiny_model)


def refreshing(config: dict[str, Any], *, rounds: int = 3, lora: bool = False, **reference: Any) -> dict[str, Any]:
    """The rounds with a refreshed reference."""
    changed = {
        "reference": config["reference"] | reference,
        "online": config["online"] | {"rounds": rounds},
        "model": config["model"] | ({"lora": {"rank": 4, "alpha": 8}} if lora else {}),
        # Adapters start with B = 0, so that they change little in a few steps.
        "optim": config["optim"] | ({"lr": 1e-2} if lora else {}),
    }
    return config | changed


def mix(policy: Weights, reference: Weights, alpha: float) -> Weights:
    """TR-DPO's soft update in float64; of adapters, of A and B each."""
    return {name: alpha * policy[name].astype(float) + (1 - alpha) * reference[name] for name in policy}


def logps_of(weights: Weights, path: Path, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> np.ndarray:
    """Log-probabilities of (prompt, completion) by transformers in float64, with ``weights`` or adapters merged."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    whole = model.state_dict()
    for name, weight in weights.items():
        stem, _, factor = name.rpartition(".")
        if factor == "lora_A":
            b, scale = weights[f"{stem}.lora_B"], float(weights[f"{stem}.lora_scale"].sum())
            whole[stem] += torch.from_numpy(scale * (b.astype(float) @ weight.astype(float)))
        elif not factor.startswith("lora_"):
            whole[name].copy_(torch.from_numpy(weight))
    logps = []
    for prompt, completion in texts:
        tokens = torch.tensor([prompt + completion])
        with torch.no_grad():
            of_tokens = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])
        logps.append(of_tokens[len(prompt) - 1 :].sum().item())
    return np.array(logps)


def of_chosen(pairs: Sequence[TokenPair]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(pair.prompt, pair.chosen) for pair in pairs]


def of_rejected(pairs: Sequence[TokenPair]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(pair.prompt, pair.rejected) for pair in pairs]


def reference_in_losses(steps: list[Metrics], round: int) -> float:
    """Mean log-probability of a round's chosen completions under the reference that its steps used.

    A reward is beta * (policy - reference).
    """
    of_round = [line for line in steps if int(line["epoch"] - 1e-9) == round]
    return float(np.mean([line["logps/chosen"] - line["rewards/chosen"] / BETA for line in of_round]))


@pytest.mark.parametrize(
    ("lora", "refresh", "alpha"),
    [(False, 2, 1.0), (False, 1, 0.5), pytest.param(False, 2, 0.3, marks=SLOW), (True, 2, 1.0), (True, 1, 0.5)],
    ids=["hard", "soft", "soft, every second round", "adapters, hard", "adapters, soft"],
)
def test_the_reference_of_each_round_is_the_mix_of_published_weights(
    config: dict[str, Any],
    tiny_model: Path,
    lora: bool,
    refresh: int,
    alpha: float,
) -> None:
    run = refreshing(config, lora=lora, refresh=refresh, mixup_alpha=alpha)
    ((lines, scored, versions),) = run_ranks(1, online, run)
    pairs = DrawnRounds().pairs
    reference, last = versions[0], pairs[-PAIRS:]
    for round in range(3):
        if round and round % refresh == 0:
            reference = mix(versions[round], reference, alpha)
        of_round = of_chosen(pairs[round * PAIRS : (round + 1) * PAIRS])
        expected = logps_of(reference, tiny_model, of_round).mean()
        assert reference_in_losses(steps_of(lines), round) == pytest.approx(expected, abs=1e-3), round
        version, policy, computed = scored[round + 1]
        assert version == round + 1
        assert computed == pytest.approx(logps_of(reference, tiny_model, of_rejected(last)), abs=1e-4), (
            "evaluations are compared with the reference that the policy was trained against"
        )
        assert policy == pytest.approx(logps_of(versions[version], tiny_model, of_rejected(last)), abs=1e-4)
    untrained = logps_of(versions[0], tiny_model, of_rejected(last))
    assert np.abs(scored[-1][2] - untrained).max() > 0.1, "the reference of the last round has moved"


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
def test_a_run_on_policy_and_reference_of_another_is_the_run_alone(config: dict[str, Any], lora: bool) -> None:
    """Both have moved by the end of the first run."""

    def runs(*, fresh: bool) -> list[tuple[list[Metrics], list[Any], Any]]:
        configs = []
        for number, lr in enumerate((2e-2, 1e-2)):
            run = refreshing(config, lora=lora, refresh="round", mixup_alpha=0.5)
            name = {"name": f"{'fresh' if fresh else 'shared'}{number}"}
            configs.append(run | {"optim": run["optim"] | {"lr": lr}, "run": run["run"] | name})
        return run_ranks(1, online_in_turn, configs, fresh)[0]

    for (lines, scored, versions), (alone, scored_alone, versions_alone) in zip(
        runs(fresh=False), runs(fresh=True), strict=True
    ):
        assert_same(steps_of(alone), steps_of(lines), absolute=0.0)
        assert [values[1:] for values in map(as_lists, scored)] == [
            values[1:] for values in map(as_lists, scored_alone)
        ]
        for version, weights in versions_alone.items():
            assert all((versions[version][name] == weight).all() for name, weight in weights.items())


def as_lists(scored: tuple[int, np.ndarray, np.ndarray]) -> tuple[int, list[float], list[float]]:
    version, policy, reference = scored
    return version, policy.tolist(), reference.tolist()


@pytest.mark.parametrize(
    ("lora", "shard"),
    [(None, {}), (None, {"tensor_parallel": 2}), (None, {"replicate": 2}), ({}, {}), ({"quantize": "nf4"}, {})],
    ids=["weights", "layers", "replicas", "adapters", "adapters of a quantized model"],
)
def test_two_workers_have_the_refreshed_reference_of_one(
    config: dict[str, Any], lora: dict[str, str] | None, shard: dict[str, int]
) -> None:
    run = refreshing(config, lora=lora is not None, refresh="round", mixup_alpha=0.5)
    if lora:
        run["model"]["lora"] |= lora
    ((alone, scored_alone, _),) = run_ranks(1, online, run)
    assert np.abs(scored_alone[-1][2] - scored_alone[0][2]).max() > 0.1, "the reference has moved"
    for lines, scored, _ in run_ranks(2, online, over(2, run, **shard)):
        assert_same(steps_of(alone), steps_of(lines), absolute=1e-3)
        for (version, policy, reference), other in zip(scored_alone, scored, strict=True):
            assert other[0] == version
            assert other[1] == pytest.approx(policy, abs=1e-3)
            assert other[2] == pytest.approx(reference, abs=1e-3)


@pytest.mark.parametrize(
    ("workers", "lora", "refresh", "alpha"),
    [
        pytest.param((1, 1), False, 2, 1.0, marks=SLOW),
        ((2, 1), False, 1, 0.5),
        pytest.param((1, 2), False, 1, 0.5, marks=SLOW),
        ((1, 1), True, 2, 0.5),
        pytest.param((2, 1), True, 2, 1.0, marks=SLOW),
    ],
    ids=["hard", "soft on two, then one", "soft on one, then two", "adapters", "adapters on two, then one"],
)
def test_an_interrupted_run_continues_with_the_refreshed_reference(
    config: dict[str, Any],
    workers: tuple[int, int],
    lora: bool,
    refresh: int,
    alpha: float,
) -> None:
    run = refreshing(config, rounds=4, lora=lora, refresh=refresh, mixup_alpha=alpha)
    undisturbed, scored, _ = run_ranks(1, online, run)[0]
    saving = run | {"run": run["run"] | {"name": "stopped", "save_every": 1}}
    before = run_ranks(workers[0], online, over(workers[0], saving), 6)[0][0]
    after, scored_after, _ = run_ranks(workers[1], online, over(workers[1], saving))[0]
    assert [line["round"] for line in before if "round" in line] == [0, 1, 2], "stopped after three of four rounds"
    exact = workers == (1, 1)
    first, second = steps_of(undisturbed), steps_of(before) + steps_of(after)
    assert [line["step"] for line in second] == list(range(1, 9))
    for one, other in zip(first, second, strict=True):
        for key in (*COMPARED, "rewards/chosen"):
            assert other[key] == pytest.approx(one[key], abs=0 if exact else 1e-3, rel=0 if exact else 1e-3), key
    by_version = {version: (policy, reference) for version, policy, reference in scored}
    assert {version for version, *_ in scored_after} >= {3, 4}
    for version, policy, reference in scored_after:
        if version >= 3:  # the fake evaluates all versions again, with the policy and the reference of that time
            assert reference == pytest.approx(by_version[version][1], abs=1e-3)
        if version >= 4:
            assert policy == pytest.approx(by_version[version][0], abs=1e-3)


def parts_of(rank: int, config: dict[str, Any]) -> dict[str, Any]:
    """Sizes, communication and dtypes of a refresh."""
    trainer = build_trainer(Config.model_validate(config), torch.device("cpu"), ListReporter())
    frozen = load_frozen_reference(trainer)
    assert isinstance(frozen, RefreshedReference)
    trained = [p for p in trainer.policy.parameters() if p.requires_grad]
    shards: list[Any] = [p for p in trained]
    with CommDebugMode() as communication, LargestAllocation() as largest:
        frozen.refresh()
    return {
        "collectives": communication.get_total_counts(),
        "largest": largest.elements,
        "largest_shard": max(p.to_local().numel() for p in shards),
        "copied": sum(weight.numel() for weight in frozen.weights().values()),
        "trained": sum(p.numel() for p in trained),
        "second_model": frozen.holder is not trainer.policy,
        "dtypes": {weight.dtype for weight in frozen.weights().values()},
    }


@pytest.mark.parametrize(("lora", "second_model"), [(False, True), (True, False)], ids=["full", "adapters"])
def test_a_refresh_copies_the_trained_weights_shard_by_shard(
    config: dict[str, Any],
    lora: bool,
    second_model: bool,
) -> None:
    for parts in run_ranks(2, parts_of, over(2, refreshing(config, lora=lora, refresh=2))):
        assert parts["collectives"] == 0
        assert parts["largest"] <= parts["largest_shard"]
        assert parts["copied"] == parts["trained"]
        assert parts["second_model"] == second_model


def test_the_copy_of_hard_updates_is_in_the_compute_dtype_and_that_of_soft_ones_in_float32(
    config: dict[str, Any],
) -> None:
    config["model"]["dtype"] = "bfloat16"
    for alpha, dtype in ((1.0, torch.bfloat16), (0.5, torch.float32)):
        (parts,) = run_ranks(1, parts_of, refreshing(config, refresh=2, mixup_alpha=alpha))
        assert parts["dtypes"] == {dtype}


def checkpointed(folder: Path, part: str) -> dict[str, Tensor]:
    """Whole tensors of a part of a checkpoint, by their names in the policy."""
    reader = dcp.FileSystemReader(folder)
    written: Any = reader.read_metadata().state_dict_metadata
    names = [name for name in written if name.startswith(f"{part}.")]
    tensors = {n: torch.empty(written[n].size, dtype=written[n].properties.dtype) for n in names}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def test_steps_smaller_than_the_compute_dtype_resolves_add_up(
    config: dict[str, Any],
) -> None:
    config["model"]["dtype"], config["run"]["save_every"] = "bfloat16", 1
    run_ranks(1, online, refreshing(config, rounds=2, refresh="round", mixup_alpha=1e-3))
    checkpoints = Path(config["run"]["dir"]) / "run/checkpoints"
    policy, before = checkpointed(checkpoints / "000001", "model"), checkpointed(checkpoints / "000001", "reference")
    after = checkpointed(checkpoints / "000002", "reference")
    assert after.keys() == before.keys()
    moved = 0.0
    for name, weight in after.items():
        expected = 1e-3 * policy[name].double() + (1 - 1e-3) * before[name].double()
        assert weight.double() == pytest.approx(expected, rel=0, abs=1e-7), name
        moved = max(moved, float((weight - before[name]).abs().max()))
    assert 1e-7 < moved < 1e-5, "a thousandth of two steps of 1e-3; bfloat16 has steps of 1e-4 at 0.02"


def test_an_exported_adapter_has_no_copy(
    config: dict[str, Any],
) -> None:
    config["run"]["export"] = True
    ((_, _, versions),) = run_ranks(1, online, refreshing(config, lora=True, refresh=2))
    exported = load_file(Path(config["run"]["dir"]) / "run/adapter/adapter_model.safetensors")
    published = [name for name in versions[3] if not name.endswith("lora_scale")]
    assert len(exported) == len(published)
    assert not [name for name in exported if "reference" in name]
