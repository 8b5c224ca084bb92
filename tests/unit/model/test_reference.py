"""The reference store: content-addressed, shared, one builder at a time."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dpo_ray.model import reference
from dpo_ray.model.reference import ReferenceStore, entry_keys, store_digest
from dpo_ray.types import TokenPair

PAIRS = [TokenPair((1, 2), (3,), (4, 5)), TokenPair((1,), (2, 3), (4, 5)), TokenPair((1, 2), (4, 5), (3,))]


def test_an_entry_is_known_by_its_prompt_and_completion_alone() -> None:
    keys = entry_keys(PAIRS)
    assert keys[0, 0] == keys[2, 1], "the same completion is one entry, as chosen and as rejected"
    assert keys[0, 0] != keys[1, 0], "(1 2)+(3) and (1)+(2 3) are the same tokens with another prompt"


def test_what_was_added_is_found_and_what_was_not_is_nan(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path), entry_keys(PAIRS)
    assert np.isnan(store.lookup(keys)).all()
    store.add(keys[:1], np.array([[-1.5, -2.5]]), np.array([[1, 2]]))
    found = ReferenceStore(tmp_path).lookup(keys)
    assert found[0].tolist() == [-1.5, -2.5]
    assert found[2].tolist() == [-2.5, -1.5]
    assert np.isnan(found[1]).all()


def test_a_damaged_shard_is_left_out(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path), entry_keys(PAIRS)
    store.add(keys, np.ones((3, 2)), np.ones((3, 2)))
    (shard,) = tmp_path.glob("shard-*.npy")
    shard.write_bytes(shard.read_bytes()[:50])
    assert np.isnan(store.lookup(keys)).all()


def test_another_model_or_another_dtype_is_another_store() -> None:
    names = {store_digest(weights, numerics) for weights in ("a", "b") for numerics in ("bfloat16-cpu", "float32-cpu")}
    assert len(names) == 4


def test_a_second_builder_waits_for_the_first(tmp_path: Path) -> None:
    events: list[str] = []
    inside = threading.Event()

    def first() -> None:
        with ReferenceStore(tmp_path).building(timeout_s=10):
            inside.set()
            time.sleep(0.3)
            events.append("first done")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with ReferenceStore(tmp_path).building(timeout_s=10):
        events.append("second in")
    thread.join()
    assert events == ["first done", "second in"]


def test_waiting_for_a_builder_ends_with_a_time_out_that_says_for_what(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    with store.building(timeout_s=1), pytest.raises(TimeoutError, match="building the reference cache"):  # noqa: SIM117
        with store.building(timeout_s=0.1):
            pass


def test_the_lock_of_a_dead_builder_is_taken_over(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    lock = tmp_path / "building.lock"
    lock.touch()
    long_ago = time.time() - reference.LOCK_STALE_S - 1
    os.utime(lock, (long_ago, long_ago))
    with store.building(timeout_s=1):
        assert lock.exists()
    assert not lock.exists()
