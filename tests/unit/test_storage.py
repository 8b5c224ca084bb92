"""Paths and URIs, atomic writes, and the errors for storage that cannot be used."""

import json
import logging
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from dpo_ray import storage
from dpo_ray.config import Config, with_absolute_paths
from dpo_ray.storage import (
    atomic_folder,
    error_summary,
    folder_at,
    is_remote,
    open_appendable,
    read_jsonl,
    upload_appendable,
    write_atomically,
)
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
    ("tree", "message"),
    [
        ({"run": {"dir": "memory://runs"}}, "run.dir: .*memory://"),
        ({"run": {"dir": "nothing://runs"}}, "unknown storage nothing://"),
        ({"reference": {"cache_dir": "s3://bucket/cache"}}, "reference.cache_dir .*reference.object_store"),
        ({"reference": {"object_store": "/shared/cache"}}, "reference.object_store .*reference.cache_dir"),
        ({"reference": {"object_store": "memory://cache"}}, "reference.object_store: .*memory://"),
        ({"run": {"dir": "s3://bucket/runs"}, "online": {"prompts": "p.jsonl"}}, "run.dir .*online"),
    ],
)
def test_an_unusable_location_is_rejected_with_its_key(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"model": {"path": "a/b"}} | tree)


def test_the_error_names_a_missing_client_and_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = import_module("fsspec.registry")  # the name fsspec.registry is also that of a mapping
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"run\.dir: .*pip install 'dpo-ray\[s3\]'"):
        Config.model_validate({"model": {"path": "a/b"}, "run": {"dir": "s3://bucket/runs"}})


def test_a_failed_write_keeps_the_earlier_file_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    write_atomically(path, "first")

    def lines():
        yield "second\n"
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        write_atomically(path, lines())
    assert [file.name for file in tmp_path.iterdir()] == ["best.yaml"]
    assert path.read_text() == "first"
    write_atomically(path, ["second\n", "third\n"])
    assert path.read_text() == "second\nthird\n"


@pytest.mark.parametrize(("replace", "kept"), [(True, "new"), (False, "old")])
def test_an_atomic_folder_replaces_or_keeps_an_existing_one(tmp_path: Path, replace: bool, kept: str) -> None:
    folder = tmp_path / "cache" / "policy"
    for text in ("old", "new"):
        with atomic_folder(folder, replace=replace) as draft:
            (draft / "config.json").write_text(text)
    assert (folder / "config.json").read_text() == kept
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_whose_writer_fails_does_not_appear(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "policy", replace=True) as draft:
            (draft / "config.json").write_text("{}")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert not list(tmp_path.iterdir())


def test_invalid_lines_of_a_jsonl_file_are_skipped_with_a_warning_except_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    path.write_text('{"step": 1}\n\n[2]\n{"step": 3}\n{"ste')
    with caplog.at_level(logging.WARNING):
        assert read_jsonl(path) == [{"step": 1}, {"step": 3}]
    assert [record.message.split(": ")[0] for record in caplog.records] == [f"{path}:3"]


@pytest.mark.parametrize(
    ("error", "summary"),
    [
        (ValueError("\n no such key\nsee the documentation"), "ValueError: no such key"),
        (KeyError(), "KeyError"),
        (json.JSONDecodeError("bad", "{", 0), "JSONDecodeError: bad: line 1 column 1 (char 0)"),
        (RuntimeError('ray::Engine.start()\n  File "engine.py", line 3\nOSError: disk full\n'), "OSError: disk full"),
    ],
)
def test_an_error_is_summarized_on_one_line(error: Exception, summary: str) -> None:
    assert error_summary(error) == summary


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    port = free_port()
    for key, value in environment(port).items():
        monkeypatch.setenv(key, value)
    S3FileSystem.clear_instance_cache()
    return port


def test_an_unreachable_store_is_rejected_in_seconds(port: int) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"run\.dir: {BUCKET}/first cannot be used: .*127\.0\.0\.1:{port}"):
        storage.validate_writable(folder_at(BUCKET) / "first", "run.dir")
    assert time.monotonic() - started < 30


def test_a_missing_bucket_is_rejected(port: int) -> None:
    with served(port, bucket=False), pytest.raises(ValueError, match=r"run\.dir: .*cannot be used: .*bucket"):
        storage.validate_writable(folder_at(BUCKET) / "first", "run.dir")


def test_an_appendable_file_continues_the_remote_file(port: int) -> None:
    with served(port):
        path = folder_at(BUCKET) / "first/metrics.jsonl"
        path.write_text("one\n")
        local = open_appendable(path)
        with local.open("a") as file:
            file.write("two\n")
        upload_appendable()
        assert path.read_text() == "one\ntwo\n"
