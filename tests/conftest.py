"""Small real models and data, built without downloads, and a marker for every test."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

WritePairs = Callable[[Sequence[tuple[str, str, str]]], Path]

TESTS = Path(__file__).parent
MARKERS = {"unit": "unit", "distributed": "distributed", "oracles": "distributed", "ray": "ray", "rollout_vllm": "vllm"}
"""Marker of every test in a folder of ``tests``."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure() -> None:
    """Compute on one thread, here and in subprocesses: the tensors are tiny, and idle threads spin on the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder; the tests of ``tests/ray`` come first, since they take longest."""
    items.sort(key=lambda item: not item.path.is_relative_to(TESTS / "ray"))
    for item in items:
        for folder, marker in MARKERS.items():
            if item.path.is_relative_to(TESTS / folder):
                item.add_marker(marker)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of a file in one process, which shares its fixtures."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: 256 bytes and three special tokens, nothing to train."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        pad_token="<|pad|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def save_tiny_model(folder: Path, *, seed: int = 0, tied: bool = True, **changes: Any) -> Path:
    """A two-layer Llama with grouped queries and a byte tokenizer, as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 258,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny model with tied embeddings."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def write_pairs(tmp_path: Path) -> WritePairs:
    """Write (prompt, chosen, rejected) texts as a JSONL file of message lists."""
    return lambda pairs: save_pairs(tmp_path / "pairs.jsonl", pairs)


def save_pairs(file: Path, pairs: Sequence[tuple[str, str, str]]) -> Path:
    """Write (prompt, chosen, rejected) texts as message lists."""
    records = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in pairs
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def gradient(tensor: "Tensor") -> "Tensor":
    """The gradient of a tensor that has one."""
    assert tensor.grad is not None
    return tensor.grad


def ragged_texts(count: int) -> list[tuple[str, str, str]]:
    """``count`` different pairs of uneven lengths."""
    words = "the quick brown fox jumps over a lazy dog while rain falls on the old stone bridge by the river".split()  # noqa: SIM905
    pick = lambda i, n: " ".join(words[(i * 7 + k * 3) % len(words)] for k in range(n))  # noqa: E731
    return [(f"{i}: {pick(i, 2 + i % 9)}", pick(i + 1, 1 + i % 5), pick(i + 2, 2 + (3 * i) % 11)) for i in range(count)]
