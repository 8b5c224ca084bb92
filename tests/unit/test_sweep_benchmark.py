"""The figures of the sweep benchmark, without the sweep."""

import os
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.sweep import Cost, computed, cpu_times, measured, read_pairs, table

LOG = """reference: {cached} pairs cached, {new} computed in 1.0 s (abc)
held-out reference: {cached} pairs cached, 0 computed in 0.1 s (abc)
"""


def test_reference_passes_are_those_that_computed_something_over_all_trials(tmp_path: Path) -> None:
    for name, cached, new in (("a", 0, 24), ("b", 24, 0), ("c", 16, 8)):
        log = tmp_path / "trials" / name / "logs" / "worker-0.log"
        log.parent.mkdir(parents=True)
        log.write_text(LOG.format(cached=cached, new=new))
    assert computed(tmp_path) == (2, 32)


def test_the_table_has_the_ratio_and_the_idle_share() -> None:
    rows = table(Cost(100, 150, 1, 40), Cost(400, 400, 8, 320), trials=8, cores=2).splitlines()
    assert rows[2:] == [
        "| one sweep of 8 trials | 100 | 12.5 | 1 | 40 | 25% |",
        "| 8 separate runs | 400 | 50.0 | 8 | 320 | 50% |",
        "| ratio | 0.25 | | | | |",
    ]


def test_too_few_pairs_end_the_benchmark_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n" * 5)
    arguments = Namespace(pairs=tmp_path / "pairs.jsonl", train=3, held_out=2)
    assert len(read_pairs(arguments)) == 5
    arguments.train = 4
    with pytest.raises(SystemExit, match="has 5 pairs; --train and --held-out need 6"):
        read_pairs(arguments)


def test_a_command_that_fails_ends_the_benchmark_with_its_output() -> None:
    with pytest.raises(SystemExit, match=r"(?s)one failed with exit code 2:.*no_such_file\.yaml"):
        measured(["offline", "no_such_file.yaml"], "one", lambda: "", 60)


def test_the_cpu_time_of_this_process_grows_while_it_works() -> None:
    before = sum(cpu_times(os.getpid()).values())
    while sum(cpu_times(os.getpid()).values()) - before < 0.1:
        sum(range(10**6))
    assert cpu_times(2**30) == {}, "a process that has gone"
