"""Keys that must not change on resume, and absolute paths."""

import re
from pathlib import Path

import pytest

from dpo_ray.config import Config, first_difference, override, with_absolute_paths
from dpo_ray.config.load import config_fields
from dpo_ray.config.resume import FIXED_KEYS

BASE = Config.model_validate({"model": {"path": "org/model"}, "online": {"prompts": "prompts.jsonl"}})


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.path", "org/other"), ("data.limit", 5), ("online.candidates", 8), ("online.judge.use", "sentiment")],
)
def test_the_error_names_a_changed_model_data_set_or_judge(key: str, value: object) -> None:
    difference = first_difference(BASE.model_dump(mode="json"), override(BASE, {key: value}))
    assert difference is not None
    assert difference.startswith(key.removesuffix(".use"))
    assert "run.name" in difference


@pytest.mark.parametrize(
    ("key", "value"), [("optim.lr", 1e-3), ("optim.pairs_per_step", 8), ("cluster.train_workers", 4), ("run.epochs", 3)]
)
def test_keys_that_may_change_on_resume_are_no_difference(key: str, value: object) -> None:
    assert first_difference(BASE.model_dump(mode="json"), override(BASE, {key: value})) is None


def test_refresh_1_and_round_are_the_same_setting_and_another_schedule_is_not() -> None:
    saved = override(BASE, {"reference.refresh": "round"}).model_dump(mode="json")
    assert first_difference(saved, override(BASE, {"reference.refresh": 1})) is None
    other = first_difference(saved, override(BASE, {"reference.refresh": 2}))
    assert other is not None
    assert other.startswith("reference.refresh: 'round', this run has 2")
    soft = first_difference(saved, override(BASE, {"reference.refresh": 1, "reference.mixup_alpha": 0.5}))
    assert soft is not None
    assert soft.startswith("reference.mixup_alpha: 1.0, this run has 0.5")


def test_the_table_of_the_documentation_has_every_key_in_its_row() -> None:
    page = (Path(__file__).parents[3] / "docs/runs.md").read_text(encoding="utf-8")
    rows = {
        row: re.findall("`([a-z_]+[.][a-z_*]+)`", keys)
        for keys, row in re.findall(r"^\| (`.*) \| (.+) \|$", page, re.M)
    }
    assert rows.pop("must be the same") == list(FIXED_KEYS)
    may_change = [key for row, keys in rows.items() if row.startswith("may change") for key in keys]
    sections = {".".join(key.split(".")[:1]) for key in config_fields()} - {"sweep"}
    assert {key.removesuffix(".*") for key in may_change if key.endswith(".*")} == sections
    named = [key for key in may_change if not key.endswith(".*")]
    assert set(named) <= set(config_fields())
    assert not set(named) & set(FIXED_KEYS)


def test_an_offline_run_differs_from_an_online_one() -> None:
    offline = Config.model_validate({"model": {"path": "org/model"}})
    assert first_difference(offline.model_dump(mode="json"), BASE) is not None


def test_local_paths_become_absolute_and_hub_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").touch()
    resolved = with_absolute_paths(BASE)
    assert resolved.online is not None
    assert resolved.online.prompts == (str(tmp_path / "prompts.jsonl"),)
    assert resolved.model.path == "org/model"
    assert resolved.run.path == tmp_path / "runs/dpo"
    assert Path(resolved.reference.cache_dir or "").is_absolute()
    assert with_absolute_paths(resolved) == resolved
