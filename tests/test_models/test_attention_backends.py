"""Attention backends are chosen by preference or by name, the choice is logged once, and a model runs on it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.kernels import attention_libraries
from flash_experts.kernels.attention_options import AttentionOptions
from flash_experts.models import attention_backends
from flash_experts.models.attention_backends import attention, attention_backend, choose
from flash_experts.models.flash_attention import fe_attention_forward
from flash_experts.models.flash_attn import flash_attn_func
from tests.helpers.attention_cases import cumulative
from tests.helpers.attention_oracle import oracle

CAUSAL = AttentionOptions(0.5, right=0)


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_EXPERTS_ATTENTION", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    attention_backends._choose.cache_clear()


def test_auto_takes_the_first_that_supports_the_call() -> None:
    assert choose("auto", "cpu", torch.float32) == "sdpa"
    assert choose("auto", "cpu", torch.float64, ("softcap",)) == "reference"
    assert choose("auto", "cpu", torch.float32, ("a padding mask",)) == "sdpa"


@pytest.mark.parametrize(
    ("has_triton", "dtype", "asked", "expected"),
    [
        (True, torch.bfloat16, (), "sdpa"),
        (True, torch.float16, ("softcap", "dropout", "the log-sum-exp"), "triton"),
        (True, torch.float32, (), "sdpa"),
        (True, torch.float32, ("softcap",), "triton"),
        (True, torch.bfloat16, ("head dims under 16",), "sdpa"),
        (True, torch.bfloat16, ("head dims under 16", "softcap"), "reference"),
        (True, torch.bfloat16, ("a padding mask",), "sdpa"),
        (False, torch.bfloat16, (), "sdpa"),
        (False, torch.bfloat16, ("softcap",), "reference"),
        (False, torch.float32, ("deterministic gradients on CUDA",), "reference"),
    ],
)
def test_auto_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_triton: bool, dtype: torch.dtype, asked: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(attention_backends, "is_installed", lambda module: has_triton)
    assert choose("auto", "cuda", dtype, asked) == expected


@pytest.mark.parametrize(("has_triton", "expected"), [(True, "triton"), (False, "sdpa")])
def test_packed_sequences_use_our_kernel_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_triton: bool, expected: str
) -> None:
    monkeypatch.setattr(attention_backends, "is_installed", lambda module: has_triton)
    assert choose("auto", "cuda", torch.bfloat16, packed=True) == expected
    assert choose("auto", "cpu", torch.bfloat16, packed=True) == "sdpa"


def test_context_then_environment_then_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen() -> str:
        return choose("sdpa", "cpu", torch.float32)

    assert chosen() == "sdpa"
    monkeypatch.setenv("FLASH_EXPERTS_ATTENTION", "reference")
    assert chosen() == "reference"
    with attention_backend("sdpa"):
        assert chosen() == "sdpa"
        with attention_backend("auto"):
            assert choose("reference", "cpu", torch.float32) == "sdpa"
    assert chosen() == "reference"


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == attention_backends.__name__]


def test_the_choice_is_logged_once_with_its_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backends, "is_installed", lambda module: False)
    with caplog.at_level(logging.INFO, logger="flash_experts"):
        for _ in range(3):
            choose("auto", "cpu", torch.float32)
            choose("auto", "cuda", torch.bfloat16, packed=True)
            choose("reference", "cpu", torch.float32)
    assert messages(caplog) == [
        "attention of float32 on cpu: sdpa (first choice there)",
        "attention of packed bfloat16 on cuda: sdpa (triton: the package that has triton is not installed)",
        "attention of float32 on cpu: reference (forced by config.attention_backend)",
    ]


@pytest.mark.parametrize(
    ("name", "dtype", "asked", "message"),
    [
        ("triton", torch.float64, (), "it takes bfloat16, float16, float32, not float64"),
        ("triton", torch.float32, (), "set TRITON_INTERPRET=1 before Python starts"),
        ("sdpa", torch.float32, ("softcap", "ALiBi"), r"it does not support ALiBi, softcap\): use reference$"),
        ("flash_attention_2", torch.float16, (), "it runs on cuda, not on cpu.*: use reference or sdpa$"),
        ("reference", torch.float32, ("a padding mask",), "it does not support a padding mask.*: use sdpa$"),
    ],
)
def test_a_forced_backend_without_support_names_those_with_it(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, asked: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(attention_backends, "is_installed", lambda module: True)
    with attention_backend(name), pytest.raises(ValueError, match=message) as error:
        choose("auto", "cpu", dtype, asked)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"attention_backend() = {name!r}")


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_a_package_that_is_not_installed_is_named(name: str) -> None:
    version = int(name[-1])
    with pytest.raises(
        ValueError, match=f"the package that has {attention_libraries.FLASH_ATTN_MODULES[version]} is not installed"
    ):
        choose(name, "cuda", torch.bfloat16)


def test_unknown_names_suggest_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="did you mean 'triton'"), attention_backend("tritan"):
        pass
    with pytest.raises(ValueError, match="did you mean 'sdpa'"):
        GPT2MoEConfig(attention_backend="spda")
    with pytest.raises(ValueError, match="did you mean 'attention_backend'"):
        GPT2MoEConfig(attention_backends="sdpa")
    monkeypatch.setenv("FLASH_EXPERTS_ATTENTION", "flash_attention_5")
    with pytest.raises(ValueError, match="FLASH_EXPERTS_ATTENTION: there is no attention backend 'flash_attention_5'"):
        choose("auto", "cpu", torch.float32)


# The model.


@pytest.fixture
def moe(dense: GPT2LMHeadModel) -> GPT2MoEForCausalLM:
    return GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2).double()


def packed_batch() -> dict[str, Any]:
    lengths = [4, 1, 7, 2]
    starts = cumulative(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.arange(sum(lengths))[None]
    return {
        "input_ids": ids, "position_ids": positions, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts,
        "max_length_q": 7, "max_length_k": 7, "use_cache": False,
    }  # fmt: skip


def test_a_model_runs_on_the_backend_of_its_configuration(
    moe: GPT2MoEForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.arange(12).view(2, 6)
    calls: tuple[dict[str, Any], ...] = ({"input_ids": ids}, packed_batch())
    expected = [moe(**call).logits for call in calls]
    moe.config.attention_backend = "reference"
    with caplog.at_level(logging.INFO, logger="flash_experts"):
        for call, logits in zip(calls, expected, strict=True):
            torch.testing.assert_close(moe(**call).logits, logits, rtol=0, atol=1e-12)
        step = moe(ids[:, :5], use_cache=True)
        last = moe(ids[:, 5:], past_key_values=step.past_key_values).logits
        torch.testing.assert_close(last, expected[0][:, 5:], rtol=0, atol=1e-12)
    choices = {message.split(": ")[1] for message in messages(caplog)}
    assert choices == {"reference (forced by config.attention_backend)"}
    moe.save_pretrained(tmp_path)
    assert GPT2MoEForCausalLM.from_pretrained(tmp_path).config.attention_backend == "reference"
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"it does not support a padding mask.*: use sdpa"):
        moe(ids, attention_mask=mask)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_dropout_is_replayed_by_the_seed_and_by_activation_checkpointing(
    moe: GPT2MoEForCausalLM, backend: str, is_packed: bool
) -> None:
    moe.config.attention_backend = backend
    for block in moe.transformer.h:
        block.attn.attn_dropout.p = 0.5
    batch = packed_batch() if is_packed else {"input_ids": torch.arange(12).view(2, 6), "use_cache": False}
    moe.train()

    def gradients(seed: int) -> list[torch.Tensor]:
        moe.zero_grad()
        torch.manual_seed(seed)
        moe(**batch).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in moe.parameters() if parameter.grad is not None]

    plain = gradients(0)
    assert not torch.equal(plain[0], gradients(1)[0])
    moe.gradient_checkpointing_enable()
    for mine, theirs in zip(gradients(0), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


class Causal(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_without_a_graph_break(dropout: float) -> None:
    module = Causal()
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)

    def attend(q: torch.Tensor, k: torch.Tensor, packed: bool) -> torch.Tensor:
        where = {"cu_seq_lens_q": starts, "max_length_q": 4} if packed else {}
        return fe_attention_forward(module, q, k, k, None, dropout=dropout, **where)[0]

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for B, S, S_k, packed in ((2, 6, 6, False), (1, 6, 6, True), (2, 1, 6, False), (3, 7, 7, False)):
        q, k = torch.randn(B, 2, S, 16, requires_grad=True), torch.randn(B, 2, S_k, 16)
        torch.manual_seed(0)
        expected = attend(q, k, packed)
        torch.manual_seed(0)
        found = compiled(q, k, packed)
        assert found.shape == expected.shape
        if not dropout:
            torch.testing.assert_close(found, expected)
        found.sum().backward()


def test_a_static_cache_is_read_up_to_what_is_written() -> None:
    """Prefill: six queries, and a cache of ten places of which the last four are empty."""
    q, k = torch.randn(2, 3, 6, 8, dtype=torch.float64), torch.randn(2, 3, 10, 8, dtype=torch.float64)
    out, _ = fe_attention_forward(Causal(), q, k, k, None)
    heads_last = q.transpose(1, 2), k[:, :, :6].transpose(1, 2), k[:, :, :6].transpose(1, 2)
    torch.testing.assert_close(out, oracle(*heads_last, AttentionOptions(8**-0.5, right=0))[0])


def test_dispatch_returns_what_was_requested() -> None:
    q = torch.randn(1, 5, 2, 8)
    out, lse = attention(q, q, q, CAUSAL, needs_lse=True)
    expected, expected_lse = oracle(q, q, q, CAUSAL)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
    assert lse is not None
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-6)
    dropped = replace(CAUSAL, dropout=0.5, seed=torch.tensor([4]))
    by_reference, _ = attention(q, q, q, dropped, backend="reference")
    torch.testing.assert_close(by_reference.double(), oracle(q, q, q, dropped)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_of_zero_or_below_is_no_special_case(scale: float) -> None:
    """PyTorch's kernel makes 0 times minus infinity of it: such calls go elsewhere."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 16, dtype=torch.float64) for _ in range(3))
    out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    truth, _ = oracle(q, k, v, AttentionOptions(scale=scale, right=0))
    torch.testing.assert_close(out, truth)
