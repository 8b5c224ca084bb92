"""The reference store: content-addressed, shared, one builder at a time."""

import os
import time
from pathlib import Path

import numpy as np

from dpo_ray.reference import store as reference_store
from dpo_ray.reference.store import ReferenceStore, entry_keys, store_digest
from dpo_ray.types import TokenPair
from tests.pair_list import PairList

PAIRS = PairList([TokenPair((1, 2), (3,), (4, 5)), TokenPair((1,), (2, 3), (4, 5)), TokenPair((1, 2), (4, 5), (3,))])
ALL = range(3)


def test_an_entry_is_known_by_its_prompt_and_completion_alone() -> None:
    keys = entry_keys(PAIRS, ALL)
    assert keys[0, 0] == keys[2, 1], "the same completion is one entry, as chosen and as rejected"
    assert keys[0, 0] != keys[1, 0], "(1 2)+(3) and (1)+(2 3) are the same tokens with another prompt"


def test_lookup_returns_added_entries_and_nan_for_missing_ones(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path), entry_keys(PAIRS, ALL)
    assert np.isnan(store.lookup(keys)).all()
    store.add(keys[:1], np.array([[-1.5, -2.5]]), np.array([[1, 2]]))
    found = ReferenceStore(tmp_path).lookup(keys)
    assert found[0].tolist() == [-1.5, -2.5]
    assert found[2].tolist() == [-2.5, -1.5]
    assert np.isnan(found[1]).all()


def test_a_damaged_shard_is_left_out(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path), entry_keys(PAIRS, ALL)
    store.add(keys, np.ones((3, 2)), np.ones((3, 2)))
    (shard,) = tmp_path.glob("shard-*.npy")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert np.isnan(store.lookup(keys)).all()


def test_a_view_holds_the_pairs_in_their_order_and_a_damaged_one_is_removed(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    assert store.find_view("pairs") is None
    view = store.add_view("pairs", np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    assert store.find_view("pairs") == view
    assert store.find_view("other") is None
    assert np.load(view).tolist() == [[-1.0, -2.0], [-3.0, -4.0]]
    content = bytearray(view.read_bytes())
    content[-1] ^= 1
    view.write_bytes(content)
    assert store.find_view("pairs") is None
    assert not view.exists()


def test_another_model_or_another_dtype_is_another_store() -> None:
    names = {store_digest(weights, numerics) for weights in ("a", "b") for numerics in ("bfloat16-cpu", "float32-cpu")}
    assert len(names) == 4


def test_there_is_one_builder_at_a_time(tmp_path: Path) -> None:
    first, second = ReferenceStore(tmp_path), ReferenceStore(tmp_path)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()


def test_the_lock_of_a_dead_builder_is_taken_over_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    store, other = ReferenceStore(tmp_path), ReferenceStore(tmp_path)
    assert store.acquire()
    long_ago = time.time() - reference_store.LOCK_STALE_S - 1
    os.utime(tmp_path / "building.lock", (long_ago, long_ago))
    store.heartbeat()
    assert not other.acquire()
    os.utime(tmp_path / "building.lock", (long_ago, long_ago))
    assert other.acquire()
    store.release()
    assert not ReferenceStore(tmp_path).acquire(), "the first builder woke up and must not free another's lock"
