"""Runs of small models: recurrent layers, experts and vision towers on two ranks; each family, resumed and exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from dpo_ray.config import Config
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_record_tokenizer
from dpo_ray.model.architecture import auto_class, read_model_config
from dpo_ray.train.export import export_checkpoint, find_checkpoint
from tests.conftest import save_tokenizer
from tests.distributed.conftest import assert_same, over
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline
from tests.families import save_small_model
from tests.unit.model.test_scorer import exact_logp


def with_model(config: dict[str, Any], folder: Path, architecture: str) -> dict[str, Any]:
    """One epoch of three steps of a small model, in several micro-batches per step."""
    save_tokenizer(save_small_model(folder, architecture))
    config["model"]["path"] = str(folder)
    config["run"]["epochs"] = 1
    config["optim"]["tokens_per_micro_batch"] = 400
    return config


@pytest.mark.parametrize("architecture", ["qwen3_next", "bamba"])
def test_two_ranks_report_the_steps_of_one_with_padded_batches(
    config: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    config = with_model(config, tmp_path / "model", architecture)
    (alone,) = run_ranks(1, offline, config)
    config["optim"]["tokens_per_micro_batch"] = 1  # one pair each, and five pairs on two ranks: one has no pair
    assert_same(alone, run_ranks(2, offline, over(2, config))[0], absolute=1e-4)


@pytest.mark.parametrize(
    ("architecture", "use"),
    [
        ("mamba2", "plackett_luce"),
        pytest.param("mamba2", "lipo", marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", "plackett_luce", marks=pytest.mark.slow),
    ],
)
def test_losses_of_ranked_lists_are_those_of_float64_forwards_with_padded_batches(
    config: dict[str, Any], tmp_path: Path, architecture: str, use: str
) -> None:
    lists = [["oak", "a birch tree", "fir", "stone"], ["blue", "grey or pink"], ["one", "two", "a hundred"]]
    records = [
        {"prompt": [{"role": "user", "content": "q" * 9**i}], "completions": ranked, "ranks": [*range(len(ranked))]}
        for i, ranked in enumerate(lists)
    ]
    file = tmp_path / "ranked.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = with_model(config, tmp_path / "model", architecture)
    config |= {"data": {"train": str(file), "eval": str(file)}, "loss": {"use": use, "beta": 0.5}}
    config["run"] |= {"epochs": 3, "eval_every": 100, "export": True}
    config["optim"] |= {"pairs_per_step": 6, "lr": 3e-3}  # all pairs of neighbors, so that no list is split
    (alone,) = run_ranks(1, offline, config)
    parsed = Config.model_validate(config)
    pairs = prepare_pairs(parsed.data.eval, load_record_tokenizer(parsed), folder=tmp_path / "data")
    ratios: list[list[float]] = []
    models = [load_exact(tmp_path / "run" / "policy"), load_exact(tmp_path / "model")]
    for i in range(len(pairs)):
        chosen, rejected = (
            [exact_logp(model, pairs[i].prompt, ids).item() for model in models]
            for ids in (pairs[i].chosen, pairs[i].rejected)
        )
        if i == 0 or pairs.record_of(i) != pairs.record_of(i - 1):
            ratios.append([chosen[0] - chosen[1]])
        ratios[-1].append(rejected[0] - rejected[1])
    assert [len(of_list) for of_list in ratios] == [4, 2, 3]
    expected = np.mean([loss for of_list in ratios for loss in LIST_LOSSES[use](0.5 * np.array(of_list))])
    losses = [line["eval/loss"] for line in alone if "eval/loss" in line]
    assert losses[-1] == pytest.approx(expected, abs=1e-4)
    assert abs(losses[-1] - losses[0]) > 0.1, "the policy has moved"
    two = run_ranks(2, offline, over(2, config | {"run": config["run"] | {"name": "two", "export": False}}))[0]
    steps = [[line for line in lines if "loss" in line] for lines in (alone, two)]
    assert_same(*steps, absolute=1e-4)


def plackett_luce(rewards: np.ndarray) -> list[float]:
    """Terms of the negative log-likelihood of a ranking, best first (arXiv:2305.18290, Eq. 20)."""
    return [float(np.log(np.exp(rewards[i:] - rewards[i]).sum())) for i in range(len(rewards) - 1)]


def lipo(rewards: np.ndarray) -> list[float]:
    """Logistic losses of all pairs of a ranking, weighted by gain and discount (arXiv:2402.01878)."""
    gain = 2 ** np.linspace(1, 0, len(rewards))
    discount = 1 / np.log(2 + (-rewards).argsort().argsort())
    return [
        sum(
            abs(gain[i] - gain[j]) * abs(discount[i] - discount[j]) * np.log1p(np.exp(rewards[j] - rewards[i]))
            for j in range(i + 1, len(rewards))
        )
        for i in range(len(rewards) - 1)
    ]


LIST_LOSSES = {"plackett_luce": plackett_luce, "lipo": lipo}


def test_two_tensor_parallel_ranks_report_the_steps_of_one_with_padded_batches(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config = with_model(config, tmp_path / "model", "vaultgemma")
    (alone,) = run_ranks(1, offline, config)
    for lines in run_ranks(2, offline, over(2, config, tensor_parallel=2)):
        assert_same(alone, lines, absolute=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_two_ranks_that_shard_experts_report_the_steps_of_one(
    config: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    config = with_model(config, tmp_path / "model", architecture) | {"loss": {"router_aux": 0.1}}
    (alone,) = run_ranks(1, offline, config)
    for reshard in (True, False):
        assert_same(alone, run_ranks(2, offline, over(2, config, reshard_after_forward=reshard))[0], absolute=1e-4)
    (without,) = run_ranks(1, offline, config | {"loss": {}})
    assert alone[0]["loss"] - without[0]["loss"] > 0.01, "the auxiliary loss is a part of the loss"


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2_5_vl"])
def test_a_composite_model_trains_its_language_part_and_exports_the_rest_unchanged(
    config: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    config = with_model(config, tmp_path / "model", architecture)
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    (alone,) = run_ranks(1, offline, config)
    config["run"] |= {"export": True, "save_every": 100}
    assert_same(alone, run_ranks(2, offline, over(2, config))[0], absolute=1e-4)

    policy, again = tmp_path / "run" / "policy", tmp_path / "again"
    export_checkpoint(find_checkpoint(tmp_path / "run"), again)
    before, after, exported = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "model", policy, again)
    )
    assert before.keys() == after.keys() == exported.keys()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    is_text = lambda name: not any(part in name for part in ("visual", "vision", "projector"))  # noqa: E731
    assert all(map(is_text, changed))
    assert len(changed) > 0.9 * sum(map(is_text, before))
    assert all(torch.equal(weight, exported[name]) for name, weight in after.items())
    AutoModelForImageTextToText.from_pretrained(policy)
    assert json.loads((policy / "preprocessor_config.json").read_text()) == {}


def test_a_composite_model_trains_in_bfloat16_on_any_number_of_workers(config: dict[str, Any], tmp_path: Path) -> None:
    """The frozen rest is never gathered, also where gradients wait for the last of several micro-batches."""
    config = with_model(config, tmp_path / "model", "gemma3")
    config["model"] |= {"dtype": "bfloat16"}
    config["optim"] |= {"tokens_per_micro_batch": 64}
    (alone,) = run_ranks(1, offline, config)
    (others, _) = run_ranks(2, offline, over(2, config, reshard_after_forward=False))
    assert abs(alone[0]["loss"] - others[0]["loss"]) < 0.02
    assert alone[0]["optim/grad_norm"] == pytest.approx(others[0]["optim/grad_norm"], rel=0.05)


def test_adapters_of_a_composite_model_are_in_its_language_part_only(config: dict[str, Any], tmp_path: Path) -> None:
    config = with_model(config, tmp_path / "model", "gemma3")
    config["model"] |= {"lora": {"rank": 4, "alpha": 8, "merge": True}}
    config["run"]["export"] = True
    run_ranks(2, offline, over(2, config))
    adapters = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert adapters
    assert all("language_model" in name for name in adapters)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    merged = PeftModel.from_pretrained(model, str(tmp_path / "run" / "adapter")).merge_and_unload()
    policy = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    merged.save_pretrained(tmp_path / "merged")
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    assert policy.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(policy[name], weight, rtol=0, atol=1e-6)


FAMILIES = (
    "bamba", "falcon_h1", "gemma2", "gemma3", "gemma4_text", "gpt_oss", "granite", "granitemoehybrid", "jamba", "lfm2",
    "llama4_text", "llava", "mamba2", "mistral", "mistral3", "mixtral", "olmo3", "phi3", "qwen2_5_vl", "qwen3",
    "qwen3_5", "qwen3_moe", "qwen3_next",
)  # fmt: skip
"""Architectures of models that people train today; each of them goes through a whole run."""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_run_is_stopped_resumed_and_exported_for_each_family(
    config: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    config = with_model(config, tmp_path / "model", architecture)
    config["data"]["eval"] = config["data"]["train"]
    config["run"] |= {"steps": 4, "eval_every": 4, "export": True}
    (undisturbed,) = run_ranks(1, offline, config | {"run": config["run"] | {"name": "undisturbed", "export": False}})
    config["run"]["save_every"] = 100
    (stopped,), (resumed,) = run_ranks(1, offline, config, 2), run_ranks(1, offline, config)
    steps = [[line for line in lines if "loss" in line] for lines in (undisturbed, stopped, resumed)]
    assert [len(lines) for lines in steps] == [4, 2, 2]
    assert_same(steps[0], steps[1] + steps[2], absolute=1e-5)

    policy, again = tmp_path / "run" / "policy", tmp_path / "again"
    export_checkpoint(find_checkpoint(tmp_path / "run"), again)
    one, other = (load_file(folder / "model.safetensors") for folder in (policy, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    logps = transformers_logps(Config.model_validate(config), policy)
    assert resumed[-1]["eval/logps/chosen"] == pytest.approx(logps[0], abs=1e-3)
    assert resumed[-1]["eval/logps/rejected"] == pytest.approx(logps[1], abs=1e-3)


def transformers_logps(config: Config, folder: Path) -> tuple[float, float]:
    """Mean log-probabilities of the chosen and rejected completions by transformers' own forward pass, in float32."""
    pairs = prepare_pairs(config.data.eval, load_record_tokenizer(config), folder=folder / "data")
    model = load_exact(folder, torch.float32)
    with torch.no_grad():
        logps = [
            [exact_logp(model, pair.prompt, ids).item() for ids in (pair.chosen, pair.rejected)]
            for pair in (pairs[i] for i in range(len(pairs)))
        ]
    chosen, rejected = np.mean(logps, axis=0).tolist()
    return chosen, rejected


def load_exact(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model with transformers' own layers and eager attention."""
    loader: Any = auto_class(read_model_config(str(folder)))
    return loader.from_pretrained(folder, dtype=dtype, attn_implementation="eager").requires_grad_(False)
