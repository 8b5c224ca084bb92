"""The trackers, each the real package in its offline or file mode, read back by its own reader."""

import json
import os
import re
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dpo_ray.config import Config, load, schema
from dpo_ray.config.load import load_config, parse_overrides, validate_extras
from dpo_ray.config.secrets import mask_secrets
from dpo_ray.report.live import follower
from dpo_ray.report.live.follower import Position, Tail, TrackerFeed, follow_run, validate_trackers
from dpo_ray.report.live.trackers import TRACKERS
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.rollout.open_round import Outcome
from dpo_ray.types import Completion, CompletionGroup, Judgement, Prompt, ScoredPair

TOKEN = "hf_" + 34 * "x"


class Recorder:
    """A tracker that keeps what it gets, across runs of the same folder."""

    logged: ClassVar[list[tuple[Any, ...]]] = []
    ids: ClassVar[list[str | None]] = []

    def __init__(self, *, id: str | None, group: str | None, fail_at: int | None = None) -> None:
        self.id, self.location, self.fail_at = id or "first", f"group {group}", fail_at
        Recorder.ids.append(id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep step and keys."""
        if step == self.fail_at:
            raise ConnectionError(f"https://me:password@host is not reachable\n{TOKEN}")
        Recorder.logged.append((step, *metrics))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Keep the rows."""
        Recorder.logged.append((step, *rows))

    def close(self, *, failed: bool) -> None:
        """Keep the outcome."""
        Recorder.logged.append(("failed" if failed else "finished",))


class Failing(Recorder):
    """The same under another name."""


class Hanging(Recorder):
    """A tracker whose first call does not return."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hang."""
        threading.Event().wait(30)


RECORDER, FAILING, HANGING = (f"{__name__}:{name}" for name in ("Recorder", "Failing", "Hanging"))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "logged", [])
    monkeypatch.setattr(Recorder, "ids", [])
    monkeypatch.setattr(follower, "POLL_S", 0.01)


def config(tmp_path: Path, *trackers: str, args: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A run with these trackers, and its directory."""
    run = {"dir": str(tmp_path), "name": "r", "trackers": trackers, "tracker_args": args or {}}
    (tmp_path / "r").mkdir(exist_ok=True)
    return Config.model_validate({"model": {"path": "tiny"}, "run": run} | sections)


def write_lines(run_dir: Path, *lines: dict[str, Any], mode: str = "a") -> None:
    """Lines of metrics.jsonl."""
    with (run_dir / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def step(number: int, **metrics: Any) -> dict[str, Any]:
    """The line of a step, whose timing makes it unlike any other."""
    return {"step": number, "loss": 1 / number, "rewards/margins": 0.5 * number, "perf/step_s": time.time(), **metrics}


def feed(config: Config, *, failed: bool = False, timeout_s: float = 120.0) -> list[str]:
    """Feed what metrics.jsonl has; returns the reports."""
    reports: list[str] = []
    assert TrackerFeed(config, None, reports.append).close(failed=failed, timeout_s=timeout_s) or timeout_s < 1
    return reports


def wait_until_logged(count: int) -> None:
    """Poll until the recorder has so many entries."""
    deadline = time.monotonic() + 30
    while len(Recorder.logged) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------- the file and its readers


def test_tail_reads_only_whole_new_lines_and_starts_again_when_the_file_is_replaced(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "metrics.jsonl")
    assert list(tail.read()) == []
    write_lines(tmp_path, step(1), step(2), {"step": 2, "eval/loss": 1.0})
    with tail.file.open("a") as file:
        file.write('{"step": 3')
    assert [at for at, _ in tail.read()] == [Position(1, 1), Position(2, 1), Position(2, 2)]
    assert list(tail.read()) == []
    # A restarted worker drops step 2 and passes the old length before the file is read again.
    write_lines(tmp_path, step(1), mode="w")
    write_lines(tmp_path, *(step(n) for n in range(2, 9)))
    assert [at.step for at, _ in tail.read()] == list(range(1, 9))
    write_lines(tmp_path, step(1), mode="w")
    assert [at.step for at, _ in tail.read()] == [1]


def test_a_tracker_gets_each_line_once_and_in_order_while_workers_restart(tmp_path: Path) -> None:
    run = config(tmp_path, RECORDER)
    run_dir = run.run.path
    running = TrackerFeed(run, None, lambda text: None)
    write_lines(run_dir, step(1), step(2), {"step": 2, "eval/loss": 0.5}, step(3))
    wait_until_logged(4)
    write_lines(run_dir, *(step(n) for n in (1, 2)), {"step": 2, "eval/loss": 0.5}, mode="w")
    write_lines(run_dir, *(step(n) for n in (3, 4)))
    wait_until_logged(5)
    write_lines(run_dir, {"step": 4, "eval/loss": None, "eval/rewards/margins": 1.0})  # just before the end
    assert running.close(failed=False)
    assert [entry[0] for entry in Recorder.logged] == [1, 2, 2, 3, 4, 4, "finished"]
    assert Recorder.logged[-2] == (4, "eval/rewards/margins")


def test_a_resumed_run_continues_the_run_of_the_tracker(tmp_path: Path) -> None:
    run = config(tmp_path, RECORDER)
    write_lines(run.run.path, step(1), step(2), step(3))
    feed(run, failed=True)
    write_lines(run.run.path, step(1), step(2), step(3), step(4), mode="w")
    feed(run)
    assert Recorder.ids == [None, "first"]
    assert [entry[0] for entry in Recorder.logged] == [1, 2, 3, "failed", 4, "finished"]
    assert json.loads((run.run.path / "trackers.json").read_text())[RECORDER] == {"id": "first", "step": 4, "line": 1}


def test_a_failing_tracker_is_reported_once_and_the_others_go_on(tmp_path: Path) -> None:
    run = config(tmp_path, FAILING, RECORDER, args={FAILING: {"fail_at": 3}})
    write_lines(run.run.path, *(step(n) for n in range(1, 6)))
    reports = [text for text in feed(run) if "failed" in text]
    assert reports == [
        f"tracker {FAILING} failed after step 2: ConnectionError: https://(hidden)@host is not reachable; "
        "metrics.jsonl has every step"
    ]
    assert [entry[0] for entry in Recorder.logged].count(5) == 1
    assert json.loads((run.run.path / "trackers.json").read_text())[FAILING]["step"] == 2


def test_a_hanging_tracker_is_given_up_at_the_end(tmp_path: Path) -> None:
    run = config(tmp_path, HANGING, RECORDER)
    write_lines(run.run.path, step(1))
    reports = feed(run, timeout_s=0.5)
    assert f"tracker {HANGING} failed: no answer for 0.5 s; metrics.jsonl has every step" in reports
    assert (1, "loss", "rewards/margins", "perf/step_s") in Recorder.logged


# ---------------------------------------------------------------------------------------------------- the real packages


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of six steps and two rounds, interrupted after step 3, and its tracker runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a new sqlite store takes seconds
    return tmp_path


def record_run(tmp_path: Path, tracker: str, **args: Any) -> list[str]:
    """Feed a run of two rounds that is interrupted after step 3 and resumed after step 2; returns all reports."""
    run = config(
        tmp_path,
        tracker,
        args={tracker: args},
        online={"prompts": "p.jsonl", "judge": {"use": "lab:judge", "args": {"api_key": "k-1", "note": f"of {TOKEN}"}}},
    )
    store = Ledger(run.run.path)
    for round in range(2):
        write_round(store, round)
    write_lines(run.run.path, step(1), step(2, round=0), step(3))
    reports = feed(run, failed=True)
    write_lines(run.run.path, step(1), step(2, round=0), step(3), step(4, round=1), mode="w")
    return reports + feed(run)


def write_round(store: Ledger, round: int) -> None:
    """Six judged pairs."""
    completion = lambda text: Completion(text, (1, 2), True)  # noqa: E731
    groups = [
        CompletionGroup(
            Prompt(n, ({"role": "user", "content": f"question {n} | of round {round}"},), (1,)),
            (completion("yes"), completion("no")),
            0,
        )
        for n in range(6)
    ]
    lines = store.open(round, oldest=0)
    for group in groups:
        lines.append(Outcome(group.prompt, group.prompt.index, (ScoredPair(0, 1),), group, Judgement((2.0, 1.0))))
    lines.finish()


def test_tensorboard_shows_each_step_once_config_and_samples(recorded: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reports = record_run(recorded, "tensorboard")
    folder = f"{recorded}/r/tensorboard"
    assert reports == 2 * [f"tensorboard: tensorboard --logdir {folder}"]
    events = EventAccumulator(folder, size_guidance={"tensors": 0})
    events.Reload()
    margins = events.Scalars("rewards/margins")
    assert [(event.step, event.value) for event in margins] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    samples = events.Tensors("samples/text_summary")
    assert [event.step for event in samples] == [2, 4]
    assert b"| 1 | question 0 \\| of round 1 | yes | no | 2.0 | 1.0 |" in samples[1].tensor_proto.string_val[0]
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary"))
    assert "path: tiny" in text
    assert "api_key: (hidden)" in text
    assert "note: of (hidden)" in text


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: protocol buffers in the blocks of a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    record_type: Any = getattr(wandb_internal_pb2, "Record")  # noqa: B009 - protobuf defines it at import

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = record_type()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_offline_has_each_step_once_under_one_run_id(recorded: Path) -> None:
    import wandb

    record_run(recorded, "wandb", project="tests", mode="offline")
    # finish() returns before wandb's own process has closed the file; at exit wandb waits for it.
    wandb.teardown()
    records = [list(wandb_records(file)) for file in sorted((recorded / "r" / "wandb").glob("offline-run-*/*.wandb"))]
    runs = [record.run for part in records for record in part if record.HasField("run")]
    assert len(records) == 2
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {(runs[0].run_id, "tests", "r")}
    settings = {update.key: update.value_json for run in runs for update in run.config.update}
    assert json.loads(settings["online"])["judge"]["args"] == {"api_key": "(hidden)", "note": "of (hidden)"}
    assert TOKEN not in str(records)
    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for part in records
        for record in part
        if record.HasField("history")
    ]
    assert [(row["step"], row["rewards/margins"]) for row in rows if "rewards/margins" in row] == [
        (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)
    ]  # fmt: skip
    tables = [json.loads(file.read_text()) for file in (recorded / "r" / "wandb").glob("**/samples*.table.json")]
    assert sorted(table["data"][0][:4] for table in tables) == [
        [round, f"question 0 | of round {round}", "yes", "no"] for round in range(2)
    ]
    assert [record.exit.exit_code for part in records for record in part if record.HasField("exit")] == [1, 0]


def test_mlflow_has_each_step_once_in_one_run(recorded: Path) -> None:
    import mlflow

    store = (recorded / "mlruns").as_uri()
    record_run(recorded, "mlflow", tracking_uri=store, experiment="tests")
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")
    assert run.data.params["loss.beta"] == "0.1"
    assert run.data.params["online.judge.args.api_key"] == "(hidden)"
    history = client.get_metric_history(run.info.run_id, "rewards/margins")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")] == [
        "samples/round_000000.json", "samples/round_000001.json"
    ]  # fmt: skip
    assert mlflow.load_table("samples/round_000001.json", [run.info.run_id]).prompt[0] == "question 0 | of round 1"


def test_trackio_has_each_step_once_in_one_run(recorded: Path) -> None:
    # Trackio decides at import where its files are.
    os.environ.setdefault("TRACKIO_DIR", str(recorded / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    project = recorded.name
    record_run(recorded, "trackio", project=project, auto_log_cpu=False)
    (name,) = SQLiteStorage.get_runs(project)
    assert re.fullmatch("r-[0-9a-f]{6}", name)
    logs = SQLiteStorage.get_logs(project, name)
    margins = [(row["step"], row["rewards/margins"]) for row in logs if "rewards/margins" in row]
    assert margins == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    samples = [row["samples"]["_value"][0]["prompt"] for row in logs if "samples" in row]
    assert samples == ["question 0 | of round 0", "question 0 | of round 1"]
    settings = SQLiteStorage.get_run_config(project, name)
    assert settings is not None
    assert settings["online"]["judge"]["args"] == {"api_key": "(hidden)", "note": "of (hidden)"}


# ------------------------------------------------------------------------------------------- the process of the driver


def test_the_process_gets_the_last_lines_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = config(tmp_path, "tensorboard", "no_such_package:Tracker")
    write_lines(run.run.path, step(9))
    (run.run.path / "trackers.json").write_text("{}")  # of an attempt that saved nothing
    reports: list[str] = []
    with follow_run(run, reports.append):
        write_lines(run.run.path, step(1), step(2))
    assert f"tensorboard: tensorboard --logdir {tmp_path}/r/tensorboard" in reports
    assert [text for text in reports if "no_such_package" in text] == [
        "tracker no_such_package:Tracker failed: ValueError: tracker 'no_such_package:Tracker': module "
        "'no_such_package' cannot be imported: No module named 'no_such_package'; metrics.jsonl has every step"
    ]
    assert json.loads((run.run.path / "trackers.json").read_text())["tensorboard"]["step"] == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{tmp_path}/r/tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_trackers_get_the_last_lines_of_a_driver_that_was_killed(tmp_path: Path) -> None:
    run = config(tmp_path, RECORDER)
    process = follower._start_process(run, None)
    write_lines(run.run.path, step(1), step(2))
    for pipe in (process.stdout, process.stdin):
        pipe.close()
    assert process.wait(120) == 0
    assert json.loads((run.run.path / "trackers.json").read_text())[RECORDER]["step"] == 2


# ---------------------------------------------------------------------------------------------------- the configuration


def test_every_built_in_tracker_has_a_name_in_the_schema() -> None:
    assert tuple(TRACKERS) == schema.TRACKERS


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run.trackers=wandbb", "run.trackers: no tracker is called 'wandbb'; did you mean 'wandb'?"),
        ("run.trackers=[wandb,wandb]", "run.trackers: found ['wandb', 'wandb']; give each tracker once"),
        ("run.tracker_args.mlflow.experiment=x", "run.tracker_args.mlflow: run.trackers has wandb; add 'mlflow' to it"),
    ],
)
def test_a_wrong_tracker_is_an_error_that_names_the_key(tmp_path: Path, override: str, problem: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: tiny}\nrun: {trackers: [wandb], tracker_args: {wandb: {project: a}}}\n")
    assert load_config(file, parse_overrides(["run.tracker_args.wandb.project=b"])).run.tracker_args == {
        "wandb": {"project": "b"}
    }
    with pytest.raises(ValueError, match=re.escape(problem)):
        load_config(file, parse_overrides([override]))


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)])  # absent, or only a folder ./wandb
def test_a_tracker_that_is_not_installed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ModuleSpec | None
) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: spec)
    with pytest.raises(
        ValueError, match=re.escape("run.trackers: wandb is not installed: pip install 'dpo-ray[wandb]'")
    ):
        validate_extras(config(tmp_path, "wandb"))


def test_tracker_arguments_and_import_paths_are_checked_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("tracker 'mlflow' takes no argument 'uri'")):
        validate_trackers(config(tmp_path, "mlflow", args={"mlflow": {"uri": "x"}}))
    with pytest.raises(ValueError, match="module 'no_such_package' cannot be imported"):
        validate_trackers(config(tmp_path, "no_such_package:Tracker"))


@pytest.mark.parametrize(
    ("tree", "masked"),
    [
        ({"api_key": "a", "openai_api_key": "b", "password": "c"}, 3 * ["(hidden)"]),
        ({"max_tokens": 5, "tokenizer": "gpt2", "prompt_key": "question"}, [5, "gpt2", "question"]),
        ({"path": f"sk-{20 * 'a'}", "url": "https://me:pw@host/x"}, ["(hidden)", "https://(hidden)@host/x"]),
        ({"u": "https://host/x?a=1&X-Amz-Signature=abc&b=2"}, ["https://host/x?a=1&X-Amz-Signature=(hidden)&b=2"]),
        ({"token": "", "path": "runs/hf_models/eyJ"}, ["", "runs/hf_models/eyJ"]),
        ({"tokens": [TOKEN, "plain"]}, [["(hidden)", "plain"]]),
    ],
)
def test_secrets_are_masked_by_name_and_by_form(tree: dict[str, Any], masked: list[Any]) -> None:
    assert list(mask_secrets(tree).values()) == masked
