"""The judge ``reward_model`` against transformers by hand: real classifiers with random weights."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from dpo_ray.config import Component
from dpo_ray.rollout.judges import bind_judge
from dpo_ray.rollout.judges.reward_model import batches_by_tokens
from dpo_ray.types import Completion, CompletionGroup, Judgement, Prompt

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
BOS, END, PAD = 256, 258, 259
FRAME = 1 + len("user\n") + 2 + len("assistant\n") + 2
"""Tokens of a conversation of two turns beside their contents: one per byte, and special tokens."""
TEXTS = ("yes", "a much longer completion, " * 4, "", "no", "certainly not")


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """Bytes and four special tokens; it adds <s> to text, as the template does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>", "<|pad|>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def save_classifier(folder: Path, family: str = "llama", template: str | None = TEMPLATE, **changes: Any) -> Path:
    """A sequence classifier with two layers, whose logits vary by some tenths."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "num_labels": 1,
    }
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**(settings | changes))
    {"llama": LlamaForSequenceClassification, "qwen2": Qwen2ForSequenceClassification}[family](config).save_pretrained(
        folder
    )
    save_tokenizer(folder, template)
    return folder


def build(folder: Path, **args: Any) -> Any:
    return bind_judge(Component(use="reward_model", args={"model": str(folder), **args}))()


def score_by_hand(folder: Path, messages: Sequence[Any], text: str) -> float:
    """One conversation at a time, without padding."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    conversation = [*messages, {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        return model(ids).logits.item()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("rm") / "llama")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("pad", [PAD, END, None], ids=["pad", "pad-is-end-of-turn", "no-pad"])
def test_scores_are_those_of_transformers_for_one_conversation_at_a_time_without_padding(group, tmp_path, family, pad):
    """Without a padding token, transformers reads the last token: the end of turn, which is no padding here either."""
    folder = save_classifier(tmp_path, family, pad_token_id=pad)
    asked = group(*TEXTS)
    (judgement,) = build(folder)([asked])
    expected = [score_by_hand(folder, asked.prompt.messages, text) for text in TEXTS]
    assert judgement.scores == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05, "the model tells the texts apart"
    assert judgement.totals["too_long"] == 0


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 100_000], ids=["one-by-one", "some", "all"])
def test_scores_do_not_depend_on_the_batches(group, classifier, tokens_per_batch):
    groups = [group(*TEXTS[:3], index=1), group(*TEXTS[3:], index=22)]
    whole = build(classifier)(groups)
    split = build(classifier, tokens_per_batch=tokens_per_batch)(groups)
    for one, other in zip(whole, split, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
    assert [len(judgement.scores) for judgement in split] == [3, 2]


def test_a_template_that_begins_with_the_bos_token_gets_one_though_the_tokenizer_would_add_another(group, classifier):
    judge = build(classifier)
    asked = group("yes")
    ids = judge._chat.token_ids(asked.prompt, "yes")
    assert ids.count(BOS) == 1
    assert judge._chat.tokenizer(judge._chat.text(asked.prompt, "yes"))["input_ids"][:2] == [BOS, BOS]
    assert len(ids) == FRAME + len("question 0") + len("yes")
    assert judge([asked])[0].totals["tokens"] == len(ids)


def test_equal_completions_get_equal_scores(group, classifier):
    (judgement,) = build(classifier)([group("same", "other " * 30, "same")])
    assert judgement.scores[0] == judgement.scores[2] != judgement.scores[1]


def test_a_conversation_over_the_limit_has_no_score_and_is_counted_and_the_others_keep_theirs(group, classifier):
    limit = FRAME + len("question 0") + 10
    (judgement,) = build(classifier, max_tokens=limit)([group("x" * 10, "x" * 11)])
    (unlimited,) = build(classifier)([group("x" * 10, "x" * 11)])
    assert judgement.scores[0] == pytest.approx(unlimited.scores[0], abs=1e-5)
    assert math.isnan(judgement.scores[1])
    assert judgement.totals == {"too_long": 1, "tokens": limit}


def test_the_limit_is_the_models_positions_unless_it_is_set_lower(group, classifier):
    (judgement,) = build(classifier)([group("x" * 600, "x")])
    assert math.isnan(judgement.scores[0]), "there are 512 positions"
    with pytest.raises(ValueError, match=r"max_tokens is 513; the model has 512 positions"):
        build(classifier, max_tokens=513)


def test_all_completions_of_a_group_may_be_too_long(group, classifier):
    judgement: Judgement
    (judgement,) = build(classifier, max_tokens=5)([group("a", "b")])
    assert all(map(math.isnan, judgement.scores))
    assert judgement.totals == {"too_long": 2, "tokens": 0}


def test_a_completion_that_continues_an_assistant_turn_is_scored_as_that_turn(group, classifier):
    question = {"role": "user", "content": "question 0"}
    begun = Prompt(0, (question, {"role": "assistant", "content": "ye"}), (1,))
    judge = build(classifier)
    (continued,) = judge([CompletionGroup(begun, (Completion("s", (1,), True),), 0)])
    (whole,) = judge([group("yes")])
    assert continued.scores == whole.scores


def test_the_dtype_of_the_weights_is_the_checkpoints_unless_it_is_set(tmp_path):
    folder = save_classifier(tmp_path)
    LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert build(folder)._model.dtype == torch.bfloat16
    assert build(folder, dtype="float32")._model.dtype == torch.float32


def test_batches_hold_rows_of_similar_length_and_at_most_the_given_tokens_with_padding():
    rows = {tuple([n] * n) for n in (2, 9, 3, 8, 20)}
    assert [[len(row) for row in batch] for batch in batches_by_tokens(rows, 18)] == [[20], [9, 8], [3, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 2}, r"has num_labels 2; a reward model is .* num_labels 1"),
        ({"template": None}, "has no chat template"),
        ({"template": "{% if %}"}, "chat template of .* is not valid"),
    ],
)
def test_a_model_that_is_no_reward_model_is_rejected_when_the_judge_is_built(tmp_path, changes, message):
    folder = save_classifier(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"judge 'reward_model'.*{message}"):
        build(folder)


def test_a_language_model_is_rejected_because_its_head_would_be_random(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(**json.loads((save_classifier(tmp_path) / "config.json").read_text()))
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no score\.weight, and its scores would be random"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "online.judge.args.model: is required"),
        ({"model": ""}, "model: found ''; it must be a text that is not empty"),
        ({"model": "a/b", "dtype": "int4"}, "dtype: found 'int4'; input should be 'auto', 'float32'"),
        (
            {"model": "a/b", "tokens_per_batch": 0},
            "tokens_per_batch: found 0; input should be greater than or equal to 1",
        ),
        ({"model": "a/b", "max_tokens": 1.5}, r"online\.judge\.args\.max_tokens: found 1\.5"),
        (
            {"model": "a/b", "trust_remote_code": "yes"},
            "trust_remote_code: found 'yes'; input should be a valid boolean",
        ),
        ({"model": "a/b", "revision": 3}, "revision: found 3"),
        ({"model": "a/b", "device": "cpu"}, "device: no such argument; accepted are model, dtype"),
    ],
)
def test_wrong_arguments_are_rejected_before_the_judge_is_built(args, message):
    with pytest.raises(ValueError, match=message):
        bind_judge(Component(use="reward_model", args=args))


def test_a_directory_without_a_model_is_rejected_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"configuration of .* cannot be loaded"):
        build(tmp_path)
