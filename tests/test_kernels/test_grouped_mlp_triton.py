"""The experts' Triton kernels, under Triton's interpreter where there is no GPU, against the plain loop in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

pytest.importorskip("triton")
from flash_experts.kernels.grouped_mlp_triton import ACTIVATIONS, grouped_mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs_of(
    tokens: int, experts: int, width: int = 40, hidden: int = 72, top_k: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Choices (T, K) and x, gates, up, up bias, down, down bias."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, width), (tokens, top_k), (experts, width, hidden), (experts, hidden)]
    shapes += [(experts, hidden, width), (experts, width)]
    floats = [torch.randn(shape, generator=generator).mul(0.3).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    choices_TK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.to(DEVICE)
    return choices_TK, floats


def loop(choices_TK: torch.Tensor, floats: list[torch.Tensor], activation: str) -> torch.Tensor:
    """Expert by expert in float64; a choice that is not an expert (dropped) adds nothing."""
    x_TD, gates_TK, up, up_bias, down, down_bias = (tensor.double() for tensor in floats)
    out_TD = torch.zeros_like(x_TD)
    for e in range(up.shape[0]):
        token, k = torch.where(choices_TK == e)
        hidden = ACT2FN[activation](x_TD[token] @ up[e] + up_bias[e])
        y = hidden @ down[e] + down_bias[e]
        out_TD = out_TD.index_add(0, token, y * gates_TK[token, k, None])
    return out_TD


def check(choices_TK: torch.Tensor, floats: list[torch.Tensor], activation: str = "gelu_new") -> None:
    ours = grouped_mlp(floats[0], choices_TK, *floats[1:], activation)
    plain = loop(choices_TK, floats, activation)
    torch.testing.assert_close(ours.double(), plain, atol=1e-5, rtol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(ours)
    mine, expected = (torch.autograd.grad(out, floats, weight.to(out.dtype)) for out in (ours, plain))
    for gradient, truth in zip(mine, expected, strict=True):
        torch.testing.assert_close(gradient, truth, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
def test_activations(activation: str) -> None:
    assert activation in ACTIVATIONS
    check(*inputs_of(12, 3, width=16, hidden=32), activation)


@pytest.mark.parametrize(("tokens", "experts"), [(0, 2), (1, 1), (1, 8), (33, 1), (33, 5), (70, 8)])
def test_any_number_of_tokens_and_experts(tokens: int, experts: int) -> None:
    check(*inputs_of(tokens, experts, top_k=min(2, experts)))


def test_all_tokens_to_one_expert_and_none_to_the_others() -> None:
    choices_TK, floats = inputs_of(50, 4, top_k=1)
    check(torch.full_like(choices_TK, 2), floats)
    out = grouped_mlp(floats[0], torch.full_like(choices_TK, 2), *floats[1:], "gelu_new")
    (dup,) = torch.autograd.grad(out.sum(), floats[2])
    assert dup[2].any() and not dup[[0, 1, 3]].any(), "an expert without tokens has a zero gradient"


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data(), tokens=st.integers(1, 40), experts=st.integers(1, 6))
def test_any_routing_with_dropped_choices(data: st.DataObject, tokens: int, experts: int) -> None:
    """Also the same expert twice, and choices that were dropped (expert number E)."""
    rows = data.draw(
        st.lists(st.lists(st.integers(0, experts), min_size=2, max_size=2), min_size=tokens, max_size=tokens)
    )
    _, floats = inputs_of(tokens, experts, width=16, hidden=32, top_k=1)
    floats[1] = torch.rand(tokens, 2, device=DEVICE).requires_grad_()
    check(torch.tensor(rows, device=DEVICE), floats)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    choices_TK, floats = inputs_of(40, 4, dtype=dtype)
    ours = grouped_mlp(floats[0], choices_TK, *floats[1:], "gelu_new")
    plain = loop(choices_TK, floats, "gelu_new")
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), plain, atol=0.03, rtol=0.03)
    mine, expected = (torch.autograd.grad(out.double().square().sum(), floats) for out in (ours, plain))
    for gradient, truth in zip(mine, expected, strict=True):
        assert (gradient - truth).norm() <= 0.02 * truth.norm() + 1e-3


def test_frozen_weights_get_no_gradient() -> None:
    choices_TK, floats = inputs_of(10, 2)
    for weight in floats[2:]:
        weight.requires_grad_(False)
    grouped_mlp(floats[0], choices_TK, *floats[1:], "gelu_new").sum().backward()
    assert floats[0].grad is not None and floats[1].grad is not None
    assert all(weight.grad is None for weight in floats[2:])


@pytest.mark.parametrize("trained", [1, 5], ids=["gates", "down bias"])
def test_what_is_frozen_changes_no_other_gradient(trained: int) -> None:
    """Also where the biases of the second matrices alone are trained."""
    choices_TK, floats = inputs_of(5, 2, width=16, hidden=32)
    out = grouped_mlp(floats[0], choices_TK, *floats[1:], "gelu_new")
    expected = torch.autograd.grad(out.sum(), floats[trained])
    for index, tensor in enumerate(floats):
        tensor.requires_grad_(index == trained)
    out = grouped_mlp(floats[0], choices_TK, *floats[1:], "gelu_new")
    assert torch.equal(torch.autograd.grad(out.sum(), floats[trained])[0], expected[0])


def test_without_gradients_nothing_is_kept() -> None:
    choices_TK, floats = inputs_of(10, 2)
    with torch.no_grad():
        out, hidden, *_ = torch.ops.flash_experts.grouped_mlp(floats[0], choices_TK, *floats[1:], 0, False)
    assert hidden.numel() == 0
    torch.testing.assert_close(out.double(), loop(choices_TK, floats, "gelu_new"), atol=1e-5, rtol=1e-5)


def test_the_operators_keep_pytorchs_rules_and_compile_without_a_break() -> None:
    choices_TK, floats = inputs_of(10, 2)
    arguments = (floats[0], choices_TK, *floats[1:], 0, True)
    torch.library.opcheck(torch.ops.flash_experts.grouped_mlp, arguments)

    def loss(x_TD: torch.Tensor) -> torch.Tensor:
        return grouped_mlp(x_TD * 2, choices_TK, *floats[1:], "gelu_new").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(floats[0]), floats[0])
    assert torch.equal(torch.autograd.grad(compiled(floats[0]), floats[0])[0], expected[0])


@pytest.mark.parametrize("capacity_factor", [None, 0.6])
def test_a_layer_of_a_model_uses_it_by_name(capacity_factor: float | None) -> None:
    from flash_experts import GPT2MoEConfig
    from flash_experts.models.moe_layer import MoELayer

    torch.manual_seed(0)
    config = GPT2MoEConfig(n_embd=32, n_head=2, num_experts=4, resid_pdrop=0.0, capacity_factor=capacity_factor)
    layer = MoELayer(config).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 12, 32, device=DEVICE, requires_grad=True)
    results = []
    for implementation in ("eager", "fe_experts_triton"):
        layer.experts.config._experts_implementation = implementation
        out = layer(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-4)


def test_an_activation_that_is_not_fused_is_rejected() -> None:
    from flash_experts import GPT2MoEConfig
    from flash_experts.models.moe_layer import MoELayer

    layer = MoELayer(GPT2MoEConfig(n_embd=32, n_head=2, activation_function="tanh")).to(DEVICE)
    layer.experts.config._experts_implementation = "fe_experts_triton"
    with pytest.raises(ValueError, match=r"fuses the activations .* use experts_implementation='fe_experts'"):
        layer(torch.zeros(1, 1, 32, device=DEVICE))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs them")
def test_without_a_gpu_or_the_interpreter_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_experts import GPT2MoEConfig
    from flash_experts.kernels import grouped_mlp_triton
    from flash_experts.models.moe_layer import MoELayer

    monkeypatch.setattr(grouped_mlp_triton, "INTERPRETED", False)
    layer = MoELayer(GPT2MoEConfig(n_embd=32, n_head=2))
    layer.experts.config._experts_implementation = "fe_experts_triton"
    with pytest.raises(ValueError, match=r"runs on CUDA, .* use experts_implementation='fe_experts'"):
        layer(torch.zeros(1, 1, 32))


def test_the_same_bits_every_time() -> None:
    choices_TK, floats = inputs_of(40, 3)
    runs = []
    for _ in range(2):
        out = grouped_mlp(floats[0], choices_TK, *floats[1:], "gelu_new")
        runs.append([out, *torch.autograd.grad(out.square().sum(), floats)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
