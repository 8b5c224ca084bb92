"""The recipes are short, cite their papers, and are valid configurations of online runs."""

import re
from pathlib import Path

import pytest

from dpo_ray.config import ONLINE, load_config
from dpo_ray.config.commands import validate_command
from dpo_ray.rollout.judges import bind_judge
from dpo_ray.rollout.selectors import build_selector

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_short_cites_its_paper_and_is_a_valid_configuration(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 25
    assert re.search(r"\A#.*\n?.*arXiv:\d{4}\.\d{5}", text)
    config = load_config(str(file))
    validate_command(config, ONLINE)
    assert config.run.name == file.stem
    assert config.online is not None
    for judge in config.online.judges.values():
        bind_judge(judge)
    build_selector(config.online.select)
    for source in (*config.online.prompts, *config.online.eval_prompts, *config.data.train):
        assert (ROOT / source).exists()


def test_the_documentation_names_every_recipe() -> None:
    page = (ROOT / "docs/online.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)\.yaml` \|", page, re.M)) == {file.stem for file in RECIPES}
