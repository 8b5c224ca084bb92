"""The GPU benchmark's dry run, without Ray."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.flops import step_flops
from benchmarks.gpu import attempt, main
from benchmarks.gpu_sides import SHAPES

RUN = """
import runpy, sys
sys.modules.update(dict.fromkeys(("ray", "pydantic", "vllm")))   # importing any of them fails
sys.argv = ["gpu", "--tiny", "--out", sys.argv[1]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_the_dry_run_checks_times_and_writes_all_sides_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, "-c", RUN, str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"dpo_ray", "padded, TRL's head"} < result["runs"].keys()
    assert {len(runs) for runs in result["runs"].values()} == {2}
    assert not result["failed"]
    losses = [run["loss"] for runs in result["runs"].values() for run in runs]
    assert max(losses) - min(losses) < 0.01, "every side takes the same step; bfloat16"
    assert max(error for name, error in result["apart"].items() if "float32" in name) < 1e-4
    assert "| dpo_ray |" in done.stdout


def test_a_side_out_of_memory_halves_its_micro_batch_and_one_that_fails_returns_its_error() -> None:
    tried: list[int] = []

    def step(size: int) -> dict[str, Any]:
        tried.append(size)
        if size > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return {"size": size}

    fits = 3000
    assert attempt(step, 16384, 512) == {"size": 2048}
    assert tried == [16384, 8192, 4096, 2048]
    fits = 100
    assert attempt(step, 1024, 512) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"

    def breaks(size: int) -> dict[str, Any]:
        raise NotImplementedError("no such kernel")

    assert attempt(breaks, 4, 1) == "NotImplementedError: no such kernel"


def test_no_turn_starts_that_would_end_too_late_and_earlier_results_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--seconds", "0", "--out", str(out)])
    main()
    result = json.loads(out.read_text())
    assert result["matmul_tflops"] > 0
    assert result["stopped"] == "after 0 of 4 turns: --seconds 0.0"


def test_useful_work_is_counted_by_hand_for_one_pair() -> None:
    hidden, layers, _, key_heads, intermediate, vocabulary = SHAPES["tiny"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * key_heads * 16 + 3 * hidden * intermediate)
    attended = 10 * 10 / 2 + 4 * 12 + 6 * 13  # prompt to itself; 4 and 6 tokens to the prompt and half of themselves
    useful, counted = step_flops(SHAPES["tiny"], np.array([[10, 4, 6]]))
    forward = 2 * weights * 20 + 2 * hidden * vocabulary * 10 + 4 * hidden * layers * attended
    assert useful == pytest.approx(3 * forward)
    repeated = 2 * (weights + hidden * vocabulary) * 30 + 4 * hidden * layers * (14**2 / 2 + 16**2 / 2)
    assert counted == pytest.approx(3 * repeated)
