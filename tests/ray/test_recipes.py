"""Each recipe as a command, on the tiny model, with two small rounds; reward server and endpoint are real servers."""

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.ray.commands import ROOT, Commands, lines
from tests.unit.rollout.chat_server import serving
from tests.unit.rollout.reward_server import serve
from tests.unit.rollout.test_llm_judge import responses
from tests.unit.rollout.test_reward_model import save_classifier

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KEY = "secret-of-the-reward-server"
PROMPTS = 8


def command(recipe: str, folder: Path, model: Path, **settings: Any) -> list[str | Path]:
    """Arguments of a run of two rounds of eight prompts."""
    small = {
        "run.dir": folder,
        "model.path": model,
        "cluster.train_workers": 1,
        "online.rounds": 2,
        "online.prompts_per_round": PROMPTS,
        "online.sampling.max_tokens": 12,
        "online.engine.kv_cache_gib": 0.1,
        "optim.pairs_per_step": PROMPTS,
        **settings,
    }
    overrides = [
        f"{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in small.items()
    ]
    return [ROOT / f"jobs/recipes/{recipe}.yaml", *overrides]


def run(commands: Commands, recipe: str, folder: Path, model: Path, **settings: Any) -> Path:
    """Run to the end; returns the run directory."""
    done = commands.run("online", *command(recipe, folder, model, **settings))
    assert done.returncode == 0, done.stderr[-3000:]
    assert KEY not in done.stdout + done.stderr
    assert not commands.left_over()
    return folder / recipe


def rounds_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that end a round."""
    return [line for line in lines(run / "metrics.jsonl") if "round" in line]


def groups_of(run: Path, index: int) -> list[dict[str, Any]]:
    """The lines of a round's pairs.jsonl."""
    return lines(run / f"rounds/{index:06d}/pairs.jsonl")


def test_online_dpo_by_an_endpoint_that_prefers_longer_answers(joining: Commands, tmp_path: Path, tiny_model: Path):
    def longer(request: Mapping[str, Any]) -> str:
        # Equally long ones by their text: a tie is no agreement of both orders.
        first, second = ((len(text), text) for text in responses(request))
        return json.dumps({"winner": "A" if first > second else "B"})

    with serving(longer) as server:
        args = {"base_url": server.url, "model": "judge", "mode": "pairwise"}
        done = run(joining, "online_dpo", tmp_path, tiny_model, **{"online.judge.args": args})
        assert len(server.received) >= 2 * 2 * PROMPTS, "both orders of each comparison"
    assert [line["judge/swap_agreement"] for line in rounds_of(done)] == [1.0, 1.0]
    pairs = [(group["candidates"], pair) for i in (0, 1) for group in groups_of(done, i) for pair in group["pairs"]]
    assert pairs
    for candidates, pair in pairs:
        assert len(candidates[pair["chosen"]]["text"]) >= len(candidates[pair["rejected"]]["text"])


def test_a_run_killed_while_an_endpoint_judges_asks_nothing_twice_that_was_answered(
    starting: Commands, tmp_path: Path, tiny_model: Path
):
    """Each round has 16 requests; every process is killed when ten are answered and the others wait."""
    gate = threading.Event()

    def hold_after_ten(request: Mapping[str, Any]) -> str:
        if len(server.received) > 10:
            gate.wait(60)
        return json.dumps({"winner": "A"})

    starting.environment["JUDGE_KEY"] = KEY
    with serving(hold_after_ten) as server:
        args = {"base_url": server.url, "model": "judge", "mode": "pairwise", "api_key_env": "JUDGE_KEY"}
        settings = {"online.judge.args": args}

        def ten_are_answered() -> bool:
            if len(server.answered) < 10 or len(server.received) == 10:
                return False
            time.sleep(1.0)  # until the judge has written what it received
            return True

        starting.kill_when("online", *command("online_dpo", tmp_path, tiny_model, **settings), ready=ten_are_answered)
        assert not starting.left_over()
        received = len(server.received)
        before = {json.dumps(request) for request in server.answered}
        assert len(before) == 10
        gate.set()
        done = run(starting, "online_dpo", tmp_path, tiny_model, **settings)
        later = server.received[received:]
        assert not before & {json.dumps(request) for request in later}
        assert len(later) <= 2 * 2 * PROMPTS - 4, "ten answers are both orders of two groups at least"
        assert server.keys == {f"Bearer {KEY}"}
    assert [len(groups_of(done, index)) for index in (0, 1)] == [PROMPTS, PROMPTS]
    assert not [path for path in done.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_iterative_dpo_by_a_reward_model(joining: Commands, tmp_path: Path, tiny_model: Path):
    reward = save_classifier(tmp_path / "reward")
    settings = {"online.judge.args": {"model": str(reward)}, "online.candidates": 3, "online.kl_samples": 2}
    done = run(joining, "iterative_dpo", tmp_path, tiny_model, **settings)
    ended = rounds_of(done)
    assert all(line["judge/chosen_score"] > line["judge/rejected_score"] for line in ended)
    assert all(line["judge/best_score"] >= line["judge/mean_score"] for line in ended)


def test_a_reward_server_scores_rounds_and_its_key_is_in_no_file(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def rewards(number: int, request: Any) -> tuple[int, Any]:
        if number % 10 in (1, 4, 7):
            return 503, "busy"
        return 200, {"rewards": [len(query) / 100 for query in request["query"]]}

    monkeypatch.setenv("REWARD_KEY", KEY)
    with serve(rewards) as server:
        args = {"url": f"{server.url}/get_reward", "format": "openrlhf", "api_key_env": "REWARD_KEY"}
        settings = {"online.judge.args": args, "online.candidates": 3, "online.kl_samples": 2}
        done = run(Commands(), "reward_server", tmp_path, tiny_model, **settings)
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert sum(line["judge/retries"] for line in rounds_of(done)) > 0
    assert not [group for index in (0, 1) for group in groups_of(done, index) if group["error"]]
    assert not [path for path in done.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_self_play_chooses_the_answers_of_the_dataset(joining: Commands, tmp_path: Path, tiny_model: Path):
    done = run(joining, "spin", tmp_path, tiny_model, **{"online.kl_samples": 2})
    for index in (0, 1):
        for group in groups_of(done, index):
            assert group["candidates"][-1]["text"] == str(group["fields"]["answer"])
            assert all(pair["chosen"] == len(group["candidates"]) - 1 for pair in group["pairs"])
    assert [len(groups_of(done, index)) for index in (0, 1)] == [PROMPTS, PROMPTS]
    assert {path.name for path in done.glob("evaluations/*.jsonl")} >= {"000000.jsonl", "000002.jsonl"}


def test_a_policy_that_cannot_judge_gives_no_scores_which_is_counted(
    joining: Commands, tmp_path: Path, tiny_model: Path
):
    settings = {"online.candidates": 2, "data.max_prompt_tokens": 128, "online.engine.max_model_len": 2048}
    done = run(joining, "self_rewarding", tmp_path, tiny_model, **settings)
    for index in (0, 1):
        assert len(groups_of(done, index)) == PROMPTS
        assert not [group for group in groups_of(done, index) if group["error"]]
    for line in rounds_of(done):
        assert line["rollout/kept"] == 0
        assert line["rollout/dropped_bad_score"] > 0
        assert sum(value for name, value in line.items() if name.startswith("rollout/dropped_")) == PROMPTS
        # Each question is asked once more for its verdict alone.
        assert line["judge/parse_failures"] >= 2 * line["judge/unparsed"] > 0


def test_the_implicit_judge_ranks_completions_once_fixed_pairs_have_been_trained_on(
    joining: Commands, tmp_path: Path, tiny_model: Path
):
    settings = {"online.candidates": 2, "optim.lr": 1e-3, "online.kl_samples": 2, "reference.cache_dir": tmp_path / "c"}
    # Without held-out prompts the run has no judge process at all.
    settings |= {"online.eval_prompts": [], "online.eval_judge": None}
    done = run(joining, "dice", tmp_path, tiny_model, **settings)
    first, second = rounds_of(done)
    assert first["rollout/added_pairs"] == second["rollout/added_pairs"] == PROMPTS
    assert all(score is not None for group in groups_of(done, 1) for score in group["scores"])
    assert second["rollout/new_pairs"] > 0
    assert second["judge/chosen_score"] > second["judge/rejected_score"]


def test_sums_are_compared_with_the_answers_of_the_records(joining: Commands, tmp_path: Path, tiny_model: Path):
    done = run(joining, "arithmetic", tmp_path, tiny_model, **{"online.candidates": 2, "online.kl_samples": 2})
    scores = {score for index in (0, 1) for group in groups_of(done, index) for score in group["scores"]}
    assert scores <= {0.0, 1.0}
    assert rounds_of(done)[0]["rollout/dropped_tie"] > 0, "a random model adds nothing right"
