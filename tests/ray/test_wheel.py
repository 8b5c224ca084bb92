"""The wheel in an environment of its own, used as a person does who has no checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ragged_texts
from tests.ray.commands import ROOT, clean_environment, lines

LOSS = (
    "def plain_hinge(policy, reference, *, beta):\n    return (1 - beta * (policy.chosen - policy.rejected)).relu()\n"
)


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a new environment with the wheel; other packages are those of this one, the checkout is not."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", folder], cwd=ROOT, check=True
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "venv" / "lib" / version / "site-packages"
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "-q", "--offline", "--no-deps", "--python", python, wheel],
        check=True,
    )
    # A folder that a .pth file names is searched, but its own .pth files, such as the checkout's, are not read.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


def dpo_ray(bin_folder: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in clean_environment().items() if key != "PYTHONPATH"}
    return subprocess.run(
        [bin_folder / "dpo-ray", *arguments], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300
    )


def test_the_wheel_does_not_see_the_checkout(bin_folder: Path, tmp_path: Path) -> None:
    code = "import dpo_ray.sweep.spaces as s; print(s.__file__, s.find_space('beta_lr')); import jobs"
    done = subprocess.run([bin_folder / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    file, space = done.stdout.split()
    assert Path(file).is_relative_to(bin_folder.parent)
    assert space == "dpo_ray.tune_spaces.beta_lr"
    assert "No module named 'jobs'" in done.stderr


def test_help_lists_the_commands_within_a_second_of_processor_time(bin_folder: Path, tmp_path: Path) -> None:
    before = os.times()
    done = dpo_ray(bin_folder, "--help", cwd=tmp_path)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == [
        "offline", "online", "sweep", "export", "inspect",
    ]  # fmt: skip
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 1.0


def test_help_of_a_command_lists_every_key(bin_folder: Path, tmp_path: Path) -> None:
    done = dpo_ray(bin_folder, "offline", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss.beta: float (> 0) = 0.1" in done.stdout


def test_a_misspelt_command_is_answered_with_the_nearest(bin_folder: Path, tmp_path: Path) -> None:
    done = dpo_ray(bin_folder, "ofline", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'offline'?" in done.stderr


def test_a_search_space_of_the_working_directory_is_found_and_the_built_in_one_listed(
    bin_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(
        json.dumps({"model": {"path": "org/name"}, "data": {"train": "org/a", "eval": "org/b"}})
    )
    (tmp_path / "tune_spaces").mkdir()
    (tmp_path / "tune_spaces" / "mine.py").write_text("")
    done = dpo_ray(bin_folder, "sweep", "config.yaml", "minee", cwd=tmp_path)
    assert "accepted are beta_lr, lora_rank, loss_family, mine, online, seeds, and" in done.stderr


def test_an_offline_run_trains_with_a_loss_of_the_working_directory(
    bin_folder: Path, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "my_losses.py").write_text(LOSS)
    records = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in ragged_texts(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "run": {"name": "first", "steps": 2, "eval_every": None},
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {"train": "pairs.jsonl"},
        "loss": {"use": "my_losses:plain_hinge"},
        "optim": {"pairs_per_step": 4, "lr": 1e-3},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))

    done = dpo_ray(bin_folder, "offline", "config.yaml", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "first"
    assert [row["step"] for row in lines(run_dir / "metrics.jsonl")] == [1, 2]
    assert (run_dir / "policy" / "model.safetensors").exists()
    exported = dpo_ray(bin_folder, "export", "runs/first", "exported", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "exported" / "config.json").exists()
