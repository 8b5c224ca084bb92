"""Runs that share the model and the reference of the runs before them, on real processes."""

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.train.checkpoint_files import finished_checkpoints, read_marker
from tests.distributed.conftest import over
from tests.distributed.processes import run_ranks
from tests.distributed.runs import groups_after_failures, offline, offline_in_turn

MEASURED = ("perf/pairs_per_s", "perf/tokens_per_s", "perf/step_s")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_run_on_the_model_of_another_reports_what_it_reports_alone(
    ranks: int, lora: dict[str, Any] | None, config: dict[str, Any], tmp_path: Path
) -> None:
    config["model"] |= {"lora": lora}
    trials = [{"lr": 1e-3}, {"lr": 5e-3}, {"lr": 1e-3}]

    def steps(prefix: str, *, fresh: bool) -> list[Any]:
        configs = []
        for i, trial in enumerate(trials):
            run = config["run"] | {"name": f"{prefix}{i}", "steps": 3, "save_every": 2, "export": False}
            configs.append(over(ranks, config | {"run": run, "optim": config["optim"] | trial}))
        of_runs = run_ranks(ranks, offline_in_turn, configs, fresh)[0]
        return [[{k: v for k, v in line.items() if k not in MEASURED} for line in lines] for lines in of_runs]

    def shards(prefix: str) -> list[dict[str, str]]:
        """Digests of the shards of all checkpoints, by run."""
        runs = [finished_checkpoints(tmp_path / f"{prefix}{i}/checkpoints") for i in range(3)]
        files = [{f"{path.name}/{n}": d for path in run for n, d in read_marker(path)["files"].items()} for run in runs]
        return [{name: digest for name, digest in run.items() if name.endswith(".distcp")} for run in files]

    shared = steps("shared", fresh=False)
    assert shared == steps("fresh", fresh=True)
    assert shared[0] == shared[2]
    assert shared[0][-1]["loss"] != shared[1][-1]["loss"]
    same = slice(1 if lora else 3)  # new adapters take random numbers, whose state is saved
    assert shards("shared")[same] == shards("fresh")[same]
    assert len(shards("shared")[0]) == 2 * ranks


def test_a_run_that_fails_leaves_no_process_group_of_its_saves(config: dict[str, Any]) -> None:
    config["loss"] = {"use": "tests.distributed.runs:fails_in_training"}
    after_first, after_second = run_ranks(1, groups_after_failures, over(1, config))[0]
    assert after_first == after_second, "those of meshes stay for the next mesh of the same ranks"


@pytest.mark.parametrize(("save_last", "saved"), [(True, ["000002"]), (False, ["000001"])])
def test_where_a_run_stops_it_is_saved_only_if_the_last_state_is_wanted(
    save_last: bool, saved: list[str], config: dict[str, Any], tmp_path: Path
) -> None:
    config["run"] |= {"name": "run", "save_every": 1, "save_last": save_last, "keep_checkpoints": 1}
    run_ranks(1, offline, config, 2)
    assert [folder.name for folder in finished_checkpoints(tmp_path / "run/checkpoints")] == saved
