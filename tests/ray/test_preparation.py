"""Data of more than one part: tokenised by tasks of the cluster, and trained on as a mixture."""

import json
from pathlib import Path

import pytest

from dpo_ray.data.store import PART_RECORDS
from tests.conftest import ragged_texts
from tests.ray.commands import lines, run_command, write_yaml
from tests.ray.test_offline_job import messages

pytestmark = pytest.mark.ray


def test_a_large_set_is_tokenised_on_the_cluster_and_a_mixture_of_it_is_trained_on(tiny_model: Path, tmp_path: Path):
    records = [messages(*text) for text in ragged_texts(PART_RECORDS + 4)]
    records[PART_RECORDS + 2] = '{"prompt": "broken'
    (tmp_path / "large.jsonl").write_text("\n".join(records) + "\n")
    (tmp_path / "small.jsonl").write_text("\n".join(messages(*text) for text in ragged_texts(8)) + "\n")
    config = {
        "run": {"dir": str(tmp_path / "runs"), "name": "mixture", "steps": 2, "save_every": None, "export": False},
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {
            "train": [str(tmp_path / "large.jsonl"), str(tmp_path / "small.jsonl")],
            "weights": [0.01, 2],
            "shuffle": False,
        },
        "loss": {"use": "simpo", "beta": 2.0},
        "optim": {"pairs_per_step": 48},
    }
    done = run_command("offline", write_yaml(tmp_path / "run.yaml", config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"data.train: {PART_RECORDS + 12:,} records read, {PART_RECORDS + 11:,} kept, 1 dropped" in done.stdout
    assert f"large.jsonl:{PART_RECORDS + 3} (" in done.stdout
    (meta,) = (json.loads(path.read_text()) for path in (tmp_path / "cache/data").glob("*/meta.json"))
    assert meta["sizes"] == [PART_RECORDS + 3, 8]
    assert [part["pairs"] for part in meta["parts"]] == [PART_RECORDS, 3, 8]
    # An epoch is a hundredth of the large source, 41 pairs, and the small one twice, 16: 48 pairs of 57, then the rest.
    assert [line["epoch"] for line in lines(tmp_path / "runs/mixture/metrics.jsonl")] == pytest.approx([48 / 57, 1.0])


def test_data_that_cannot_be_used_ends_the_run_in_one_line_also_from_a_task(tiny_model: Path, tmp_path: Path):
    records = [messages(*text) for text in ragged_texts(PART_RECORDS + 4)]
    (tmp_path / "large.jsonl").write_text("\n".join(records) + "\n")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] ")
    config = {
        "run": {"dir": str(tmp_path / "runs")},
        "model": {"path": str(tiny_model), "chat_template": str(template)},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {"train": str(tmp_path / "large.jsonl")},
    }
    failed = run_command("offline", write_yaml(tmp_path / "run.yaml", config))
    assert failed.returncode == 2
    assert "model.chat_template: line 1 of the template" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list((tmp_path / "cache/data").glob(".building-*"))
