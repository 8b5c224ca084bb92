"""Adapters alone: what is sent, and which weights an engine merges and loads."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_ray.config.schema import LoraConfig
from dpo_ray.model.export import exact_sum
from dpo_ray.sync.base import EngineGroup
from dpo_ray.sync.lora import AdapterMessage, BaseWeights, LoraSync, changed_modules, merged_weights
from dpo_ray.types import Probe

LAYERS = ("embed", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.up")
STORED = [(f"{name}.weight", torch.full((2, 3), float(i))) for i, name in enumerate(LAYERS)]
STORED.insert(2, ("attn.q.bias", torch.zeros(2)))
FUSED = [("q", "k", "v"), ("gate", "up")]


def adapters(*names: str) -> dict[str, Tensor]:
    """A of (1, 3) ones, B of (2, 1) threes and scale 0.5: each element of the weight increases by 1.5."""
    parts = {"lora_A": torch.ones(1, 3), "lora_B": torch.full((2, 1), 3.0), "lora_scale": torch.tensor(0.5)}
    return {f"{name}.weight.{part}": tensor for name in names for part, tensor in parts.items()}


def merge(changes: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(merged_weights(STORED, changes, FUSED, dtype=dtype, device=torch.device("cpu")))


def test_the_weight_of_an_adapter_is_merged_and_layers_that_none_changes_are_left_out():
    (name, weight), *others = merge(adapters("attn.o")).items()
    assert name == "attn.o.weight"
    assert weight.tolist() == [[5.5] * 3] * 2, "4 + 0.5 * 3 * 1"
    assert not others


def test_layers_that_an_engine_fuses_with_a_changed_one_are_loaded_too_and_so_is_its_bias():
    merged = merge(adapters("attn.q", "mlp.up"))
    assert list(merged) == ["attn.q.weight", "attn.q.bias", "attn.k.weight", "attn.v.weight", "mlp.up.weight"]
    assert [merged[f"attn.{name}.weight"][0, 0].item() for name in "qkv"] == [2.5, 2.0, 3.0]


def test_weights_are_rounded_once_after_merging_to_the_dtype_of_the_trainer():
    changes = adapters("attn.q") | {"attn.q.weight.lora_scale": torch.tensor(2**-9)}  # 1 + 3/512, in steps of 1/128
    merged = merge(changes, torch.bfloat16)["attn.q.weight"]
    assert merged.dtype == torch.bfloat16
    assert merged[0, 0].item() == 1 + 1 / 128


def test_the_weights_of_changed_modules_are_read_from_the_checkpoint_once(tmp_path: Path):
    save_file(dict(STORED), tmp_path / "model.safetensors")
    reads = []

    def read() -> Iterator[tuple[str, Tensor]]:
        reads.append(1)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    base = BaseWeights(read)
    for size in (1.0, 2.0, 0.0):  # each push merges into the weights on disk
        changes = adapters("attn.q") | {"attn.q.weight.lora_scale": torch.tensor(size)}
        weights = base.of(changed_modules(changes, FUSED))
        assert {name for name, _ in weights} == {
            f"attn.{name}" for name in ("q.weight", "q.bias", "k.weight", "v.weight")
        }
        merged = dict(merged_weights(weights, changes, FUSED, dtype=torch.float32, device=torch.device("cpu")))
        assert merged["attn.q.weight"].tolist() == [[1 + 3 * size] * 3] * 2
    assert len(reads) == 1
    assert [name for name, _ in base.of(changed_modules(adapters("attn.o"), FUSED))] == ["attn.o.weight"]
    assert len(reads) == 2


def test_incomplete_adapters_and_adapters_of_an_unknown_weight_are_rejected():
    incomplete = adapters("attn.q")
    del incomplete["attn.q.weight.lora_B"]
    with pytest.raises(ValueError, match=r"adapters of 1 weights are incomplete, first attn\.q\.weight"):
        merge(incomplete)
    with pytest.raises(ValueError, match=r"no weights for 1 adapters, first attn\.z\.weight"):
        merge(adapters("attn.z", "attn.q"))


class Memory(EngineGroup):
    def __init__(self) -> None:
        self.messages: list[AdapterMessage] = []

    def begin_update(self, version: int, *, collective: bool) -> list[str]:
        assert not collective
        return []

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        raise NotImplementedError

    def load(self, message: AdapterMessage) -> None:
        self.messages.append(message)

    def end_update(self, digest: str, probe: Probe) -> None: ...


def received(sent: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The adapters of all messages, which name the dtype of the weights."""
    engines, sync = Memory(), LoraSync(dtype=dtype)
    sync.connect(engines)
    sync.publish(sent.items(), version=1, probe=Probe((), (), 0.0))
    assert {message.dtype for message in engines.messages} == {dtype}
    return {tensor.name: tensor.to_tensor() for message in engines.messages for tensor in message.adapters}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapters_travel_in_the_dtype_of_the_weights_that_they_change(dtype: str):
    sent = adapters("attn.q")
    arrived = received(sent, dtype)
    assert all(torch.equal(arrived[name].float(), tensor) for name, tensor in sent.items())
    assert {str(tensor.dtype) for tensor in arrived.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("scale", [1 / 3, 32 / 16**0.5, 1.0, 1e-3])
def test_the_scale_of_adapters_survives_the_rounding_of_its_parts(scale: float):
    parts = exact_sum(scale)
    assert torch.equal(parts.bfloat16().float(), parts)
    changes = {name: tensor.bfloat16() for name, tensor in adapters("attn.q").items()}
    merged = merge(changes | {"attn.q.weight.lora_scale": parts.bfloat16()})["attn.q.weight"]
    assert merged[0, 0] == 1 + torch.tensor(scale) * 3


def test_a_push_of_the_default_adapters_has_under_5_percent_of_the_bytes_of_the_policy():
    """SmolLM2-135M: 30 layers, hidden size 576, three heads of keys and values, a tied embedding of 49,152 tokens."""
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    shapes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    weights = {f"{layer}.{name}.weight": shape for layer in range(30) for name, shape in shapes.items()}
    rank, sent = LoraConfig().rank, dict[str, Tensor]()
    for name, (rows, columns) in weights.items():
        sent |= {f"{name}.lora_A": torch.zeros(rank, columns), f"{name}.lora_B": torch.zeros(rows, rank)}
        sent[f"{name}.lora_scale"] = exact_sum(2.0)
    pushed = sum(tensor.nbytes for tensor in received(sent, "bfloat16").values())
    whole = 2 * (49_152 * 576 + 30 * 2 * 576 + 576 + sum(rows * columns for rows, columns in weights.values()))
    assert whole == pytest.approx(269e6, rel=1e-3)
    assert pushed / whole == pytest.approx(0.036, abs=0.001)
