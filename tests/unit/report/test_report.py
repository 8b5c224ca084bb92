"""Reading a run directory, its key figures, and the page: on small synthetic runs."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.report.figures import KeyFigure, comparisons, key_figures, verdict
from dpo_ray.report.formatting import format_duration, short_names
from dpo_ray.report.health import diagnose
from dpo_ray.report.page import write_report
from dpo_ray.report.plots import legend, run_plots
from dpo_ray.report.record import RunRecord, read_run
from jobs.picture import write_picture

CONFIG = """
run: {name: tiny}
model: {path: some/model}
loss: {use: sigmoid, beta: 0.1}
optim: {max_grad_norm: 1.0}
"""


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    """An unremarkable optimizer step; keys of ``changes`` spell ``/`` as ``__``."""
    line = {
        "step": step,
        "epoch": step / 10,
        "loss": 0.6931 if step == 1 else 0.6,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.1,
        "rewards/margins": 0.2,
        "rewards/accuracies": 0.7,
        "logps/chosen": -50.0,
        "logps/rejected": -60.0,
        "optim/grad_norm": 0.5,
        "optim/lr": 1e-6,
        "perf/pairs_per_s": 8.0,
        "perf/tokens_per_s": 800.0,
        "perf/step_s": 2.0,
    }
    return line | {key.replace("__", "/"): value for key, value in changes.items()}


def round_end(index: int, **changes: Any) -> dict[str, Any]:
    """What the step that ends a round adds, as changes for ``step_line``."""
    extra = {
        "round": index,
        "judge__mean_score": 0.1 * index,
        "judge__chosen_score": 0.1 * index + 0.2,
        "judge__rejected_score": 0.1 * index - 0.2,
        "rollout__kept": 9,
        "rollout__dropped_tie": 1,
        "rollout__tokens_per_s": 100.0,
        "rollout__mean_tokens": 40.0,
        "policy_lag": 0,
        "kl": 1.0 * index,
        "perf__generate_s": 5.0,
        "perf__judge_s": 1.0,
        "perf__train_s": 4.0,
        "perf__sync_s": 0.5,
        "perf__wait_s": 6.5,
    }
    return extra | changes


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def offline_run(path: Path, lines: Iterable[Mapping[str, Any]], config: str = CONFIG) -> Path:
    """A run directory with these lines as metrics.jsonl."""
    write_lines(path / "metrics.jsonl", lines)
    (path / "config.yaml").write_text(config, encoding="utf-8")
    return path


def online_run(path: Path, rounds: int = 4, **changes: Any) -> Path:
    """A run of one step per round; ``changes`` go into every round's line."""
    config = CONFIG + "online: {prompts: p.jsonl, eval_prompts: e.jsonl}\n"
    return offline_run(path, (step_line(r + 1, **round_end(r, **changes)) for r in range(rounds)), config)


def write_evaluation(path: Path, version: int, scores: Sequence[float], tokens: int = 40, kl: float = 2.0) -> None:
    """Completions of one held-out prompt for each score."""
    write_lines(
        path / "evaluations" / f"{version:06d}.jsonl",
        (
            {
                "prompt": [{"role": "user", "content": f"prompt {i}"}],
                "completion": f"version {version} of {i}",
                "tokens": tokens,
                "score": score,
            }
            for i, score in enumerate(scores)
        ),
    )
    write_lines(path / "evaluations" / f"{version:06d}.kl.json", [{"version": version, "kl": kl}])


def write_round(path: Path, index: int, groups: Iterable[Mapping[str, Any]]) -> None:
    """``pairs.jsonl`` of a round."""
    write_lines(path / "rounds" / f"{index:06d}" / "pairs.jsonl", groups)


def group(*texts: str, scores: Sequence[float], finished: bool = True, dropped: str | None = None) -> dict[str, Any]:
    """One judged prompt: the best candidate chosen and the worst rejected, unless it was dropped."""
    return {
        "prompt": [{"role": "user", "content": "say something"}],
        "candidates": [{"text": text, "token_ids": [1, 2, 3], "finished": finished} for text in texts],
        "scores": list(scores),
        "pairs": [] if dropped else [{"chosen": scores.index(max(scores)), "rejected": scores.index(min(scores))}],
        "dropped": dropped,
        "seed": 0,
    }


# ----------------------------------------------------------------------------------------------------------- reading


def test_an_incomplete_last_line_is_skipped(tmp_path):
    run = offline_run(tmp_path, [step_line(1), step_line(2)])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "los')
    assert [line["step"] for line in read_run(run).steps] == [1, 2]


def test_the_last_line_of_a_repeated_step_counts(tmp_path):
    first, resumed = [step_line(s, loss=1.0) for s in (1, 2, 3)], [step_line(s, loss=0.5) for s in (2, 3, 4)]
    record = read_run(offline_run(tmp_path, first + resumed))
    steps, loss = record.over_steps("loss")
    assert steps.tolist() == [1, 2, 3, 4]
    assert loss.tolist() == [1.0, 0.5, 0.5, 0.5]


def test_a_round_without_pairs_keeps_the_line_of_the_round_before_it(tmp_path):
    lines = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "round": 0}, {"step": 2, "round": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_run(tmp_path)
    assert [line["round"] for line in record.rounds] == [0, 1]
    assert record.over_steps("loss")[1].tolist() == [0.7, 0.6]


def test_evaluations_are_read_from_lines_of_their_own_and_from_step_lines(tmp_path):
    lines = [{"step": 0, "eval/loss": 0.69}, step_line(1), step_line(2) | {"eval/loss": 0.6}]
    record = read_run(offline_run(tmp_path, lines))
    assert record.over_evals("eval/loss")[0].tolist() == [0, 2]
    assert record.over_evals("eval/loss")[1].tolist() == [0.69, 0.6]
    assert len(record.steps) == 2


def test_a_directory_without_a_run_is_rejected_by_name(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no such directory"):
        read_run(tmp_path / "absent")


def test_a_run_without_config_is_read(tmp_path):
    run = offline_run(tmp_path, [step_line(1)])
    (run / "config.yaml").unlink()
    assert read_run(run).config == {}
    assert write_report(read_run(run)).exists()


# ------------------------------------------------------------------------------------------------------- key figures


def figures_of(run: Path) -> dict[str, KeyFigure]:
    return {figure.label: figure for figure in key_figures(read_run(run))}


def test_key_figures_of_an_online_run(tmp_path):
    run = online_run(tmp_path, rounds=4)
    write_evaluation(run, 0, [0.0, 0.2], tokens=40, kl=0.0)
    write_evaluation(run, 2, [0.9, 0.9], tokens=90, kl=9.0)
    write_evaluation(run, 4, [0.4, 0.7], tokens=50, kl=3.0)
    assert key_figures(read_run(run)) == [
        ("Held-out judge score", "0.550", "+0.45 ± 0.05, 2 prompts", "0.100"),
        ("KL to the reference", "3.0", "nats per completion", ""),
        ("Completion length", "50", "tokens, +25%", "40"),
        ("Training", "8 pairs/s", "800 tokens/s", ""),
        ("Generation", "100 tokens/s", "median over rounds", ""),
        ("Trained for", "4 rounds", "4 optimizer steps", ""),
        ("Time", "44 s", "without start-up and evaluation", ""),  # 4 * (4.0 + 0.5 + 6.5)
    ]


def test_an_offline_run_has_no_figures_of_judge_and_rounds(tmp_path):
    figures = figures_of(offline_run(tmp_path, [step_line(s) for s in (1, 2, 3)]))
    assert list(figures) == ["Training", "Trained for", "Time"]
    assert (figures["Trained for"].value, figures["Time"].value) == ("3 steps", "6.0 s")


def test_held_out_accuracy_is_none_at_step_0_where_policy_and_reference_are_equal(tmp_path):
    def evaluation_line(step: int, accuracy: float, chosen: float) -> dict[str, Any]:
        return {"step": step, "eval/rewards/accuracies": accuracy, "eval/rewards/chosen": chosen}

    tied = offline_run(tmp_path / "tied", [evaluation_line(0, 0.0, 0.0), evaluation_line(9, 0.8, 0.3)])
    assert read_run(tied).accuracies("eval/")[0].tolist() == [9]
    accuracy = figures_of(tied)["Held-out accuracy"]
    assert (accuracy.before, accuracy.value) == ("-", "80%")
    assert "all tie at step 0" in write_report(read_run(tied)).read_text(encoding="utf-8")
    no_reference = offline_run(tmp_path / "other", [evaluation_line(0, 0.6, -0.2), evaluation_line(9, 0.8, -0.1)])
    accuracy = figures_of(no_reference)["Held-out accuracy"]
    assert (accuracy.before, accuracy.value) == ("60%", "80%")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 s"), (9.94, "9.9 s"), (45.2, "45 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7499.6, "2 h 5 min")],
)
def test_durations_are_rounded_to_two_units(seconds, text):
    assert format_duration(seconds) == text


def test_an_untrained_policy_alone_has_a_score_before_and_none_after(tmp_path):
    run = online_run(tmp_path)
    write_evaluation(run, 0, [0.5])
    assert figures_of(run)["Held-out judge score"] == ("Held-out judge score", "-", "", "0.500")


def test_comparisons_are_the_largest_gain_the_median_and_the_largest_loss(tmp_path):
    run = online_run(tmp_path)
    write_evaluation(run, 0, [0.0, 0.0, 0.0, 0.0, 0.5])
    write_evaluation(run, 4, [0.1, 0.9, 0.3, 0.2, 0.0])
    rows = comparisons(read_run(run), n=3)
    assert [round(row.gain, 6) for row in rows] == [0.9, 0.2, -0.5]
    assert rows[0] == ("prompt 1", "version 0 of 1", 0.0, "version 4 of 1", 0.9)


def test_comparisons_of_two_prompts_are_two(tmp_path):
    run = online_run(tmp_path)
    write_evaluation(run, 0, [0.0, 0.0])
    write_evaluation(run, 1, [0.2, 0.1])
    assert len(comparisons(read_run(run), n=7)) == 2


def test_prompts_whose_score_is_nan_are_left_out_of_the_gain(tmp_path):
    run = online_run(tmp_path)
    write_evaluation(run, 0, [0.0, float("nan"), 0.1])
    write_evaluation(run, 4, [0.5, 0.9, 0.5])
    gain = read_run(run).score_gain
    assert gain is not None
    assert (gain.prompts, gain.before, gain.after) == (2, 0.05, 0.5)


def test_the_verdict_separates_a_gain_from_noise(tmp_path):
    clear, unclear = online_run(tmp_path / "clear"), online_run(tmp_path / "unclear")
    write_evaluation(clear, 0, [0.0, 0.1, 0.2])
    write_evaluation(clear, 4, [0.5, 0.6, 0.8])
    write_evaluation(unclear, 0, [0.0, 0.1, 0.2])
    write_evaluation(unclear, 4, [0.5, 0.0, 0.0])
    assert verdict(read_run(clear), []).startswith("The held-out judge score rose from 0.100 to 0.633 over 4 rounds")
    assert "did not change significantly" in verdict(read_run(unclear), [])


# ---------------------------------------------------------------------------------------------------------- the page


class Elements(HTMLParser):
    """Names and attributes of all elements, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def full_online_run(path: Path) -> Path:
    run = online_run(path)
    write_evaluation(run, 0, [0.0, 0.1, 0.2])
    write_evaluation(run, 4, [0.5, 0.6, 0.7])
    write_round(run, 3, [group("fine", "<script>alert(1)</script>", scores=[0.9, 0.1])])
    return run


def test_text_of_models_is_escaped(tmp_path):
    html = write_report(read_run(full_online_run(tmp_path))).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_the_page_loads_nothing(tmp_path):
    page = Elements(write_report(read_run(full_online_run(tmp_path))).read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.names)
    assert all(
        value is None or value.startswith(("#", "data:"))
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href")
    )


def test_ids_are_unique_over_the_plots(tmp_path):
    html = write_report(read_run(full_online_run(tmp_path))).read_text(encoding="utf-8")
    clip_paths = re.findall(r'<clipPath id="([^"]+)"', html)
    assert len(clip_paths) == len(set(clip_paths)) > 0
    assert {name for name in re.findall(r"url\(#([^)]+)\)", html)} <= set(clip_paths)


def test_an_online_page_shows_every_plot_and_the_samples(tmp_path):
    text = Elements(write_report(read_run(full_online_run(tmp_path))).read_text(encoding="utf-8")).text
    for title in (
        "Judge score by round",
        "KL to the reference",
        "Reward margin and accuracy",
        "Gradient norm and learning rate",
        "Loss",
        "Log-probability of chosen and rejected",
        "Completion length",
        "Pairs kept and dropped",
        "Time by phase",
        "Held-out prompts, before and after",
        "Candidates of round 3",
        "version 4 of 2",
    ):
        assert title in text


def test_each_part_of_a_judges_score_has_a_panel_of_its_own(tmp_path):
    parts = {"judge__length_score": 3.0, "judge__math_score": 0.5, "judge__best_score": 0.9}
    plots = {plot.title: plot for plot in run_plots(read_run(online_run(tmp_path / "weighted", **parts)))}
    assert [panel.label for panel in plots["Parts of the judge score"].panels] == ["length", "math"]
    assert plots["Parts of the judge score"].panels[0].series[0].curve[1].tolist() == [3.0] * 4
    labels = [series.label for series in plots["Judge score by round"].panels[0].series]
    assert labels == ["chosen", "best of the candidates", "mean of candidates", "rejected"]
    simple = run_plots(read_run(online_run(tmp_path / "simple")))
    assert "Parts of the judge score" not in {plot.title for plot in simple}


def test_an_offline_page_shows_held_out_pairs_and_no_rounds(tmp_path):
    lines = [step_line(1), {"step": 1, "eval/loss": 0.69, "eval/rewards/accuracies": 0.5}, step_line(2)]
    text = Elements(write_report(read_run(offline_run(tmp_path, lines))).read_text(encoding="utf-8")).text
    assert "held-out pairs" in text
    assert "Judge score by round" not in text
    assert "Candidates of round" not in text


def test_a_page_is_written_from_evaluations_alone(tmp_path):
    write_evaluation(tmp_path, 0, [0.1])
    assert "0.100 →" in write_report(read_run(tmp_path)).read_text(encoding="utf-8")


def test_api_keys_are_hidden_and_token_limits_are_not(tmp_path):
    judge = "online: {prompts: p, judge: {use: length, args: {api_key: sk-123}}, sampling: {max_tokens: 77}}\n"
    html = write_report(read_run(offline_run(tmp_path, [step_line(1)], CONFIG + judge))).read_text(encoding="utf-8")
    assert "sk-123" not in html
    assert "max_tokens: 77" in html


def test_the_data_report_is_shown_with_any_keys(tmp_path):
    run = offline_run(tmp_path, [step_line(1)])
    (run / "data.json").write_text(json.dumps({"train": {"kept": 12345, "dropped": {"tie": 7}}}), encoding="utf-8")
    text = Elements(write_report(read_run(run)).read_text(encoding="utf-8")).text
    assert "train:\n  kept: 12345\n  dropped:\n    tie: 7" in text


def test_writing_a_report_leaves_no_temporary_file(tmp_path):
    run = offline_run(tmp_path, [step_line(1)])
    write_report(read_run(run))
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html"]


def test_the_main_plots_of_a_run_are_written_as_a_small_png(tmp_path):
    write_picture(str(full_online_run(tmp_path)), tmp_path / "docs" / "report.png")
    assert 20_000 < (tmp_path / "docs" / "report.png").stat().st_size < 120_000


def test_a_long_run_gives_a_small_page(tmp_path):
    html = write_report(read_run(offline_run(tmp_path, (step_line(s, loss=1 / s) for s in range(1, 5001)))))
    assert html.stat().st_size < 400_000


def test_a_run_on_labels_speaks_of_completions_and_not_of_pairs() -> None:
    keys = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen", "logps/rejected")
    diverged = {"step": 9, "optim/grad_norm": 99.0, **dict.fromkeys(keys, math.nan)}
    for use, change in (("kto", 9.0), ("bco", -9.0), (["kto", "bco"], 0.1)):
        steps = tuple(
            {"step": step, "optim/grad_norm": 1.0, **dict.fromkeys(keys, 1 + change * step)} for step in range(1, 9)
        )
        evals = tuple({"step": step, **{f"eval/{key}": 0.75 for key in keys}} for step in (4, 6, 8))
        record = RunRecord(Path("run"), {"loss": {"use": use, "beta": 0.1}}, steps=(*steps, diverged), evals=evals)
        findings, plots = diagnose(record), run_plots(record)
        texts = [verdict(record, findings), *(text for finding in findings for text in finding[1:])]
        texts += [text for figure in key_figures(record) for text in figure]
        texts += [
            text for plot in plots for text in (plot.title, plot.caption, *(panel.label for panel in plot.panels))
        ]
        texts += [swatch.label for plot in plots for swatch in legend(plot)]
        words = " ".join(texts).replace("optim.pairs_per_step", "").replace("rewards/chosen", "")
        assert not re.search("pair|chosen|rejected|ranked", words, re.IGNORECASE), words
        assert "75% of held-out completions got likelier or less likely as labeled" in words
        assert "Log-probability of desirable and undesirable" in words
    paired = RunRecord(Path("run"), {"loss": {"use": "sigmoid"}}, evals=evals)
    assert key_figures(paired)[0].detail == "of pairs ordered right"
    assert verdict(paired, []) == "After 8 steps 75% of held-out pairs are ordered right."


def test_short_names_are_the_last_parts_that_tell_keys_and_metrics_apart() -> None:
    assert short_names(["loss.beta", "optim.lr", "eval/rewards/accuracies"]) == ["beta", "lr", "accuracies"]
    assert short_names(["loss.use", "eval/loss", "loss", "kl"]) == ["loss.use", "eval/loss", "loss", "kl"]
    assert short_names(["online.judge.use", "online.select.use"]) == ["judge.use", "select.use"]
