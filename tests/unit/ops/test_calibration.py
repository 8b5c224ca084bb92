"""Which path of products is chosen: the fastest that is exact enough, the same on all ranks, measured once per CPU."""

import json
import time
from pathlib import Path

import pytest
import torch

from dpo_ray.objective.precision import PATHS, ProductPath, Products
from dpo_ray.ops.calibration import Timings, cached_timings, describe, fastest, measure_products
from dpo_ray.ops.cpu import cpu_model


def timings(**seconds: float) -> Timings:
    """The same seconds by path for every class."""
    by_path: dict[ProductPath, float] = {path: seconds[path] for path in PATHS if path in seconds}
    return dict.fromkeys(("linear", "logits", "head_grad", "attention"), by_path)


def test_every_class_is_measured_within_the_time_of_a_start() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    started = time.thread_time()
    measured = measure_products()
    assert time.thread_time() - started < 2.0, "0.3 s where nothing else runs"
    assert set(measured) == {"linear", "logits", "head_grad", "attention"}
    assert all(seconds > 0 for by_path in measured.values() for seconds in by_path.values())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fastest_path_is_chosen_and_a_more_exact_one_within_a_twentieth() -> None:
    assert fastest([timings(float32=3.0, rounded=2.0, bfloat16=1.0)]) == Products.forced("bfloat16")
    assert fastest([timings(float32=1.05, rounded=1.0, bfloat16=1.0)]) == Products.forced("float32")
    assert fastest([timings(float32=1.06, rounded=1.0, bfloat16=1.0)]) == Products.forced("rounded")


def test_ranks_without_a_path_that_all_have_measured_take_rounded_inputs() -> None:
    assert fastest([timings(bfloat16=1.0), timings(float32=1.0)]).linear == "rounded"


def test_ranks_on_different_cpus_choose_what_is_fastest_on_the_slowest() -> None:
    with_units, without = timings(float32=3.0, rounded=2.0, bfloat16=1.0), timings(float32=2.0, rounded=3.0)
    assert fastest([with_units, without]) == fastest([without, with_units])
    assert fastest([with_units, without]).linear == "float32", "both need 3 s with either; bfloat16 is hopeless on one"


def test_a_cpu_is_measured_once_and_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    first = cached_timings(tmp_path / "cache")
    assert cached_timings(tmp_path / "cache") == first, "times that were measured again would differ"
    (file,) = (tmp_path / "cache").iterdir()
    assert list(json.loads(file.read_text())) == [f"{cpu_model()}, torch {torch.__version__}, method 2"]
    file.write_text("{")
    assert set(cached_timings(tmp_path / "cache")) == set(first)
    assert json.loads(file.read_text())


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert set(cached_timings(tmp_path / "file" / "cache")) == {"linear", "logits", "head_grad", "attention"}


@pytest.mark.parametrize("path", PATHS)
def test_the_line_in_the_log_names_the_cpu_and_each_class(path: ProductPath) -> None:
    line = describe(Products.forced(path))
    assert cpu_model() in line
    assert f"linear {path}, logits {path}" in line
