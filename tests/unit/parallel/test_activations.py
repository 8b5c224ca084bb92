"""Checkpointing and offloading: losses and gradients stay equal; saved bytes and recomputed operations change."""

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ray.config.schema import ModelConfig
from dpo_ray.data.packing import build_row
from dpo_ray.model.load import build_model
from dpo_ray.model.scorer import Scorer, pair_losses
from dpo_ray.parallel import activations
from tests.conftest import gradient
from tests.unit.model.test_scorer import preference, ragged_pairs

LAYERS, LINEARS = 2, 7
PAIRS = ragged_pairs(6)
SEGMENTS = 2 * len(PAIRS)
MM, SILU = torch.ops.aten.mm.default, torch.ops.aten.silu.default
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def trained(model: Path, kind: Literal["none", "full", "selective"]) -> tuple[Scorer, Tensor, int, Counter[Any]]:
    """A scorer with gradients, its losses, the bytes saved for the backward pass, and the operations of that pass."""
    scorer = Scorer(build_model(ModelConfig(path=str(model)), with_weights=True))
    activations.apply_activation_checkpointing(scorer.layers, kind)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor._base, torch.nn.Parameter) and not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = pair_losses(scorer, build_row(PAIRS, "shared"), preference)
    with Operations() as operations:
        losses.total.backward()
    return scorer, losses.each, sum(saved.values()), operations.counts


def test_checkpointing_changes_no_gradient_and_recomputes_the_documented_operations(tiny_model: Path) -> None:
    plain, expected, everything, operations = trained(tiny_model, "none")
    full, full_losses, inputs, in_full = trained(tiny_model, "full")
    selective, selective_losses, _, in_selective = trained(tiny_model, "selective")
    assert torch.equal(full_losses, expected)
    assert torch.equal(selective_losses, expected)
    for name, parameter in plain.named_parameters():
        assert torch.equal(gradient(full.get_parameter(name)), gradient(parameter)), name
        assert torch.equal(gradient(selective.get_parameter(name)), gradient(parameter)), name
    assert (operations[ATTENTION], operations[SILU]) == (0, 0)
    # The last product of a layer is not recomputed: no gradient needs its result.
    assert in_full[MM] - operations[MM] == LAYERS * (LINEARS - 1)
    assert (in_full[ATTENTION], in_full[SILU]) == (LAYERS * SEGMENTS, LAYERS)
    assert in_selective[MM] == operations[MM]
    assert (in_selective[ATTENTION], in_selective[SILU]) == (0, LAYERS)
    assert inputs < everything / 4


def test_names_of_parameters_do_not_change(tiny_model: Path) -> None:
    plain = Scorer(build_model(ModelConfig(path=str(tiny_model)), with_weights=True))
    names = list(plain.state_dict())
    activations.apply_activation_checkpointing(plain.layers, "selective")
    assert list(plain.state_dict()) == names


def test_activations_are_offloaded_and_weights_are_not(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "MIN_OFFLOAD_BYTES", 1024)
    plain, expected, everything, _ = trained(tiny_model, "none")
    scorer = Scorer(build_model(ModelConfig(path=str(tiny_model)), with_weights=True))
    weights = {parameter.data_ptr() for parameter in scorer.parameters()}
    offloaded: list[Tensor] = []

    def offload(tensor: Tensor) -> Tensor:
        assert tensor.data_ptr() not in weights
        offloaded.append(tensor.clone())
        return offloaded[-1]

    decoder = scorer.model.get_decoder()
    decoder.forward = activations.functools.partial(
        activations._forward_with_offload, decoder.forward, offload, Tensor.clone
    )
    losses = pair_losses(scorer, build_row(PAIRS, "shared"), preference)
    losses.total.backward()
    assert torch.equal(losses.each, expected)
    for name, parameter in plain.named_parameters():
        assert torch.equal(gradient(scorer.get_parameter(name)), gradient(parameter)), name
    assert sum(tensor.nbytes for tensor in offloaded) > everything / 2


def test_offloading_does_not_change_a_model_on_a_cpu(tiny_model: Path) -> None:
    decoder = build_model(ModelConfig(path=str(tiny_model)), with_weights=True).get_decoder()
    activations.offload_activations(decoder, torch.device("cpu"))
    assert "forward" not in vars(decoder)
