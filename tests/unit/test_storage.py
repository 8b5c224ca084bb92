"""Places by path and URI, and what is said of those that cannot be used."""

import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from dpo_ray import storage
from dpo_ray.config import Config, with_absolute_paths
from dpo_ray.storage import folder_at, is_remote, open_appendable, upload_appendable
from tests.object_store import BUCKET, environment, free_port, served


def test_a_path_and_a_file_uri_are_local() -> None:
    assert folder_at("runs") == Path("runs")
    assert folder_at("file:///mnt/runs") == Path("/mnt/runs")
    assert is_remote(folder_at("s3://bucket/runs") / "first")
    assert str(folder_at("s3://bucket/runs") / "first") == "s3://bucket/runs/first"


def test_an_absolute_configuration_keeps_its_uri() -> None:
    config = Config.model_validate({"model": {"path": "a/b"}, "run": {"dir": "s3://bucket/runs"}})
    assert with_absolute_paths(config).run.dir == "s3://bucket/runs"


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"run": {"dir": "memory://runs"}}, "run.dir: .*memory://"),
        ({"run": {"dir": "nothing://runs"}}, "no storage is called nothing://"),
        ({"reference": {"cache_dir": "s3://bucket/cache"}}, "reference.cache_dir .*reference.object_store"),
        ({"reference": {"object_store": "/shared/cache"}}, "reference.object_store .*reference.cache_dir"),
        ({"reference": {"object_store": "memory://cache"}}, "reference.object_store: .*memory://"),
        ({"run": {"dir": "s3://bucket/runs"}, "online": {"prompts": "p.jsonl"}}, "run.dir .*online"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_key(tree: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"model": {"path": "a/b"}} | tree)


def test_a_client_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = import_module("fsspec.registry")  # the name fsspec.registry is also that of a mapping
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"run\.dir: .*pip install 'dpo-ray\[s3\]'"):
        Config.model_validate({"model": {"path": "a/b"}, "run": {"dir": "s3://bucket/runs"}})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    port = free_port()
    for key, value in environment(port).items():
        monkeypatch.setenv(key, value)
    S3FileSystem.clear_instance_cache()
    return port


def test_an_unreachable_store_is_refused_in_seconds(port: int) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"run\.dir: {BUCKET}/first cannot be used: .*127\.0\.0\.1:{port}"):
        storage.validate_writable(folder_at(BUCKET) / "first", "run.dir")
    assert time.monotonic() - started < 30


def test_a_missing_bucket_is_refused(port: int) -> None:
    with served(port, bucket=False), pytest.raises(ValueError, match=r"run\.dir: .*cannot be used: .*bucket"):
        storage.validate_writable(folder_at(BUCKET) / "first", "run.dir")


def test_a_growing_file_goes_on_where_an_earlier_process_left_it(port: int) -> None:
    with served(port):
        path = folder_at(BUCKET) / "first/metrics.jsonl"
        path.write_text("one\n")
        local = open_appendable(path)
        with local.open("a") as file:
            file.write("two\n")
        upload_appendable()
        assert path.read_text() == "one\ntwo\n"
