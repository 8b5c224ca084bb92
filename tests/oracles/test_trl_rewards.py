"""Reward functions of TRL: the same file under TRL's OnlineDPOTrainer and as a judge."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Component
from dpo_ray.config.schema import DataConfig
from dpo_ray.data.examples import load_prompts
from dpo_ray.data.tokenize import RecordTokenizer
from dpo_ray.data.tokenizer import load_tokenizer
from dpo_ray.rollout.judges import bind_judge, check_scores
from dpo_ray.types import Completion, CompletionGroup, Prompt

REWARD_FILE = '''
CALLS = []


def helpful(prompts, completions, completion_ids, answer, **columns):
    """Characters in common with the answer, per token; None for a hard question."""
    CALLS.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "answer": answer})
    CALLS[-1].update(columns)
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    shared = [len(set(text) & set(str(gold))) for text, gold in zip(texts, answer)]
    scores = [n / len([i for i in ids if i != 259]) for n, ids in zip(shared, completion_ids)]
    CALLS[-1]["scores"] = [None if level == "hard" else s for s, level in zip(scores, columns["level"])]
    return CALLS[-1]["scores"]
'''
QUESTIONS = ("Name the planets.", "Spell the alphabet.", "Count to ten.", "Which city has most letters?")
LEVELS = ("easy", "hard", "easy", "easy")
GOLD = "".join(map(chr, range(32, 127)))
PAD = 259
OF_TRL_ONLY, OF_JUDGES_ONLY = {"trainer_state"}, {"log_metric", "log_extra"}


def records(*, conversational: bool) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": question}] if conversational else question,
            "answer": GOLD[i:],
            "level": level,
            "facts": {"number": i},
        }
        for i, (question, level) in enumerate(zip(QUESTIONS, LEVELS, strict=True))
    ]


def run_trl(model: Path, rows: list[dict[str, Any]], function: Any, folder: Path) -> float:
    """One step of TRL's OnlineDPOTrainer; returns its mean score."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    arguments = OnlineDPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        max_new_tokens=24,
        temperature=1.0,
        missing_eos_penalty=None,
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        reward_funcs=function,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    (log,) = [line for line in trainer.state.log_history if "objective/scores" in line]
    return log["objective/scores"]


@pytest.mark.slow
@pytest.mark.parametrize("conversational", [True, False])
def test_a_reward_function_file_of_trl_gets_the_same_arguments_and_gives_the_same_scores_here(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversational: bool
) -> None:
    rows, name = records(conversational=conversational), f"my_rewards_{conversational}"
    (tmp_path / f"{name}.py").write_text(REWARD_FILE)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)

    mean = run_trl(tiny_model, rows, module.helpful, tmp_path / "trl")
    (theirs,) = module.CALLS
    scored = [score for score in theirs["scores"] if score is not None]
    assert len(scored) == 6, "two completions for each of three easy questions"
    assert mean == pytest.approx(sum(scored) / 8, abs=1e-4), "TRL trains on these scores, with 0 for None"

    tokenizer = RecordTokenizer(load_tokenizer(str(tiny_model)), DataConfig(max_prompt_tokens=256))
    prompts = load_prompts([str(tmp_path / "prompts.jsonl")], tokenizer, strict=True)[0]
    groups, places = groups_of(theirs, prompts)
    judge: Any = bind_judge(Component(use=f"{name}:helpful"))()
    judgements = check_scores(groups, judge(groups))
    ours = module.CALLS[1]

    scores = [score for judgement in judgements for score in judgement.scores]
    expected = [theirs["scores"][place] for place in places]
    assert [None if score != score else score for score in scores] == expected
    assert expected.count(None) == 2
    assert set(theirs) - OF_TRL_ONLY == set(ours) - OF_JUDGES_ONLY
    theirs["completion_ids"] = [without_padding(ids) for ids in theirs["completion_ids"]]
    for argument in ("prompts", "completions", "completion_ids", "answer", "level", "facts"):
        assert ours[argument] == [theirs[argument][place] for place in places], argument


def groups_of(call: dict[str, Any], prompts: list[Prompt]) -> tuple[list[CompletionGroup], list[int]]:
    """The completions of a call of TRL by prompt, and the place of each in the call."""
    groups, places = [], []
    for prompt in prompts:
        found = [i for i, answer in enumerate(call["answer"]) if answer == prompt.fields["answer"]]
        texts = [c if isinstance(c := call["completions"][i], str) else c[0]["content"] for i in found]
        ids = [tuple(without_padding(call["completion_ids"][i])) for i in found]
        completions = tuple(Completion(t, i, finished=True) for t, i in zip(texts, ids, strict=True))
        groups.append(CompletionGroup(prompt, completions, 0))
        places += found
    return groups, places


def without_padding(ids: list[int]) -> list[int]:
    return [token for token in ids if token != PAD]


def test_trls_own_rewards_are_judges_also_where_a_function_makes_them() -> None:
    texts = (r"\boxed{\frac{2}{4}}", r"\boxed{3}")
    prompt = Prompt(0, ({"role": "user", "content": "?"},), (1,), {"solution": r"$\frac{1}{2}$"})
    group = CompletionGroup(prompt, tuple(Completion(text, (5,) * 50, True) for text in texts), 0)

    def judge(name: str, **args: Any) -> tuple[float, ...]:
        (judgement,) = check_scores([group], bind_judge(Component(use=f"trl.rewards:{name}", args=args))()([group]))
        return judgement.scores

    assert judge("accuracy_reward") == (1.0, 0.0)
    assert judge("think_format_reward") == (0.0, 0.0)
    # The cosine schedule at half of its length: the middle of 0.5 and 1 if correct, of -0.5 and -1 if not.
    assert judge("get_cosine_scaled_reward", max_len=100) == pytest.approx((0.75, -0.75))
    # 49 pairs of tokens, one of them unique.
    assert judge("get_repetition_penalty_reward", ngram_size=2) == pytest.approx((-48 / 49, -48 / 49))
