"""Linear layers multiplied as float32, against float64 and against torch's own bfloat16 layer."""

import pytest
import torch
from torch import Tensor, nn

from dpo_ray.ops.linear import BLOCK, use_float32_products


def outputs(layer: nn.Linear, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The layer's result and its gradients by input, weight and, where it has one, bias."""
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(upstream)
    return [out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]  # type: ignore[list-item]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("bias", [False, True])
def test_results_and_gradients_are_as_near_to_float64_as_the_rounding_of_the_result(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, bias=bias).bfloat16()
    exact = nn.Linear(96, 160, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x, upstream = torch.randn(2, BLOCK - 300, 96).bfloat16(), torch.randn(2, BLOCK - 300, 160).bfloat16()
    wanted = outputs(exact, x.double(), upstream.double())
    use_float32_products(layer)
    for found, right in zip(outputs(layer, x, upstream), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        assert found.shape == right.shape
        # bfloat16 has 8 bits: rounding is off by at most 2**-9 of a number, and by less on average.
        assert error(found, right) < 2**-9


def test_a_frozen_layer_passes_gradients_on_and_gets_none() -> None:
    layer = nn.Linear(8, 4).bfloat16().requires_grad_(False)
    use_float32_products(layer)
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.float().sum(0).bfloat16().expand(3, 8), rtol=2**-7, atol=0)
    assert layer.weight.grad is None


def test_layers_with_products_of_their_own_keep_them() -> None:
    class Own(nn.Linear):
        pass

    own = Own(4, 4)
    use_float32_products(nn.Sequential(own))
    assert "forward" not in vars(own)
