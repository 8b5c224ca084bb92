"""What happens if a part of an online run dies or hangs at a certain moment: one table, each row on a real run.

In every row the run ends well, with each prompt once and no pair trained twice. Wrong answers of engines and judges are
in the tests of the fleet (weights that fail their proof) and of the collector (scores that are not numbers).
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ray.commands import Commands, lines, pick, write_yaml
from tests.ray.test_online_job import ended_rounds, tiny_rounds, token_sum
from tests.ray.test_random_kills import Disturbance, disturb, run_to_the_end

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

PROMPTS_PER_ROUND = 4
KILL, STOP = signal.SIGKILL, signal.SIGSTOP

TABLE: dict[str, tuple[tuple[str, int], ...]] = {
    "engine-0": (("generating", KILL), ("generating", STOP), ("pushing", KILL), ("pushing", STOP)),
    "judge-0": (("judging", KILL), ("judging", STOP), ("evaluating", KILL)),
    "collector": (("generating", KILL), ("judging", STOP), ("evaluating", KILL)),
    "fleet": (("generating", KILL), ("pushing", KILL), ("pushing", STOP), ("evaluating", STOP)),
    "worker-0": (
        ("training", KILL),
        ("saving", KILL),
        ("generating", STOP),
        ("pushing", KILL),
        ("evaluating", KILL),
    ),
    "worker-1": (("generating", KILL), ("training", KILL), ("training", STOP), ("pushing", KILL)),
    "driver": (
        ("generating", KILL),
        ("judging", KILL),
        ("training", KILL),
        ("saving", KILL),
        ("evaluating", KILL),
    ),
    "driver, pushing": (("pushing", KILL),),
}
"""Part, with a note where it has two rows, and the moments in which it gets a signal, one in each of the first rounds
of a run."""


def judge_slowly(groups: list[Any], folder: str) -> list[list[float]]:
    """A judge that takes a second, in which a file tells that it judges."""
    busy = Path(folder) / "judging"
    busy.touch()
    time.sleep(1.0)
    busy.unlink(missing_ok=True)
    return token_sum(groups)


def newest_round(run: Path) -> tuple[int, bool]:
    """The newest round, and whether it is complete."""
    folders = sorted((run / "rounds").glob("[0-9]*"))
    return (int(folders[-1].name), (folders[-1] / "manifest.json").exists()) if folders else (-1, True)


def unsaved(run: Path) -> bool:
    """True from the first file of a checkpoint until it is complete."""
    begun, complete = (
        {path.parent.name for path in run.glob(f"checkpoints/[0-9]*/{name}")} for name in ("*", "c*.json")
    )
    return bool(begun - complete)


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "generating": lambda run: not newest_round(run)[1] and not (run / "judging").exists(),
    "judging": lambda run: not newest_round(run)[1] and (run / "judging").exists(),
    "training": lambda run: "round" not in (lines(run / "metrics.jsonl") or [{"round": 0}])[-1],
    "saving": unsaved,
    "pushing": lambda run: newest_round(run)[1] and len(ended_rounds(run)) == newest_round(run)[0] + 1,
    "evaluating": lambda run: (
        bool(ended_rounds(run)) and not (run / f"evaluations/{len(ended_rounds(run)):06d}.jsonl").exists()
    ),
}
"""How the files of a run tell what it does."""


def run_through(commands: Commands, file: Path, run: Path, row: str) -> list[str]:
    """Run the command to its end, with a signal in each moment of a row; returns the moments that came."""
    part, remaining, sent = row.partition(",")[0], list(TABLE[row]), list[str]()

    def disturb_next(command: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):  # files that are being written
            due = remaining and len(ended_rounds(run)) >= len(sent) + 1 and MOMENTS[remaining[0][0]](run)
            if due and disturb(command, run, Disturbance(0, 0.0, part, remaining[0][1])):
                sent.append(remaining.pop(0)[0])

    run_to_the_end(commands, file, disturb_next)
    return sent


@pytest.mark.parametrize("row", TABLE)
def test_a_part_that_dies_or_hangs_at_any_moment_costs_no_prompt_and_no_step(
    joining: Commands, tmp_path: Path, tiny_model: Path, row: str
) -> None:
    # A moment of milliseconds may pass unseen in a round or two.
    rounds, folder = len(TABLE[row]) + 4, tmp_path / "runs/rounds"
    tree = tiny_rounds(tmp_path, tiny_model)
    tree["run"] |= {"name": "rounds", "export": False, "eval_every": 1}
    tree["cluster"] |= {"max_restarts": 10, "worker_timeout_s": 20}
    judge = {"use": "tests.ray.test_failure_table:judge_slowly", "args": {"folder": str(folder)}, "timeout_s": 5}
    tree["optim"] |= {"pairs_per_step": 1}
    tree["online"] |= {"rounds": rounds, "judge": judge, "engine_timeout_s": 10, "sync_timeout_s": 60}

    sent = run_through(joining, write_yaml(tmp_path / "run.yaml", tree), folder, row)
    assert sent == [moment for moment, _ in TABLE[row]]
    assert not joining.left_over()
    trained = 0
    for index in range(rounds):
        rows = lines(folder / f"rounds/{index:06d}/pairs.jsonl")
        assert len({row["prompt_index"] for row in rows}) == len(rows) == PROMPTS_PER_ROUND, "each prompt once"
        assert not [row["error"] for row in rows if row["error"]]
        trained += sum(len(row["pairs"]) for row in rows)
    steps = lines(folder / "metrics.jsonl")
    assert pick(steps, "step") == list(range(1, trained + 1)), "no pair is trained twice"
    assert pick([step for step in steps if "round" in step], "round") == list(range(rounds))
    assert len(list(folder.glob("evaluations/*.jsonl"))) == rounds + 1
