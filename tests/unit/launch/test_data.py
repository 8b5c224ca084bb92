"""The data report, the check that a resumed run has the pairs that it started with, and that of judges' columns."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dpo_ray.config import Config, override
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.data import prepare_data, prepare_round_data
from tests.conftest import ragged_texts, save_pairs

LOCAL = Cluster(gpus=0, cpus=2)


def offline_run(model: Path, folder: Path, pairs: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(folder / "runs")},
            "model": {"path": str(model)},
            "reference": {"cache_dir": str(folder / "cache")},
            "data": {"train": str(pairs)},
        }
    )


def test_a_run_with_work_rejects_other_pairs_under_the_same_path(
    tiny_model: Path, tmp_path: Path, write_pairs: Callable[..., Path]
) -> None:
    config = offline_run(tiny_model, tmp_path, write_pairs(ragged_texts(4)))
    output = io.StringIO()
    prepare_data(config, LOCAL, Console(file=output, width=200))
    assert "4 records read, 4 kept" in output.getvalue()
    data = config.run.path / "data.json"
    digest = json.loads(data.read_text())["data.train"]["digest"]

    write_pairs(ragged_texts(5))
    prepare_data(config, LOCAL, Console(file=io.StringIO()))  # the run has no work yet
    assert json.loads(data.read_text())["data.train"]["digest"] != digest

    (config.run.path / "checkpoints/000001").mkdir(parents=True)
    (config.run.path / "checkpoints/000001/complete.json").write_text("{}")
    write_pairs(ragged_texts(6))
    with pytest.raises(ValueError, match=r"data\.train: .*pairs\.jsonl no longer has the pairs .* run\.name"):
        prepare_data(config, LOCAL, Console(file=io.StringIO()))
    other = override(config, {"run.name": "other"})
    prepare_data(other, LOCAL, Console(file=io.StringIO()))


def test_a_sweep_that_continues_rejects_other_training_and_held_out_pairs(
    tiny_model: Path, tmp_path: Path, write_pairs: Callable[..., Path]
) -> None:
    config = Config.model_validate(
        {
            "run": {"dir": str(tmp_path / "runs")},
            "model": {"path": str(tiny_model)},
            "reference": {"cache_dir": str(tmp_path / "cache")},
            "data": {
                "train": str(write_pairs(ragged_texts(4))),
                "eval": str(save_pairs(tmp_path / "eval.jsonl", ragged_texts(3))),
            },
        }
    )
    console = Console(file=io.StringIO())
    pairs, digests = prepare_data(config, LOCAL, console, recorded={})
    assert (pairs, set(digests)) == (4, {"data.train", "data.eval"})
    data = (config.run.path / "data.json").read_text()
    save_pairs(tmp_path / "eval.jsonl", ragged_texts(5))
    with pytest.raises(ValueError, match=r"^data\.eval: .*eval\.jsonl no longer has the pairs that .* was started"):
        prepare_data(config, LOCAL, console, recorded=digests)
    assert (config.run.path / "data.json").read_text() == data, "the report of the pairs that the sweep has"
    assert prepare_data(config, LOCAL, console, recorded={"data.train": digests["data.train"]}).pairs == 4


def test_a_sweep_that_continues_rejects_other_prompts(tiny_model: Path, tmp_path: Path) -> None:
    files = {"prompts": tmp_path / "prompts.jsonl", "eval_prompts": tmp_path / "held-out.jsonl"}

    def write(**counts: int) -> None:
        for name, count in counts.items():
            files[name].write_text("".join(json.dumps({"prompt": f"Add {i} and 1."}) + "\n" for i in range(count)))

    write(prompts=4, eval_prompts=2)
    paths = {name: str(file) for name, file in files.items()}
    config = Config.model_validate(
        {
            "run": {"dir": str(tmp_path / "runs")},
            "model": {"path": str(tiny_model)},
            "online": {**paths, "prompts_per_round": 2, "judge": {"use": "length"}},
        }
    )
    console = Console(file=io.StringIO())
    digests = prepare_round_data(config, LOCAL, console, recorded={}).digests
    assert prepare_round_data(config, LOCAL, console, recorded=digests).digests == digests
    write(eval_prompts=3)
    with pytest.raises(ValueError, match=r"^online\.eval_prompts: .*held-out\.jsonl no longer has the prompts that"):
        prepare_round_data(config, LOCAL, console, recorded=digests)
    write(prompts=5, eval_prompts=2)
    with pytest.raises(ValueError, match=r"^online\.prompts: .*prompts\.jsonl no longer has the prompts that"):
        prepare_round_data(config, LOCAL, console, recorded=digests)


def test_an_interrupted_write_leaves_the_earlier_data_report(
    tiny_model: Path, tmp_path: Path, write_pairs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = offline_run(tiny_model, tmp_path, write_pairs(ragged_texts(4)))
    prepare_data(config, LOCAL, Console(file=io.StringIO()))
    earlier, replace = (config.run.path / "data.json").read_text(), Path.replace

    def interrupt(draft: Path, target: Path) -> Path:
        if target.name == "data.json":
            raise KeyboardInterrupt
        return replace(draft, target)

    monkeypatch.setattr(Path, "replace", interrupt)
    write_pairs(ragged_texts(5))
    with pytest.raises(KeyboardInterrupt):
        prepare_data(config, LOCAL, Console(file=io.StringIO()))
    assert (config.run.path / "data.json").read_text() == earlier


def test_a_column_that_no_prompt_has_is_an_error_before_pairs_are_tokenized(
    tiny_model: Path, tmp_path: Path, write_pairs: Callable[..., Path]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Add {i} and 1.", "topic": "sums"}) + "\n" for i in range(2)))
    config = Config.model_validate(
        {
            "run": {"dir": str(tmp_path / "runs")},
            "model": {"path": str(tiny_model)},
            "reference": {"cache_dir": str(tmp_path / "cache")},
            "data": {"train": str(write_pairs(ragged_texts(4)))},
            "online": {
                "prompts": str(prompts),
                "prompts_per_round": 2,
                "judge": {"use": "exact"},
                "source": {"mix": 0.5},
            },
        }
    )
    with pytest.raises(ValueError, match=r"^online\.prompts: judge 'exact' needs the column 'answer' .*: topic$"):
        prepare_round_data(config, LOCAL, Console(file=io.StringIO()))
    assert not (tmp_path / "cache").exists()
