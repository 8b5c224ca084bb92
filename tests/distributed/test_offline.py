"""Offline training over gloo: equal numbers for any ranks, micro-batches and layout; resuming; exporting."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_ray.objective.precision import PATHS
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.train.checkpoint_files import damaged_files
from dpo_ray.train.export import export_checkpoint, find_checkpoint
from dpo_ray.types import Metrics
from tests.conftest import WritePairs, ragged_texts, save_tiny_model
from tests.distributed.conftest import COMPARED, assert_same, over
from tests.distributed.processes import run_ranks
from tests.distributed.runs import (
    gathered_ahead,
    offline,
    offline_counting_graphs,
    offline_emulating_float8,
    offline_uncompiled,
)

Steps = list[Metrics]


def test_one_and_two_workers_report_the_same_steps(steps_of_one: Steps, steps_of_two: list[Steps]) -> None:
    first, second = steps_of_two
    assert len(steps_of_one) == 6
    assert_same(steps_of_one, first, absolute=1e-4)
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


def test_a_head_of_its_own_beside_a_tied_configuration_trains_alike_and_is_exported(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", tied=False)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    config["model"]["path"] = str(model)
    (alone,) = run_ranks(1, offline, config | {"run": config["run"] | {"name": "alone", "export": True}})
    first, _ = run_ranks(2, offline, config | {"cluster": {"train_workers": 2}})
    assert_same(alone, first, absolute=1e-4)
    folder = tmp_path / "alone" / "policy"
    weights = load_file(folder / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert not torch.equal(weights["lm_head.weight"].float(), load_file(model / "model.safetensors")["lm_head.weight"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_first_loss_is_ln_2(steps_of_one: Steps) -> None:
    assert steps_of_one[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps_of_one[-1]["loss"] < 0.6, "six steps reduce the loss"


def test_neither_micro_batches_nor_the_layout_change_the_steps(config: dict[str, Any], steps_of_one: Steps) -> None:
    (one_at_a_time,) = run_ranks(1, offline, config | {"optim": config["optim"] | {"tokens_per_micro_batch": 1}})
    (plain,) = run_ranks(1, offline, config | {"optim": config["optim"] | {"layout": "plain"}})
    assert_same(steps_of_one, one_at_a_time, absolute=1e-4)
    assert_same(steps_of_one, plain, absolute=1e-4)


def test_gradients_of_micro_batches_add_up_over_shards_and_replicas(
    config: dict[str, Any], steps_of_one: Steps
) -> None:
    config["run"]["epochs"] = 1
    config["optim"]["tokens_per_micro_batch"] = 1  # one pair each, and five pairs on four ranks
    for reshard in (True, False):  # reduced per micro-batch, and once per step
        for lines in run_ranks(4, offline, over(4, config, replicate=2, reshard_after_forward=reshard)):
            assert_same(steps_of_one[:3], lines, absolute=1e-4)


def test_a_weighted_sum_of_losses_is_the_same_on_two_workers_in_plain_rows(config: dict[str, Any]) -> None:
    config |= {"loss": {"use": ["sigmoid_norm", "ipo", "nll"], "weights": [1.0, 0.5, 0.2], "weighting": "wpo"}}
    (shared,) = run_ranks(1, offline, config)
    optim = config["optim"] | {"layout": "plain", "tokens_per_micro_batch": 100}
    plain, _ = run_ranks(2, offline, config | {"optim": optim, "cluster": {"train_workers": 2}})
    assert_same(shared, plain, absolute=1e-4)


def test_pairs_with_a_gap_of_zero_leave_the_steps_of_the_others(config: dict[str, Any], tmp_path: Path) -> None:
    """Weights of 2 and 0 in a step of four pairs: the loss and the gradient of a step of the two with a gap."""
    texts = ragged_texts(8)
    records = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "score_chosen": 7, "score_rejected": 7 - 3 * (i % 2)}
        for i, (prompt, chosen, rejected) in enumerate(texts)
    ]
    runs = []
    for name, pairs, kept in (("all", 4, records), ("graded", 2, records[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
        run = config | {"data": {"train": str(tmp_path / f"{name}.jsonl"), "shuffle": False}}
        run |= {"loss": {"weighting": "gap"}, "optim": config["optim"] | {"pairs_per_step": pairs}}
        run["run"] = config["run"] | {"name": name}
        runs.append(run)
    ((every,), (graded,)) = (run_ranks(1, offline, run) for run in runs)
    assert len(every) == len(graded) == 4, "two epochs of two steps"
    for name in ("loss", "optim/grad_norm"):
        assert [line[name] for line in every] == pytest.approx([line[name] for line in graded], rel=1e-4)


def test_losses_over_the_whole_step_are_the_same_on_two_workers_and_resumed(config: dict[str, Any]) -> None:
    config |= {"loss": {"use": ["aot", "aot_unpaired", "bco_pair"]}, "run": config["run"] | {"epochs": 1}}
    config["data"] |= {"eval": config["data"]["train"]}
    (alone,) = run_ranks(1, offline, config)
    two = config | {"cluster": {"train_workers": 2}, "run": config["run"] | {"name": "two", "save_every": 100}}
    two["optim"] = config["optim"] | {"tokens_per_micro_batch": 1}
    (stopped, _), (resumed, _) = run_ranks(2, offline, two, 2), run_ranks(2, offline, two)
    steps = [line for line in stopped + resumed if "eval/loss" not in line]
    assert_same([line for line in alone if "eval/loss" not in line], steps, absolute=1e-4)
    first, last = (lines[-1]["eval/loss"] for lines in (alone, resumed))
    assert first == pytest.approx(last, abs=1e-4)


@pytest.mark.parametrize("use", ["simpo", "orpo"])
def test_a_reference_free_loss_learns_without_computing_a_reference(
    config: dict[str, Any], use: str, tmp_path: Path
) -> None:
    (lines,) = run_ranks(1, offline, config | {"loss": {"use": use, "beta": 2.0}})
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    assert not (tmp_path / "cache" / "reference").exists()


def test_a_live_reference_gives_the_steps_of_a_cached_one(config: dict[str, Any], steps_of_one: Steps) -> None:
    (live,) = run_ranks(1, offline, config | {"reference": config["reference"] | {"kind": "live"}})
    assert_same(steps_of_one, live, absolute=1e-5)


LEAN = (
    {"activation_checkpointing": "full", "reshard_after_forward": False},
    {"activation_checkpointing": "selective", "activation_offload": True, "prefetch": 2},
)


def test_recomputing_resharding_and_prefetching_change_nothing(
    config: dict[str, Any], steps_of_two: list[Steps]
) -> None:
    for shard in LEAN:
        lean, _ = run_ranks(2, offline, over(2, config, **shard))
        assert_same(steps_of_two[0], lean, absolute=1e-5)


def test_layers_are_prefetched_in_both_passes_as_configured(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["path"] = str(save_tiny_model(tmp_path / "deep", num_hidden_layers=4))
    of_two, _ = run_ranks(2, gathered_ahead, config["model"], {"prefetch": 2})
    # The root prefetches two layers, then each layer the next two.
    assert of_two["forward"] == [f"model.model.layers.{i}" for i in (0, 1, 1, 2, 2, 3, 3)]
    assert of_two["backward"] == [f"model.model.layers.{i}" for i in (3, 2, 2, 1, 1, 0, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_compiled_layers_give_the_steps_of_uncompiled_ones(
    config: dict[str, Any], steps_of_one: Steps, recomputed: str
) -> None:
    shard = {"compile": True, "activation_checkpointing": recomputed}
    ((compiled, graphs),) = run_ranks(1, offline_counting_graphs, config | {"shard": shard})
    assert_same(steps_of_one, compiled, absolute=1e-4)
    assert 0 < graphs <= 12, "layers share graphs, and rows of other lengths add few"


def test_eight_bit_averages_learn_and_resume_exactly(config: dict[str, Any], steps_of_two: list[Steps]) -> None:
    pytest.importorskip("torchao")
    full, _ = steps_of_two
    low = over(2, config) | {"optim": config["optim"] | {"use": "adamw_8bit"}}
    undisturbed, _ = run_ranks(2, offline_uncompiled, low)
    assert undisturbed[0]["loss"] == full[0]["loss"]
    assert undisturbed[-1]["loss"] == pytest.approx(full[-1]["loss"], abs=0.05)
    assert undisturbed[-1]["loss"] != full[-1]["loss"]
    saving = config["run"] | {"name": "stopped", "save_every": 2}
    run_ranks(2, offline_uncompiled, low | {"run": saving | {"steps": 4}})
    resumed, _ = run_ranks(2, offline_uncompiled, low | {"run": saving})
    assert [line["step"] for line in resumed] == [5, 6]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in undisturbed[4:]]
    with pytest.raises(Exception, match="was saved by 2 workers and"):
        run_ranks(1, offline_uncompiled, low | {"run": saving, "cluster": {"train_workers": 1}})


def test_a_custom_optimizer_is_resumed(config: dict[str, Any]) -> None:
    two = config | {"cluster": {"train_workers": 2}}
    two["optim"] |= {"use": "torch.optim:Adagrad", "args": {"initial_accumulator_value": 0.1}}
    undisturbed, _ = run_ranks(2, offline, two)
    assert undisturbed[-1]["loss"] < 0.69
    saving = config["run"] | {"name": "stopped", "save_every": 2}
    run_ranks(2, offline, two | {"run": saving | {"steps": 4}})
    resumed, _ = run_ranks(2, offline, two | {"run": saving})
    assert_same(undisturbed[4:], resumed, absolute=1e-6)


def test_products_in_eight_bits_learn_alike_on_one_and_two_workers(config: dict[str, Any]) -> None:
    pytest.importorskip("torchao")
    config["model"] |= {"dtype": "bfloat16"}
    (full,) = run_ranks(1, offline, config)
    config["model"] |= {"fp8": True}
    with pytest.raises(Exception, match=r"model\.fp8: a cpu has no float8 matrix products"):
        run_ranks(1, offline, config)
    (alone,) = run_ranks(1, offline_emulating_float8, config)
    first, _ = run_ranks(2, offline_emulating_float8, config | {"cluster": {"train_workers": 2}})
    assert alone[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "the reference uses the same float8 products"
    assert alone[0]["logps/chosen"] != full[0]["logps/chosen"]
    assert alone[-1]["loss"] == pytest.approx(full[-1]["loss"], abs=0.1)
    assert_same(alone[:1], first[:1], absolute=0.5)


@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_every_path_of_bfloat16_products_trains_like_float32(
    path: str, config: dict[str, Any], steps_of_one: Steps
) -> None:
    config["model"] |= {"dtype": "bfloat16", "cpu_products": path}
    for lines in run_ranks(2, offline, over(2, config)):
        assert len(lines) == len(steps_of_one)
        # Each of the two layers adds a rounding of at most 2^-9 to hidden states; losses are near 0.7, norms near 1.
        for line, exact in zip(lines[:2], steps_of_one, strict=False):
            assert line["loss"] == pytest.approx(exact["loss"], abs=1e-2)
            assert line["optim/grad_norm"] == pytest.approx(exact["optim/grad_norm"], rel=2e-2)


@pytest.mark.parametrize("then", [1, 2])
def test_a_resumed_run_reports_the_steps_of_an_undisturbed_one(
    config: dict[str, Any], steps_of_two: list[Steps], then: int
) -> None:
    saving = config["run"] | {"name": "stopped", "save_every": 2}
    run_ranks(2, offline, over(2, config) | {"run": saving | {"steps": 4}})
    resumed, *_ = run_ranks(then, offline, config | {"run": saving, "cluster": {"train_workers": then}})
    assert [line["step"] for line in resumed] == [5, 6]
    assert_same(steps_of_two[0][4:], resumed, absolute=1e-4)


def test_a_run_resumed_with_larger_steps_finishes_its_epoch_and_its_schedule(
    config: dict[str, Any], write_pairs: WritePairs
) -> None:
    config["run"] |= {"epochs": 1, "save_every": 100}
    config["data"] = {"train": str(write_pairs(ragged_texts(64)))}
    config["optim"] |= {"schedule": "linear", "warmup_steps": 2, "pairs_per_step": 8}
    (stopped,) = run_ranks(1, offline, config, 4)
    (resumed,) = run_ranks(1, offline, config | {"optim": config["optim"] | {"pairs_per_step": 16}})
    assert [line["step"] for line in stopped + resumed] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in stopped + resumed] == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 6 / 8, 1.0]
    # Decay from the peak at 16 pairs to 0 at 64, whatever the steps.
    assert [line["optim/lr"] for line in stopped[2:] + resumed] == pytest.approx(
        [1e-3 * (64 - pairs) / 48 for pairs in (16, 24, 32, 48)]
    )


def test_a_damaged_checkpoint_is_skipped_and_the_previous_one_loaded(config: dict[str, Any]) -> None:
    saving = config | {"run": config["run"] | {"save_every": 2}}
    run_ranks(1, offline, saving | {"run": saving["run"] | {"steps": 4}})
    shard = next((Path(config["run"]["dir"]) / "run/checkpoints/000004").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (resumed,) = run_ranks(1, offline, saving)
    assert [line["step"] for line in resumed] == [3, 4, 5, 6]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_restart_silently(config: dict[str, Any]) -> None:
    saving = config | {"run": config["run"] | {"save_every": 2, "steps": 2}}
    run_ranks(1, offline, saving)
    next((Path(config["run"]["dir"]) / "run/checkpoints/000002").glob("*.distcp")).unlink()
    with pytest.raises(Exception, match="none of the 1 finished checkpoints is intact"):
        run_ranks(1, offline, saving)


def test_a_run_whose_only_marker_is_truncated_does_not_restart_silently(config: dict[str, Any]) -> None:
    saving = config | {"run": config["run"] | {"save_every": 2, "steps": 2}}
    run_ranks(1, offline, saving)
    (Path(config["run"]["dir"]) / "run/checkpoints/000002/complete.json").write_text("")
    with pytest.raises(Exception, match="none of the 1 finished checkpoints is intact"):
        run_ranks(1, offline, saving)


def test_a_run_asked_to_stop_saves_a_checkpoint_and_resumes_from_it(
    config: dict[str, Any], steps_of_two: list[Steps]
) -> None:
    stopping = over(2, config) | {"run": config["run"] | {"name": "stopped", "save_every": 100}}
    stopped, _ = run_ranks(2, offline, stopping, 2)
    resumed, _ = run_ranks(2, offline, stopping)
    assert [line["step"] for line in stopped + resumed] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(steps_of_two[0], stopped + resumed, strict=True):
        assert {key: one[key] for key in COMPARED} == {key: other[key] for key in COMPARED}, "to the last digit"


def test_the_best_and_the_newest_checkpoint_are_kept(config: dict[str, Any]) -> None:
    run = {"save_every": 1, "eval_every": 1, "keep_checkpoints": 1, "best_metric": "eval/rewards/rejected"}
    config |= {"run": config["run"] | run, "data": config["data"] | {"eval": config["data"]["train"]}}
    (lines,) = run_ranks(1, offline, config)
    name = run["best_metric"]
    rejected = {line["step"]: line[name] for line in lines if name in line and line["step"]}
    best = max(rejected, key=lambda step: rejected[step])
    kept = sorted(int(path.name) for path in (Path(config["run"]["dir"]) / "run/checkpoints").iterdir())
    assert kept == sorted({best, 6})


def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(config: dict[str, Any]) -> None:
    config |= {"data": config["data"] | {"shuffle": False}, "loss": {"use": "tests.distributed.runs:nan_for_one_pair"}}
    first, second = run_ranks(2, offline, config | {"cluster": {"train_workers": 2}})
    assert [line["optim/skipped"] for line in first] == [0, 1, 0, 0, 1, 0], (
        "pair 7 of 13 is in the second step of each epoch"
    )
    assert [line["optim/skipped"] for line in second] == [0, 1, 0, 0, 1, 0]
    assert first[1]["loss"] != first[1]["loss"]
    assert all(line["loss"] < 0.75 for line in first if not line["optim/skipped"])


def test_a_run_that_keeps_skipping_ends_and_names_the_pairs(config: dict[str, Any]) -> None:
    config |= {"data": config["data"] | {"shuffle": False}, "loss": {"use": "tests.distributed.runs:nan_for_one_pair"}}
    optim = config["optim"] | {"pairs_per_step": 13, "max_skipped_steps": 1}
    with pytest.raises(Exception, match=r"step 2: .*not finite.* Its pairs: .*pairs\.jsonl:8\. 2 steps in a row"):
        run_ranks(2, offline, config | {"optim": optim, "cluster": {"train_workers": 2}})


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_intact(config: dict[str, Any], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    # A checkpoint of the tiny model takes 4.5 MiB: one fits and the second does not.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        saving = config | {"run": config["run"] | {"dir": str(small), "save_every": 2}}
        with pytest.raises(
            Exception, match=r"000004 could not be written.*MiB are free.*last good checkpoint is .*000002"
        ):
            run_ranks(1, offline, saving)
        (left,) = (small / "run/checkpoints").iterdir()
        assert left.name == "000002"
        assert not damaged_files(left)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_resuming_with_another_train_set_is_rejected_with_the_key(config: dict[str, Any]) -> None:
    saving = config | {"run": config["run"] | {"save_every": 2, "steps": 2}}
    run_ranks(1, offline, saving)
    other = Path(config["data"]["train"]).with_name("other.jsonl")
    other.write_bytes(Path(config["data"]["train"]).read_bytes())
    with pytest.raises(Exception, match=r"data\.train"):
        run_ranks(1, offline, saving | {"data": {"train": str(other)}})


def cache_files(config: dict[str, Any], pattern: str) -> list[Path]:
    return sorted((Path(config["reference"]["cache_dir"]) / "reference").rglob(pattern))


def again(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The same pairs and model in another run directory, with another seed and beta."""
    return config | {"loss": {"beta": 0.5}, "run": config["run"] | {"name": "again", "seed": 7}} | changes


def test_a_second_run_with_another_beta_computes_no_reference(config: dict[str, Any]) -> None:
    run_ranks(1, offline, config)
    before = cache_files(config, "*.npy")
    (lines,) = run_ranks(1, offline, again(config))
    assert cache_files(config, "*.npy") == before
    assert len(before) == 2, "the entries and the view of these pairs"
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_only_new_pairs_are_added_to_the_reference_cache(config: dict[str, Any], write_pairs: WritePairs) -> None:
    run_ranks(1, offline, config)
    more = config["data"] | {"train": str(write_pairs(ragged_texts(17)))}
    first, _ = run_ranks(2, offline, again(config, data=more))
    assert sorted(len(np.load(shard)) for shard in cache_files(config, "shard-*.npy")) == [2 * 4, 2 * 13]
    assert first[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("pattern", ["shard-*.npy", "view-*.npy"])
def test_a_corrupted_cache_file_is_detected_and_recomputed(config: dict[str, Any], pattern: str) -> None:
    run_ranks(1, offline, config)
    (file,) = cache_files(config, pattern)
    if pattern.startswith("shard"):
        cache_files(config, "view-*.npy")[0].unlink()
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.write_bytes(content)
    (lines,) = run_ranks(1, offline, again(config))
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_entries_of_another_model_are_detected_by_recomputing_some(config: dict[str, Any]) -> None:
    run_ranks(1, offline, config)
    (view,) = cache_files(config, "view-*.npy")
    store, pairs_digest = ReferenceStore(view.parent), view.name.split("-")[1]
    wrong = np.load(view) * 1.1
    view.unlink()
    store.add_view(pairs_digest, wrong)
    (lines,) = run_ranks(1, offline, again(config))
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_export_holds_the_trained_weights(config: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    run_ranks(2, offline, config | {"run": config["run"] | {"export": True}, "cluster": {"train_workers": 2}})
    before = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_pretrained(Path(config["run"]["dir"]) / "run/policy", dtype=torch.float32)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture
def with_lora(config: dict[str, Any]) -> dict[str, Any]:
    """The same run, training adapters."""
    return config | {"model": config["model"] | {"lora": {"rank": 4, "alpha": 16}}}


def test_adapters_train_alike_on_one_and_two_workers_and_without_a_second_model(with_lora: dict[str, Any]) -> None:
    (alone,) = run_ranks(1, offline, with_lora)
    first, _ = run_ranks(2, offline, with_lora | {"cluster": {"train_workers": 2}})
    off, _ = run_ranks(
        2,
        offline,
        with_lora | {"cluster": {"train_workers": 2}, "reference": with_lora["reference"] | {"kind": "adapters_off"}},
    )
    assert alone[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert alone[-1]["loss"] < 0.68, "the adapters reduce the loss"
    assert_same(alone, first, absolute=1e-4)
    assert_same(first, off, absolute=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], ["no_such_module"]])
def test_unusable_adapter_targets_are_rejected(with_lora: dict[str, Any], targets: list[str]) -> None:
    with_lora["model"]["lora"]["targets"] = targets
    with pytest.raises(Exception, match=r"model\.lora\.targets"):
        run_ranks(1, offline, with_lora)


def test_an_adapter_checkpoint_holds_the_adapters_only_and_resumes(with_lora: dict[str, Any]) -> None:
    (undisturbed,) = run_ranks(1, offline, with_lora)
    saving = with_lora["run"] | {"name": "stopped", "save_every": 2}
    run_ranks(1, offline, with_lora | {"run": saving | {"steps": 4}})
    (resumed,) = run_ranks(1, offline, with_lora | {"run": saving})
    assert_same(undisturbed[4:], resumed, absolute=1e-6)
    checkpoint = Path(with_lora["run"]["dir"]) / "stopped/checkpoints/000006"
    weights = (Path(with_lora["model"]["path"]) / "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < weights / 2


def test_the_exported_adapter_and_the_merged_policy_are_the_trained_policy(with_lora: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with_lora["model"]["lora"]["merge"] = True
    run_ranks(2, offline, with_lora | {"run": with_lora["run"] | {"export": True}, "cluster": {"train_workers": 2}})
    run = Path(with_lora["run"]["dir"]) / "run"
    base = AutoModelForCausalLM.from_pretrained(with_lora["model"]["path"], dtype=torch.float32)
    tokens = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = base(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "policy", dtype=torch.float32)(tokens).logits
        adapted = PeftModel.from_pretrained(base, run / "adapter")(tokens).logits
    assert (adapted - merged).abs().max() < 1e-4
    assert (adapted - before).abs().max() > 1e-2


@pytest.fixture
def in_four_bits(with_lora: dict[str, Any]) -> dict[str, Any]:
    """Adapters on quantized weights."""
    with_lora["model"]["lora"]["quantize"] = "nf4"
    return with_lora


def test_adapters_on_four_bits_train_alike_on_one_and_two_workers_against_a_reference_in_four_bits(
    in_four_bits: dict[str, Any],
) -> None:
    (alone,) = run_ranks(1, offline, in_four_bits)
    first, _ = run_ranks(2, offline, in_four_bits | {"cluster": {"train_workers": 2}})
    off = in_four_bits | {"reference": in_four_bits["reference"] | {"kind": "adapters_off"}}
    (without_cache,) = run_ranks(1, offline, off)
    assert alone[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert alone[-1]["loss"] < 0.68, "the adapters reduce the loss"
    assert_same(alone, first, absolute=1e-4)
    assert_same(alone, without_cache, absolute=1e-5)
    # The full-precision reference has its own cache entry.
    in_four_bits["model"]["lora"]["quantize"] = None
    (full,) = run_ranks(1, offline, in_four_bits)
    assert full[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(full[0]["logps/chosen"] - alone[0]["logps/chosen"]) > 0.01
    assert len(list((Path(in_four_bits["reference"]["cache_dir"]) / "reference").iterdir())) == 2


def test_the_merged_four_bit_policy_equals_pefts_merge_of_the_adapter(
    in_four_bits: dict[str, Any],
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    in_four_bits["model"]["lora"]["merge"] = True
    run = in_four_bits["run"] | {"export": True}
    run_ranks(2, offline, in_four_bits | {"run": run, "cluster": {"train_workers": 2}})
    folder = Path(in_four_bits["run"]["dir"]) / "run"
    base = AutoModelForCausalLM.from_pretrained(in_four_bits["model"]["path"], dtype=torch.float32)
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dequantize_4bit(*quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4"))
    tokens = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = base(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)(tokens).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter")(tokens).logits
    assert (adapted - merged).abs().max() < 1e-4
    assert (adapted - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "lora",
    [None, {"rank": 4, "alpha": 16}, {"rank": 4, "alpha": 16, "quantize": "nf4"}],
    ids=["all-weights", "adapters", "adapters-on-four-bits"],
)
def test_exporting_a_checkpoint_of_two_workers_gives_the_export_of_the_run(
    config: dict[str, Any], tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    from transformers import AutoModelForCausalLM

    config["model"]["lora"] = lora and lora | {"merge": True}
    config["run"] |= {"export": True, "save_every": 4}
    run_ranks(2, offline, config | {"cluster": {"train_workers": 2}})
    run = Path(config["run"]["dir"]) / "run"
    export_checkpoint(find_checkpoint(run), tmp_path / "exported", merge=True)
    expected = AutoModelForCausalLM.from_pretrained(run / "policy").state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name
    if lora:
        export_checkpoint(find_checkpoint(run), tmp_path / "adapter")
        assert load_file(tmp_path / "adapter/adapter_model.safetensors").keys() == (
            load_file(run / "adapter/adapter_model.safetensors").keys()
        )
    with pytest.raises(ValueError, match="already exists"):
        export_checkpoint(find_checkpoint(run), tmp_path / "exported")
    next((run / "checkpoints/000004").glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match=r"damaged: __\d_0\.distcp"):
        find_checkpoint(run / "checkpoints/000004")
