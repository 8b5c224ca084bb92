"""4-bit linear layers against plain torch with the weight that bitsandbytes dequantizes."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from dpo_ray.model.quantized import NF4Linear
from tests.conftest import gradient


def layer(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40, bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_equal_those_of_the_dequantized_weight(dtype: torch.dtype, bias: bool) -> None:
    linear = layer(dtype, bias)
    quantized = NF4Linear(linear)
    weight = dequantize_4bit(*quantize_4bit(linear.weight.detach(), blocksize=64, quant_type="nf4"))
    assert torch.equal(quantized.dequantize(quantized.weight), weight)
    x, same = (torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    x.requires_grad_()
    same.requires_grad_()
    expected = nn.functional.linear(same, weight, linear.bias)
    actual = quantized(x)
    assert torch.allclose(actual, expected, atol=1e-6 if dtype == torch.float32 else 1e-2)
    upstream = torch.randn(7, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected.backward(upstream)
    actual.backward(upstream)
    assert torch.allclose(gradient(x), gradient(same), atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert quantized.weight.grad is None


def test_a_weight_takes_four_and_a_half_bits_per_entry_with_a_small_error() -> None:
    linear = layer(torch.bfloat16)
    quantized = NF4Linear(linear)
    assert quantized.weight.nbytes == linear.weight.numel() * 4.5 / 8
    # NF4 is made for normal weights; uniform ones have a relative error of about a tenth.
    error = (
        quantized.dequantize(quantized.weight).float() - linear.weight.float()
    ).norm() / linear.weight.float().norm()
    assert 0.05 < error < 0.12


def test_a_layer_on_the_meta_device_has_the_shape_of_a_loaded_one() -> None:
    with torch.device("meta"):
        empty = nn.Linear(96, 40, dtype=torch.bfloat16)
    assert NF4Linear(empty).weight.shape == NF4Linear(layer(torch.bfloat16)).weight.shape


def test_a_weight_that_does_not_divide_into_blocks_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.quantize: a weight of 3 x 5 does not divide into blocks of 64"):
        NF4Linear(nn.Linear(5, 3))
