"""Unusable data that a task of the cluster detects."""

from pathlib import Path

from dpo_ray.data.store import PART_RECORDS
from tests.conftest import ragged_texts
from tests.ray.commands import Commands, write_yaml
from tests.ray.test_offline_job import messages


def test_unusable_data_ends_the_run_with_one_line_also_from_a_task(
    joining: Commands, tiny_model: Path, tmp_path: Path
) -> None:
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
    failed = joining.run("offline", write_yaml(tmp_path / "run.yaml", config))
    assert failed.returncode == 2
    assert "model.chat_template: line 1 of the template" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list((tmp_path / "cache/data").glob(".*"))
