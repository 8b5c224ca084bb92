"""A small tokenizer, trained on the spot, and files of records."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["user assistant system What is the color of the sky? The sky is blue. Grass is green.", "one two three four"]


@pytest.fixture(scope="session")
def trained_tokenizer() -> Any:
    """A byte-level BPE tokenizer of a few hundred tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")


@pytest.fixture
def tokenizer(trained_tokenizer: Any) -> Any:
    """The tokenizer with the ChatML template; a test may give it another one."""
    trained_tokenizer.chat_template = CHATML
    return trained_tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a JSONL file; a string or bytes stands for its line as it is."""

    def write_lines(records: Iterable[Any], name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return write_lines
