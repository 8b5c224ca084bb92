from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config.schema import DataConfig
from dpo_ray.data.records import PairRecord, Problem, PromptRecord
from dpo_ray.data.tokenize import RecordTokenizer, TokenizedPair
from dpo_ray.data.tokenizer import ModelLimits, load_limits, load_tokenizer, tokenizer_digest
from dpo_ray.types import Messages

USER = {"role": "user", "content": "What is the color of the sky?"}


def answers(chosen: str, rejected: str) -> PairRecord:
    return PairRecord((USER,), answer_of(chosen), answer_of(rejected), "pairs.jsonl", 7)


def answer_of(text: str) -> Messages:
    return ({"role": "assistant", "content": text},)


def tokenized(record: PairRecord, tokenizer: Any, prompt: int | None = None, completion: int | None = None) -> Any:
    return record_tokenizer(tokenizer, max_prompt_tokens=prompt, max_completion_tokens=completion).pair(record)


def record_tokenizer(tokenizer: Any, **data: Any) -> RecordTokenizer:
    no_limits: dict[str, Any] = {"max_prompt_tokens": None, "max_completion_tokens": None}
    return RecordTokenizer(tokenizer, DataConfig.model_validate(no_limits | data))


def prompt_ids(tokenizer: Any, **data: Any) -> Any:
    return record_tokenizer(tokenizer, **data).prompt(PromptRecord((USER,), "prompts.jsonl", 1))


def reasons(result: TokenizedPair) -> list[str]:
    return [reason for reason, _ in result.notes]


# ----------------------------------------------------------------------------------------------------------- boundary


def test_completion_tokens_start_after_the_generation_prompt(tokenizer: Any):
    result = tokenized(answers("The sky is blue.", "Grass is green."), tokenizer)
    assert isinstance(result, TokenizedPair)
    assert result.notes == ()
    assert tokenizer.decode(result.pair.prompt) == (
        "<|im_start|>user\nWhat is the color of the sky?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(result.pair.chosen) == "The sky is blue.<|im_end|>\n"
    assert tokenizer.decode(result.pair.rejected) == "Grass is green.<|im_end|>\n"
    assert result.pair.chosen.count(tokenizer.eos_token_id) == 1


def test_the_prompt_of_a_pair_is_the_prompt_an_engine_is_given(tokenizer: Any):
    pair = tokenized(answers("The sky is blue.", "Grass is green."), tokenizer).pair
    assert pair.prompt == prompt_ids(tokenizer).token_ids


def test_no_end_of_turn_is_added_where_the_template_has_none(tokenizer: Any):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    result = tokenized(answers("blue", "green"), tokenizer)
    assert tokenizer.eos_token_id not in result.pair.chosen
    assert reasons(result) == ["no_eos"]


def test_an_end_of_turn_in_the_text_before_that_of_the_template_is_noted(tokenizer: Any):
    result = tokenized(answers("blue<|im_end|>", "green"), tokenizer)
    assert reasons(result) == ["double_eos", "special_in_text"]


def test_the_boundary_moves_back_where_the_template_renders_the_prompt_otherwise_alone(tokenizer: Any):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n{% endif", "assistant\n<think></think>{% endif"
    )
    result = tokenized(answers("The sky", "Grass"), tokenizer)
    assert reasons(result) == ["boundary_moved"]
    assert tokenizer.decode(result.pair.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(result.pair.chosen) == "The sky<|im_end|>\n"


def test_the_boundary_moves_back_where_tokens_merge_over_it(tokenizer: Any):
    record = PairRecord("The sky is bl", "ue.", "ack.", "pairs.jsonl", 1)
    result: Any = record_tokenizer(tokenizer, strings="raw").pair(record)
    assert reasons(result) == ["strings_raw", "boundary_moved"]
    whole = tokenizer("The sky is blue.<|im_end|>")["input_ids"]
    assert [*result.pair.prompt, *result.pair.chosen] == whole


def test_ids_are_split_as_trls_dpo_trainer_splits_them(tokenizer: Any):
    def encode(*turns: Any, **kwargs: Any) -> list[int]:
        return tokenizer.apply_chat_template(list(turns), tokenize=True, return_dict=True, **kwargs)["input_ids"]

    def shared(ids: list[int], other: list[int]) -> int:
        return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, other, strict=False))))

    record = answers("The sky is blue.", "Grass is green, and so is the sky.")
    prompt = encode(*record.prompt, add_generation_prompt=True)
    chosen, rejected = encode(*record.prompt, *record.chosen), encode(*record.prompt, *record.rejected)
    start = min(shared(prompt, chosen), shared(prompt, rejected))

    pair = tokenized(record, tokenizer).pair
    assert [*pair.prompt] == prompt[:start]
    assert [*pair.chosen] == chosen[start:]
    assert [*pair.rejected] == rejected[start:]


def test_text_ends_with_one_end_of_sequence_token(tokenizer: Any):
    record = PairRecord("sky?", " blue", " green<|im_end|>", "pairs.jsonl", 1)
    result: Any = record_tokenizer(tokenizer, strings="raw").pair(record)
    assert tokenizer.decode(result.pair.chosen) == " blue<|im_end|>"
    assert tokenizer.decode(result.pair.rejected) == " green<|im_end|>"
    assert reasons(result) == ["strings_raw"]


def test_text_that_ends_with_an_unknown_character_ends_with_the_end_of_sequence_token(tokenizer: Any):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "sky": 2, "?": 3, "blue": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    model = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    result: Any = record_tokenizer(model, strings="raw").pair(PairRecord("sky?", " blue \u2603", " sky", "f", 1))
    assert (result.pair.chosen, result.pair.rejected) == ((4, 0, 1), (2, 1))
    model.unk_token = "</s>"  # as in GPT-2
    same: Any = record_tokenizer(model, strings="raw").pair(PairRecord("sky?", " blue </s>", " sky", "f", 1))
    assert (same.pair.chosen, same.pair.rejected) == ((4, 1), (2, 1))


def test_text_that_the_tokenizer_has_no_token_for_is_named(tokenizer: Any):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<unk>", "</s>", "sky", "blue", ":", "user", "assistant"))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    model = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    raw: Any = record_tokenizer(model).pair(PairRecord("sky", " blue \u2603", " sky", "f", 1))
    assert raw.notes == (("strings_raw", ""), ("unknown_text", "chosen"))
    model.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} </s>{% endfor %}assistant :"
    record: Any = record_tokenizer(model).pair(answers("blue", "gr\u00fcn"))
    assert record.notes == (("unknown_text", "prompt[0].content, rejected[0].content"),)
    prompt: Any = record_tokenizer(model).prompt(PromptRecord("sky \u2603", "f", 1))
    assert prompt.notes == (("strings_chat", ""), ("unknown_text", "prompt[0].content"))
    tools = ({"name": "gr\u00fcn"},)
    model.chat_template = "{{ tools }} " + model.chat_template
    sky = (USER | {"content": "sky"},)
    in_tools = PairRecord(sky, answer_of("blue"), answer_of("sky"), "f", 1, tools=tools)
    with_tools: Any = record_tokenizer(model).pair(in_tools)
    assert with_tools.notes == (("unknown_text", "tools"),)
    # A tokenizer of bytes has tokens for all text.
    assert tokenized(answers("blue \u2603", "gr\u00fcn"), tokenizer).notes == ()


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_long_completion_loses_its_end_and_no_token_takes_its_place(tokenizer: Any):
    record = answers("one two three four five six seven", "blue")
    whole, cut = tokenized(record, tokenizer).pair, tokenized(record, tokenizer, completion=6)
    assert cut.pair.chosen == whole.chosen[:6]
    assert cut.pair.rejected == whole.rejected
    assert reasons(cut) == ["completion_cut"]
    assert cut.removed == (len(whole.chosen) - 6, 0)


def test_a_completion_at_the_limit_is_not_truncated(tokenizer: Any):
    record = answers("one two three", "blue")
    whole = tokenized(record, tokenizer).pair
    at_limit = tokenized(record, tokenizer, completion=max(len(whole.chosen), len(whole.rejected)))
    assert at_limit == TokenizedPair(whole)


def test_a_prompt_over_the_limit_is_dropped_and_one_at_it_is_kept(tokenizer: Any):
    record = answers("blue", "green")
    length = len(tokenized(record, tokenizer).pair.prompt)
    assert isinstance(tokenized(record, tokenizer, prompt=length), TokenizedPair)
    assert tokenized(record, tokenizer, prompt=length - 1) == Problem(
        "prompt_too_long", "pairs.jsonl", 7, f"{length} tokens; data.max_prompt_tokens is {length - 1}"
    )


def test_completions_equal_after_truncation_are_dropped(tokenizer: Any):
    record = answers("one two three four five", "one two three six")
    assert isinstance(tokenized(record, tokenizer), TokenizedPair)
    assert tokenized(record, tokenizer, completion=2).reason == "identical_after_truncation"


def test_completions_that_the_template_makes_equal_are_dropped(tokenizer: Any):
    tokenizer.chat_template = tokenizer.chat_template.replace("['content']", "['content'] | trim")
    assert tokenized(answers("blue", "blue "), tokenizer).reason == "identical"


def test_a_completion_that_the_template_leaves_out_is_dropped(tokenizer: Any):
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    assert tokenized(answers("blue", "green"), tokenizer).reason == "completion_emptied"


def test_a_prompt_that_shares_no_token_with_the_conversation_is_dropped(tokenizer: Any):
    tokenizer.chat_template = "{% if add_generation_prompt %}!{% endif %}{{ messages[-1]['content'] }}"
    assert tokenized(answers("blue", "green"), tokenizer).reason == "empty_prompt"


def test_a_conversation_is_dropped_with_the_error_its_template_raised(tokenizer: Any):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    problem = tokenized(answers("blue", "green"), tokenizer)
    assert (problem.reason, problem.detail) == ("template_refused", "the chat template raised: roles must alternate")
    assert prompt_ids(tokenizer) == Problem("template_refused", "prompts.jsonl", 1, problem.detail)


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_messages_without_a_chat_template_are_an_error_that_names_the_key(tokenizer: Any):
    tokenizer.chat_template = None
    for attempt in (lambda: tokenized(answers("a", "b"), tokenizer), lambda: prompt_ids(tokenizer)):
        with pytest.raises(ValueError, match=r"model\.chat_template: the data holds messages"):
            attempt()


def test_a_template_that_is_not_jinja_is_an_error_that_names_the_key(tokenizer: Any):
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ValueError, match=r"model\.chat_template: line 1"):
        tokenized(answers("a", "b"), tokenizer)


@pytest.mark.parametrize("path", ["/no/such/model", "./models/none", "a/b/c"])
def test_a_missing_model_directory_is_an_error_that_names_the_key(path: str):
    with pytest.raises(ValueError, match=rf"model\.path: {path}: no such directory"):
        load_tokenizer(path)


def test_a_directory_without_a_tokenizer_is_an_error_that_names_the_key(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.path: .*: the directory holds no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_model_that_the_hub_does_not_give_is_an_error_that_names_the_key(monkeypatch: pytest.MonkeyPatch):
    import transformers

    def from_pretrained(*_: Any, **__: Any) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match=r"model\.path: org/name: not loaded from the hub: OSError: no network$"):
        load_tokenizer("org/name")


def test_a_template_file_replaces_the_tokenizers_own(tokenizer: Any, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}!")
    loaded = load_tokenizer(str(tmp_path / "model"), str(tmp_path / "chat.jinja"))
    assert loaded.decode(list(prompt_ids(loaded).token_ids)) == "What is the color of the sky?!"
    assert load_tokenizer(str(tmp_path / "model")).chat_template == tokenizer.chat_template
    with pytest.raises(ValueError, match=r"model\.chat_template: .*none\.jinja: cannot be read: No such file"):
        load_tokenizer(str(tmp_path / "model"), str(tmp_path / "none.jinja"))


def test_tokens_without_an_embedding_are_dropped_where_the_ids_have_gaps():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"</s>": 0, "sky": 1, "?": 2, "blue": 90}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    gaps = RecordTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), DataConfig(), ModelLimits(vocabulary=90)
    )
    problem = gaps.pair(PairRecord("sky?", " sky", " blue", "f", 1))
    assert isinstance(problem, Problem)
    assert problem.detail == "rejected: token blue has id 90; the model of model.path has 90 embeddings"


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("name", "keys", "positions"),
    [
        ("LlamaConfig", {"max_position_embeddings": 2048}, 2048),
        ("LlamaConfig", {"max_position_embeddings": 1024, "rope_parameters": YARN}, 4096),
        ("LlamaConfig", {"max_position_embeddings": 4096, "rope_parameters": YARN}, 4096),
        ("LlamaConfig", {"max_position_embeddings": 512, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 1024),
        ("LlamaConfig", {"max_position_embeddings": 4096, "rope_parameters": {
            **YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        }}, 4096),
        ("Gemma3TextConfig", {"max_position_embeddings": 4096, "num_hidden_layers": 2, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }}, 4096),
        ("Gemma3Config", {"text_config": {"max_position_embeddings": 512, "vocab_size": 300}}, 512),
        ("GPT2Config", {"n_positions": 256}, 256),
        ("MptConfig", {"max_seq_len": 64}, 64),
        ("MambaConfig", {}, None),
    ],
)  # fmt: skip
def test_the_limits_of_a_model_come_from_its_configuration(
    name: str, keys: dict[str, Any], positions: int | None, tmp_path: Path
):
    import transformers

    config = getattr(transformers, name)(**({} if "text_config" in keys else {"vocab_size": 300}) | keys)
    config.save_pretrained(tmp_path)
    assert load_limits(str(tmp_path)) == ModelLimits(300, positions)


def test_a_model_without_a_configuration_has_no_limits(tmp_path: Path):
    assert load_limits(str(tmp_path)) == ModelLimits()


def test_the_tokenizer_digest_changes_only_with_the_token_ids(tokenizer: Any):
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.chat_template += " "
    assert tokenizer_digest(tokenizer) != digest
