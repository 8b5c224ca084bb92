"""Normalization on a CPU: the numbers of transformers' modules, gradients against float64."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from dpo_ray.ops.norm import use_fused_norms


def filled(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, len(norm.weight)))  # type: ignore[arg-type, operator]
    return norm


def results(norm: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, and gradients with respect to input and weight."""
    x = x.clone().requires_grad_()
    out = norm(x)
    return [out.detach(), *torch.autograd.grad(out, (x, *norm.parameters()), upstream)]


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("shape", [(1, 50, 64), (1, 7, 3, 64)])
def test_outputs_are_those_of_transformers_and_gradients_as_exact_as_their_rounding(
    kind: type, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    own, fused = (filled(kind(64, 1e-5).bfloat16()) for _ in range(2))
    use_fused_norms(fused)
    assert "forward" in vars(fused)
    (parameter,) = own.parameters()
    weight = parameter.detach().double().requires_grad_()
    exact_x = x.double().requires_grad_()
    out = weight * exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + 1e-5)
    exact = torch.autograd.grad(out, (exact_x, weight), upstream.double())
    value, *gradients = results(fused, x, upstream)
    assert torch.equal(value, own(x))
    assert max(error(a, e) for a, e in zip(gradients, exact, strict=True)) < 2**-9
    others = results(own, x, upstream)[1:]
    assert all(error(a, e) <= error(b, e) for a, b, e in zip(gradients, others, exact, strict=True))


def test_modules_that_add_one_to_their_weight_keep_their_own_forward_pass() -> None:
    norm = GemmaRMSNorm(64, 1e-6).bfloat16()
    use_fused_norms(norm)
    assert "forward" not in vars(norm)


def test_models_on_the_meta_device_are_recognized_and_other_dtypes_computed_as_before() -> None:
    with torch.device("meta"):
        norm = LlamaRMSNorm(64, 1e-5)
    use_fused_norms(norm)
    assert "forward" in vars(norm)
    norm.to_empty(device="cpu")
    filled(norm)
    x = torch.randn(3, 64)
    assert torch.equal(norm(x), filled(LlamaRMSNorm(64, 1e-5))(x))
