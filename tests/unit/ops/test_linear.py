"""bfloat16 linear layers on each path of products, against float64."""

import pytest
import torch
from torch import Tensor, nn

from dpo_ray.objective.precision import PATHS, ProductPath
from dpo_ray.ops.linear import BLOCK, use_products


def outputs(layer: nn.Linear, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, and gradients with respect to input, weight and bias if there is one."""
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(upstream)
    return [out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]  # type: ignore[list-item]


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_differ_from_float64_by_no_more_than_their_rounding(
    bias: bool, path: ProductPath
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, bias=bias).bfloat16()
    exact = nn.Linear(96, 160, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x, upstream = torch.randn(2, BLOCK - 300, 96).bfloat16(), torch.randn(2, BLOCK - 300, 160).bfloat16()
    expected = outputs(exact, x.double(), upstream.double())
    use_products(layer, path)
    for actual, right in zip(outputs(layer, x, upstream), expected, strict=True):
        assert actual.dtype == torch.bfloat16
        assert actual.shape == right.shape
        # bfloat16 has 8 bits: the relative rounding error is at most 2**-9, and smaller on average.
        assert error(actual, right) < 2**-9


@pytest.mark.parametrize("path", PATHS)
def test_a_frozen_layer_passes_gradients_on_and_has_none(path: ProductPath) -> None:
    layer = nn.Linear(8, 4).bfloat16().requires_grad_(False)
    use_products(layer, path)
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.float().sum(0).bfloat16().expand(3, 8), rtol=2**-7, atol=0)
    assert layer.weight.grad is None


def test_subclasses_of_linear_keep_their_own_product() -> None:
    class Own(nn.Linear):
        pass

    own = Own(4, 4)
    use_products(nn.Sequential(own), "rounded")
    assert "forward" not in vars(own)
