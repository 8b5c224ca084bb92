import json
from dataclasses import asdict

import numpy as np
import pytest

from dpo_ray.data.records import Problem
from dpo_ray.data.report import DataReport, DataReportBuilder


def example() -> DataReport:
    counts = DataReportBuilder()
    counts.drop(Problem("not_json", "a.jsonl", 17, "Expecting value"))
    for number in range(20, 25):
        counts.drop(Problem("prompt_too_long", "b.jsonl", number, "9 tokens"))
    counts.keep(
        "a.jsonl", 1, [("completion_cut", ""), ("text_not_rendered", "tools"), ("strings_chat", "")], ["id", "source"]
    )
    counts.keep("a.jsonl", 2, [("strings_chat", "")], ["id"])
    return counts.build(np.array([[3, 10, 6], [5, 20, 6]]))


def test_the_report_counts_each_reason_and_names_its_first_records():
    lines = example().text().splitlines()
    assert lines[0] == "data: 8 records read, 2 kept, 6 dropped"
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "1 not valid JSON a.jsonl:17 (Expecting value)",
        "5 prompt too long b.jsonl:20 (9 tokens)",
        "b.jsonl:21 (9 tokens)",
        "b.jsonl:22 (9 tokens)",
        "and 2 more",
        "notes on kept records:",
        "1 completion truncated a.jsonl:1",
        "1 text left out by the chat template a.jsonl:1 (tools)",
        "2 strings put into the chat template data.strings: auto, chat or raw",
        "fields not used: id (2), source (1)",
        "prompt tokens: mean 4, median 4, max 5",
        "chosen tokens: mean 15, median 15, max 20",
        "rejected tokens: mean 6, median 6, max 6",
        "warning: chosen is 9 tokens longer than rejected on average (86% of the mean completion); "
        "the policy may learn the length",
    ]


def test_a_length_gap_of_up_to_a_fifth_gives_no_warning():
    counts = DataReportBuilder()
    counts.keep("a.jsonl", 1)
    report = counts.build(np.array([[3, 110, 90]]))
    assert "warning" not in report.text()
    assert "warning: rejected is 21" in counts.build(np.array([[3, 89, 110]])).text()


def test_the_report_round_trips_through_json():
    report = example()
    assert DataReport(**json.loads(json.dumps(asdict(report)))) == report


def test_renamed_sources_are_reported_by_their_new_names():
    assert "z/a.jsonl:17" in example().renamed({"a.jsonl": "z/a.jsonl"}).text()


def test_strict_rejects_dropped_records_and_names_them():
    example().check(strict=False)
    with pytest.raises(ValueError, match=r"data\.strict is true[^$]*a\.jsonl:17"):
        example().check(strict=True)


def test_notes_alone_pass_strict():
    counts = DataReportBuilder()
    counts.keep("a.jsonl", 1, [("completion_cut", "")])
    counts.build(np.ones((1, 3))).check(strict=True)


def test_a_data_set_without_usable_records_is_rejected():
    counts = DataReportBuilder()
    counts.drop(Problem("tie", "a.jsonl", 1, ""))
    with pytest.raises(ValueError, match="no record can be used\ndata: 1 records read, 0 kept, 1 dropped\n"):
        counts.build(np.empty((0, 3))).check(strict=False)


def test_a_record_counts_once_however_many_pairs_it_becomes_and_every_pair_that_is_left_out():
    counts = DataReportBuilder()
    counts.keep("f", 1, [("completion_cut", ""), ("left_out", "a"), ("left_out", "b")])
    counts.keep("f", 1, [("completion_cut", "")])
    counts.drop(Problem("identical", "f", 2, ""))
    counts.keep("f", 3, [("completion_cut", "")])
    report = counts.build(np.ones((3, 3), np.int64))
    assert (report.read, report.kept, report.examples) == (3, 2, 3)
    assert {reason: tally.count for reason, tally in report.notes.items()} == {"completion_cut": 2, "left_out": 2}
    assert "3 records read, 2 kept as 3 pairs or completions, 1 dropped" in report.text()
