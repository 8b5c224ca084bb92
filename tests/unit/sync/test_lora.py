"""Adapters alone: what is sent, and which weights an engine merges and loads."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_ray.sync.base import EngineGroup
from dpo_ray.sync.lora import AdapterMessage, LoraSync, merged_weights
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


def test_adapters_travel_in_float32_with_the_dtype_of_the_weights_that_they_change():
    engines, sync, sent = Memory(), LoraSync(dtype="bfloat16"), adapters("attn.q")
    sync.connect(engines)
    sync.publish(sent.items(), version=1, probe=Probe((), (), 0.0))
    (message,) = engines.messages
    assert message.dtype == "bfloat16"
    received = {tensor.name: tensor.to_tensor() for tensor in message.adapters}
    assert all(torch.equal(received[name], tensor) for name, tensor in sent.items())
    assert {tensor.dtype for tensor in received.values()} == {torch.float32}
