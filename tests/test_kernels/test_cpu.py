"""The basis of the experts on a CPU: matmuls with weights, and freed memory that is kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from flash_experts import GPT2MoEConfig
from flash_experts.kernels import cpu, cpu_memory
from flash_experts.kernels.cpu import linear, linear_gelu_tanh
from flash_experts.models import moe_layer


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_linear_is_the_matmul(monkeypatch: pytest.MonkeyPatch, rows: int, with_bias: bool, onednn: bool) -> None:
    monkeypatch.setattr(cpu, "_ONEDNN", onednn)
    x_ND, weight_DF, bias_F = torch.randn(rows, 48), torch.randn(48, 80), torch.randn(80) if with_bias else None
    truth_NF = x_ND.double() @ weight_DF.double() + (0 if bias_F is None else bias_F.double())
    for weight in (weight_DF, weight_DF.T.contiguous().T):  # as GPT-2 stores it, and the view of the other layout
        out_NF = linear(x_ND, weight, bias_F)
        assert out_NF.shape == (rows, 80) and out_NF.dtype == torch.float32
        torch.testing.assert_close(out_NF.double(), truth_NF, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("onednn", [True, False])
def test_fused_gelu_is_gelu_of_the_matmul(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    monkeypatch.setattr(cpu, "_ONEDNN", onednn)
    x_ND, weight_DF, bias_F = torch.randn(7, 48), torch.randn(48, 80), torch.randn(80)
    truth_NF = F.gelu(x_ND.double() @ weight_DF.double() + bias_F.double(), approximate="tanh")
    torch.testing.assert_close(linear_gelu_tanh(x_ND, weight_DF, bias_F).double(), truth_NF, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("onednn", [True, False])
def test_linear_keeps_float64(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    """oneDNN has no float64."""
    monkeypatch.setattr(cpu, "_ONEDNN", onednn)
    x_ND, weight_DF = torch.randn(5, 16, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    torch.testing.assert_close(linear(x_ND, weight_DF), x_ND @ weight_DF, rtol=1e-14, atol=1e-14)


def test_onednn_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ONEDNN", True)
    assert cpu.uses_onednn(torch.ones(2, 8))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not cpu.uses_onednn(torch.ones(2, 8))


def test_compiled_code_has_a_plain_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler calls oneDNN itself, and cannot lower its operators."""
    monkeypatch.setattr(cpu, "_ONEDNN", True)
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.code)
        return module

    x_ND, weight_DF, bias_F = torch.randn(3, 8), torch.randn(8, 5), torch.randn(5)
    compiled = torch.compile(linear, backend=keep, fullgraph=True)(x_ND, weight_DF, bias_F)
    torch.testing.assert_close(compiled, x_ND @ weight_DF + bias_F)
    assert len(graphs) == 1 and "addmm" in graphs[0] and "mkldnn" not in graphs[0]


def expert_inputs(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The expert of each token, (T, 1), and x, gates, up, up bias, down, down bias."""
    torch.manual_seed(0)
    T, E, D, H = sum(counts), len(counts), 6, 10
    shapes = (T, D), (T, 1), (E, D, H), (E, H), (E, H, D), (E, D)
    experts_T = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    return experts_T[:, None], [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def expert_gradients(
    experts_TK: torch.Tensor, floats: list[torch.Tensor], batched: bool | None = None
) -> list[torch.Tensor | None]:
    out_TD = cpu.grouped_mlp(floats[0], experts_TK, *floats[1:], cpu.gelu_tanh, batched)
    trained = [tensor for tensor in floats if tensor.requires_grad]
    found = iter(torch.autograd.grad(out_TD.square().sum(), trained))
    return [next(found) if tensor.requires_grad else None for tensor in floats]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("trained", [0, 1, 2, 3, 4, 5])
def test_what_is_frozen_changes_no_other_gradient(batched: bool, trained: int) -> None:
    """Also where the biases of the second matrices alone are trained."""
    experts_TK, floats = expert_inputs([3, 0, 4])
    expected = expert_gradients(experts_TK, floats, batched)[trained]
    for index, tensor in enumerate(floats):
        tensor.requires_grad_(index == trained)
    assert torch.equal(expert_gradients(experts_TK, floats, batched)[trained], expected)


@pytest.mark.parametrize("onednn", [True, False])
def test_a_single_token_has_gradients(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    """Decoding takes another way, which has none."""
    monkeypatch.setattr(cpu, "_ONEDNN", onednn)
    experts_TK, floats = expert_inputs([0, 1], torch.float32)
    doubles = [tensor.detach().double().requires_grad_() for tensor in floats]
    for mine, truth in zip(
        expert_gradients(experts_TK, floats), expert_gradients(experts_TK, doubles, False), strict=True
    ):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("counts", "is_batched"),
    [
        ([96] * 4, True),
        ([97, 96, 96, 96], False),  # many rows: padding to the busiest expert costs more than it saves
        ([8, 8, 8, 0], True),
        ([8, 8, 0, 0], False),  # half of the experts would be multiplied for nothing
        ([15, 1, 1, 1, 1, 1, 1, 9], True),  # 120 padded rows for 30 tokens
        ([16, 1, 1, 1, 1, 1, 1, 9], False),  # 128 for 31
    ],
)
def test_experts_are_batched_where_padding_is_cheap(counts: list[int], is_batched: bool) -> None:
    experts_TK, floats = expert_inputs(counts)
    out_TD = cpu.grouped_mlp(floats[0], experts_TK, *floats[1:], cpu.gelu_tanh)
    assert out_TD.grad_fn is not None
    assert out_TD.grad_fn.name() == ("_BatchedMLPBackward" if is_batched else "_GroupedMLPBackward")


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_memory_that_is_freed_is_kept() -> None:
    """Page faults of taking 64 MB a second time: thousands, unless the process kept it."""
    program = (
        "import resource, sys\n"
        "from flash_experts.kernels.cpu_memory import freed_memory_returned, keep_freed_memory\n"
        "assert sys.argv[1] == 'as it is' or keep_freed_memory() == (sys.argv[1] != 'forbidden')\n"
        "meanwhile = freed_memory_returned() if sys.argv[1] == 'returned' else None\n"
        "meanwhile and meanwhile.__enter__()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "bytearray(b'1') * (64 << 20)\n"
        "before = faults()\n"
        "bytearray(b'1') * (64 << 20)\n"
        "print(faults() - before)\n"
    )
    again = {
        mode: int(subprocess.check_output([sys.executable, "-c", program, mode], text=True, env=environment))
        for mode, environment in (
            ("as it is", None),
            ("kept", None),
            ("returned", None),
            ("forbidden", os.environ | {cpu_memory.ENVIRONMENT_VARIABLE: "0"}),
        )
    }
    assert again["as it is"] > 10_000 and again["kept"] < 100
    assert again["returned"] > 10_000 and again["forbidden"] > 10_000


def test_experts_keep_freed_memory_when_they_train(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(moe_layer, "keep_freed_memory_once", lambda: calls.append(None))
    layer = moe_layer.MoELayer(GPT2MoEConfig(n_embd=8, n_head=1, num_experts=2))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        layer(torch.randn(3, 8))
    assert not calls
    layer(torch.randn(3, 8))
    assert len(calls) == 1
