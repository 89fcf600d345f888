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


def test_linear_keeps_float64() -> None:
    x_ND, weight_DF = torch.randn(5, 16, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    torch.testing.assert_close(linear(x_ND, weight_DF), x_ND @ weight_DF, rtol=1e-14, atol=1e-14)


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
