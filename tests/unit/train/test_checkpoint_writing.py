"""How a checkpoint is copied and written beside training."""

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash

from dpo_ray.config import Config
from dpo_ray.train.checkpoint import CachedStager
from dpo_ray.train.checkpoint_files import MARKER, NICENESS, open_writer, superseded


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_files_are_digested_as_they_are_written_by_a_thread_that_gives_way(tmp_path: Path) -> None:
    writer, digests = open_writer(tmp_path)

    def write() -> int:
        for name in ("__0_0.distcp", ".metadata"):
            with writer.fs.create_stream(tmp_path / name, "wb") as stream:
                stream.write(b"begin")
                stream.write(bytes(2**20))
        return priority()

    before = priority()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(write).result() == max(NICENESS, before)
    assert priority() == before
    written = b"begin" + bytes(2**20)
    assert (tmp_path / "__0_0.distcp").read_bytes() == written
    assert digests == {"__0_0.distcp": xxhash.xxh3_128(written).hexdigest()}


def test_the_next_copy_takes_the_memory_of_the_last_and_more_if_there_is_more_to_copy() -> None:
    stager, weight = CachedStager(), torch.arange(6.0)
    first = stager.stage({"model": {"weight": weight}, "step": 1})
    weight += 1
    assert first["model"]["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    place = first["model"]["weight"].data_ptr()
    second = stager.stage({"model": {"weight": weight}, "step": 2})
    assert (second["model"]["weight"].data_ptr(), second["step"]) == (place, 2)
    assert second["model"]["weight"].tolist() == [1, 2, 3, 4, 5, 6]
    third = stager.stage({"model": {"weight": weight, "bias": torch.ones(2)}, "step": 3})
    assert third["model"]["bias"].tolist() == [1, 1]
    fourth = stager.stage({"model": {"weight": weight.double(), "bias": None}, "step": 4})
    assert fourth["model"]["weight"].dtype == torch.float64


@pytest.mark.parametrize(("keep", "old"), [(1, ["000010"]), (2, []), (3, [])])
def test_a_checkpoint_of_a_later_step_does_not_count_as_kept(tmp_path: Path, keep: int, old: list[str]) -> None:
    for name in ("000010", "000012", "000020"):  # the run went on from 10, since 20 was damaged
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text(json.dumps({"files": {}, "metrics": {}, "config": {}}))
    config = Config.model_validate({"model": {"path": "tiny"}, "run": {"keep_checkpoints": keep}})
    assert [path.name for path in superseded(tmp_path / "000012", config.run)] == old


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6)):
        (tmp_path / f"{step:06d}").mkdir()
        marker = {"files": {}, "metrics": {"eval/loss": loss}, "config": {}}
        (tmp_path / f"{step:06d}" / MARKER).write_text(json.dumps(marker))
    run = {"keep_checkpoints": 1, "best_metric": "eval/loss", "best_mode": "min"}
    config = Config.model_validate({"model": {"path": "tiny"}, "data": {"eval": "e.jsonl"}, "run": run})
    assert [path.name for path in superseded(tmp_path / "000004", config.run)] == ["000001", "000003"]
