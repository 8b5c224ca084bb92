"""The printed end of a run: results, completions side by side, files."""

import io
import json
from pathlib import Path

from rich.console import Console

from dpo_ray.config import Config, write_config
from dpo_ray.report.summary import print_summary


def summary_of(config: Config) -> str:
    output = io.StringIO()
    print_summary(config, Console(file=output, width=120, markup=False, highlight=False), seconds=200.0)
    return output.getvalue()


def write_run(config: Config, lines: list[dict[str, float]]) -> None:
    config.run.path.mkdir(parents=True)
    write_config(config, config.run.path / "config.yaml")
    (config.run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_offline_run_shows_held_out_accuracy_before_and_after_and_a_dash_if_all_pairs_tie(
    tmp_path: Path,
) -> None:
    config = Config.model_validate({"model": {"path": "tiny"}, "run": {"dir": str(tmp_path), "name": "demo"}})
    tie = {"step": 0, "eval/loss": 0.6931, "eval/rewards/accuracies": 0.0, "eval/rewards/margins": 0.0}
    step = {"step": 1, "loss": 0.6931, "perf/pairs_per_s": 8.0, "perf/tokens_per_s": 800.0}
    evaluated = [{"step": n, "eval/loss": 0.6, "eval/rewards/accuracies": a} for n, a in ((2, 0.52), (4, 0.71))]
    write_run(config, [tie, step, evaluated[1]])
    shown = summary_of(config)
    assert shown.splitlines()[1].split()[:5] == ["Held-out", "accuracy", "-", "->", "71%"], shown
    assert "8 pairs/s" in shown
    assert "3 min 20 s" in shown
    assert "metrics.jsonl" in shown

    (config.run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [step, *evaluated]))
    assert "52% -> 71%" in summary_of(config)


def test_completions_are_printed_as_they_are(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"model": {"path": "tiny"}, "run": {"dir": str(tmp_path), "name": "demo"}, "online": {"prompts": "p.jsonl"}}
    )
    write_run(config, [{"step": 1, "loss": 0.69, "round": 0}])
    (config.run.path / "evaluations").mkdir()
    for version, completion in ((0, "plain"), (1, "[bold]answer[/INST]")):
        line = {"prompt": [{"role": "user", "content": "Why?"}], "completion": completion, "score": float(version)}
        line |= {"tokens": 5, "finished": True, "policy_logp": -1.0, "reference_logp": -1.0}
        (config.run.path / f"evaluations/{version:06d}.jsonl").write_text(json.dumps(line) + "\n")
    shown = summary_of(config)
    assert "(+1.00) [bold]answer[/INST]" in shown, shown
    assert "Held-out judge score" in shown
