"""The real model on real pairs, step by step as in TRL, on one worker and on two."""

import json
from pathlib import Path

import pytest

from tests.oracles.test_trl import BETA, assert_same_steps, our_steps
from tests.oracles.trl_run import trl_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PAIRS = Path(__file__).parents[2] / "jobs/data/demo_pairs.jsonl"
LR = 1e-5


def test_every_step_on_real_pairs_is_that_of_trls_trainer(smollm2: Path, tmp_path: Path) -> None:
    lines = PAIRS.read_text().splitlines()[:16]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n")
    records = [json.loads(line) for line in lines]
    theirs = trl_steps(
        smollm2, records, folder=tmp_path / "trl", pairs_per_step=4, pairs_per_micro_batch=1, lr=LR, beta=BETA
    )
    alone = our_steps(1, tmp_path, smollm2, file, {}, lr=LR, tokens_per_micro_batch=1024)
    together = our_steps(2, tmp_path, smollm2, file, {}, lr=LR, tokens_per_micro_batch=1024)
    assert_same_steps(alone, theirs)
    assert_same_steps(together, theirs)
    assert [line["loss"] for line in alone] == pytest.approx([line["loss"] for line in together], abs=1e-4)
