"""Commands, configurations, records and snippets of README.md, CONTRIBUTING.md, docs/ and examples/ are valid.

A block that cannot be checked here follows an HTML comment ``<!-- not run: reason -->``.
"""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from dpo_ray.cli import COMMANDS
from dpo_ray.config import OFFLINE, ONLINE, Config, load_config, parse_overrides, sweep_command
from dpo_ray.config.commands import validate_command
from dpo_ray.config.load import config_fields, help_text
from dpo_ray.config.paths import validate_paths
from dpo_ray.data.formats import Part
from dpo_ray.data.records import Problem, read_pairs
from dpo_ray.rollout.judges import bind_judge, check_scores
from dpo_ray.sweep.spaces import find_space
from dpo_ray.types import Completion, CompletionGroup, Prompt

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *ROOT.glob("examples/*/README.md"),
]
FENCE = re.compile(r"(<!-- not run: [^>]+-->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINING = {"offline": OFFLINE, "online": ONLINE, "sweep": sweep_command}
MINE = {"model": {"path": "org/name"}, "data": {"train": "my_pairs.jsonl", "eval": "my_held_out.jsonl"}}
MY_ONLINE = {"model": {"path": "org/name"}, "online": {"prompts": "my_prompts.jsonl"}}
PLACEHOLDERS = {
    "my.yaml": json.dumps(MINE),
    "my_online.yaml": json.dumps(MY_ONLINE),
    **dict.fromkeys(("my_pairs.jsonl", "my_held_out.jsonl", "my_prompts.jsonl", "helpful.jsonl", "maths.parquet"), ""),
}
MODELS = ("/models/Qwen3-0.6B", "/shared/models/mine")


class Block(NamedTuple):
    page: Path
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of all pages in one of ``languages``, without those marked as not run."""
    return [
        Block(page, language, text)
        for page in PAGES
        for marked, language, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if language in languages and not marked
    ]


def commands() -> Iterator[tuple[str, str]]:
    for block in blocks("", "sh", "bash"):
        for line in block.text.splitlines():
            if words := shlex.split(line, comments=True):
                yield block.page.relative_to(ROOT).as_posix(), shlex.join(words)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's directory: the checkout's job files and a person's own configuration and data."""
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    for name, text in PLACEHOLDERS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    return tmp_path


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_every_command_of_the_documentation_is_accepted(page: str, command: str, folder: Path) -> None:
    if page.startswith("examples/"):
        shutil.copytree(ROOT / Path(page).parent, folder, dirs_exist_ok=True)
    validate(shlex.split(command))


def validate(words: list[str]) -> None:
    """Check a command line as far as that is possible without running it."""
    match words:
        case ["ray", "job", "submit", *rest]:
            validate(rest[rest.index("--") + 1 :])
        case ["dpo-ray", "--help"]:
            pass
        case ["dpo-ray", name, "--help"]:
            assert name in COMMANDS
        case ["dpo-ray", "export", source, destination, *options]:
            assert not source.startswith("-")
            assert not destination.startswith("-")
            assert set(options) <= {"--best", "--merge"}
        case ["dpo-ray", "inspect", config, *options]:
            validate_paths(load_config(config))
            assert {option for option in options if option.startswith("--")} <= {"--json", "--records"}
        case ["dpo-ray", name, config, *overrides]:
            if name == "sweep":
                space, *overrides = overrides
                assert space == "my_space" or find_space(space)
            tree = load_config(config, parse_overrides(overrides))
            validate_command(tree, TRAINING[name])
            if tree.model.path not in MODELS:
                validate_paths(tree)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["make", *targets]:
            assert set(targets) <= make_targets()
        case ["pip", "install", what]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert what.partition("[")[0] in (".", "dpo-ray")
            assert set(re.findall(r"[\w-]+", what.partition("[")[2])) <= set(project["optional-dependencies"])
        case ["git", "clone", *_] | [".venv/bin/pre-commit", "install"]:
            pass
        case _:
            pytest.fail(f"{shlex.join(words)}: this test does not know the command; mark its block as not run")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.page.name)
def test_configurations_of_the_documentation_are_valid(block: Block) -> None:
    Config.model_validate({"model": {"path": "org/name"}, **yaml.safe_load(block.text)})


@pytest.mark.parametrize("block", blocks("jsonl"), ids=lambda block: block.text[:20])
def test_records_of_the_documentation_can_be_used(block: Block, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(block.text)
    pairs = list(read_pairs([Part(str(tmp_path / "pairs.jsonl"))]))
    assert pairs
    assert not [pair for pair in pairs if isinstance(pair, Problem)]


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page.name)
def test_snippets_of_the_documentation_run(block: Block) -> None:
    exec(compile(block.text, str(block.page), "exec"), {"__name__": "snippet"})


def test_every_built_in_loss_is_in_the_table_of_losses() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "losses.md").read_text(), re.MULTILINE)
    from dpo_ray.config.losses import LOSSES

    assert set(LOSSES) <= set(rows)


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\w+\.py)`", text)
    assert len(named) > 50
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "dpo_ray" / name).exists()]
    assert not missing


def test_configuration_keys_named_in_the_documentation_exist() -> None:
    keys = set(config_fields())
    sections = {key.rpartition(".")[0] for key in keys}
    tops = {key.partition(".")[0] for key in keys}
    for page in PAGES:
        for key in re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)[=`:]", page.read_text()):
            if key.partition(".")[0] in tops and not key.endswith((".py", ".yaml", ".json", ".jsonl", ".csv", ".html")):
                assert key in keys | sections, f"{page.name}: {key}"


def test_messages_named_in_troubleshooting_are_in_the_source() -> None:
    literals = [text for file in (ROOT / "dpo_ray").rglob("*.py") for text in texts(ast.parse(file.read_text()))]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        fragments = [fragment.strip() for fragment in message.split("...") if fragment.strip()]
        if message.startswith("torch."):
            continue
        assert any(all(fragment in text for fragment in fragments) for text in literals), message


def texts(tree: ast.AST) -> Iterator[str]:
    """String literals; of f-strings the constant parts with ``...`` between."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "docs"], ids=lambda page: page.parent.name
)
def test_relative_links_outside_docs_lead_to_files(page: Path) -> None:
    """mkdocs checks those of docs/ when it builds it."""
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_workflows_call_targets_of_the_makefile() -> None:
    called = set()
    for file in (ROOT / ".github").rglob("*.yml"):
        tree = yaml.safe_load(file.read_text())
        for job in tree.get("jobs", {}).values() if isinstance(tree, dict) else ():
            called |= set(job.get("strategy", {}).get("matrix", {}).get("target", ()))
        called |= set(re.findall(r"run: make ([a-z-]+)", file.read_text()))
    assert called >= {"env", "check", "test-unit", "test-slow", "wheel", "docs"}
    assert called <= make_targets()


# ------------------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize("name", ["offline", "online", "sweep"])
def test_examples_have_a_valid_configuration_and_usable_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples" / name)
    config = load_config(f"{name}.yaml")
    validate_command(config, TRAINING[name])
    validate_paths(config)
    for source in (*config.data.train, *config.data.eval):
        assert not [pair for pair in read_pairs([Part(source)]) if isinstance(pair, Problem)]
    assert len(Path("README.md").read_text().splitlines()) <= 15


def test_the_judge_of_the_online_example_prefers_an_answer_to_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples" / "online")
    monkeypatch.syspath_prepend(ROOT / "examples" / "online")
    config = load_config("online.yaml")
    assert config.online is not None
    texts = ("A lock that one thread holds at a time.", "Certainly! " + "It depends on many things. " * 20)
    completions = tuple(Completion(text, (1, 2), True) for text in texts)
    group = CompletionGroup(Prompt(0, ({"role": "user", "content": "What is a mutex?"},), (1,)), completions, 0)
    (judgement,) = check_scores([group], bind_judge(config.online.judge)()([group]))
    short, long = judgement.scores
    assert short == 1.0
    assert long < 0


def test_the_space_of_the_sweep_example_varies_keys_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "sweep")
    assert find_space("my_space") == "my_space"
    sweep = importlib.import_module("my_space").SWEEP
    assert set(sweep.space) <= set(config_fields())
    assert help_text().count("\n") > 100
