"""Each backend equals the definition, and the choice between them is the one that was asked for, said once."""

from __future__ import annotations

import logging
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.kernels import attention_packages, attention_sdpa, flash_attention_reference
from flash_experts.kernels.attention_options import AttentionOptions
from flash_experts.models import attention_backends
from flash_experts.models.attention_backends import attention, attention_backend, choose
from flash_experts.models.flash_attention import fe_attention_forward
from flash_experts.models.flash_attn import flash_attn_func

from .cases import Batch, Packed, assert_same, batches, cumulative, packed_rows
from .oracle import oracle, oracle_varlen

CAUSAL = AttentionOptions(0.5, right=0)


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_EXPERTS_ATTENTION", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    attention_backends._choose.cache_clear()


# SDPA.


@settings(max_examples=80, deadline=None)
@given(batch=batches(is_plain=True))
def test_sdpa_equals_the_definition(batch: Batch) -> None:
    out, lse = attention_sdpa.attention(*batch.qkv, batch.options, batch.k_lengths_B)
    assert lse is None
    assert_same(out, oracle(*batch.qkv, batch.options, batch.k_lengths_B)[0], batch.qkv)


@settings(max_examples=80, deadline=None)
@given(packed=packed_rows(is_plain=True))
def test_sdpa_of_packed_documents_equals_the_definition(packed: Packed) -> None:
    out, _ = attention_sdpa.attention_varlen(*packed.qkv, *packed.varlen(), packed.options)
    assert_same(out, oracle_varlen(*packed.qkv, *packed.starts(), packed.options)[0], packed.qkv)


@pytest.mark.parametrize("options", [CAUSAL, AttentionOptions(0.5), AttentionOptions(0.5, left=3, right=1)])
@pytest.mark.parametrize("same_keys", [True, False])
def test_one_long_document_does_not_pad_the_short_ones(options: AttentionOptions, same_keys: bool) -> None:
    lengths_q = [1, 2, 0, 70, *[1, 3, 2, 1] * 6]
    lengths_k = lengths_q if same_keys else lengths_q[::-1]
    shapes = (sum(lengths_q), 4), (sum(lengths_k), 2), (sum(lengths_k), 2)
    qkv = tuple(torch.randn(T, heads, 4, dtype=torch.float64, requires_grad=True) for T, heads in shapes)
    packed = Packed(qkv, options, lengths_q, lengths_k)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            if func is F.scaled_dot_product_attention:
                largest = max(largest, args[0].shape[0] * args[0].shape[2])
            return func(*args, **(kwargs or {}))

    with Watch():
        out, _ = attention_sdpa.attention_varlen(*qkv, *packed.varlen(), options)
    assert_same(out, oracle_varlen(*qkv, *packed.starts(), options)[0], qkv)
    assert 0 < largest <= (70 if same_keys else 4 * 70)


@pytest.mark.parametrize(
    ("S_q", "S_k", "heads", "options", "lengths"),
    [
        (6, 6, (2, 2), CAUSAL, None),
        (6, 9, (2, 2), AttentionOptions(0.5), None),
        (1, 9, (2, 2), CAUSAL, None),
        (1, 9, (4, 2), CAUSAL, None),
        (1, 9, (4, 2), AttentionOptions(0.5, left=3, right=0), None),
        (1, 9, (4, 2), CAUSAL, [4, 4, 9]),
    ],
)
def test_sdpa_gets_no_mask_and_the_cache_itself(
    monkeypatch: pytest.MonkeyPatch,
    S_q: int,
    S_k: int,
    heads: tuple[int, int],
    options: AttentionOptions,
    lengths: list[int] | None,
) -> None:
    q, k, v = torch.randn(3, S_q, heads[0], 8), torch.randn(3, S_k, heads[1], 8), torch.randn(3, S_k, heads[1], 8)
    calls = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((args, kwargs))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention_sdpa.attention(q, k, v, options, None if lengths is None else torch.tensor(lengths))
    assert len(calls) == (1 if lengths is None else 2), "rows of one length go together"
    for args, kwargs in calls:
        assert kwargs.get("attn_mask") is None
        assert args[1].untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        assert args[2].untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


# Dao-AILab's packages, played by modules with their signatures on our reference.


def fake_package(version: int) -> types.ModuleType:
    def run(q: Any, k: Any, v: Any, options: AttentionOptions, cu: tuple[Any, ...]) -> Any:
        if cu:
            return flash_attention_reference.attention_varlen(q, k, v, *cu, options)
        return flash_attention_reference.attention(q, k, v, options)

    def make(
        softmax_scale: float, causal: bool, window: tuple[Any, Any], softcap: float, slopes: Any = None
    ) -> AttentionOptions:
        left, right = (-1 if limit is None else limit for limit in window)
        return AttentionOptions(softmax_scale, left, 0 if causal else right, softcap, slopes)

    def v2(q: Any, k: Any, v: Any, *cu: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
           window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
           return_attn_probs: bool = False) -> Any:  # fmt: skip
        assert dropout_p == 0.0
        out, lse = run(q, k, v, make(softmax_scale, causal, window_size, softcap, alibi_slopes), cu)
        return (out, lse, None) if return_attn_probs else out

    def v3(q: Any, k: Any, v: Any, *cu: Any, softmax_scale: Any = None, causal: bool = False,
           window_size: Any = (-1, -1), softcap: float = 0.0, deterministic: bool = False) -> Any:  # fmt: skip
        return run(q, k, v, make(softmax_scale, causal, window_size, softcap), cu)[0]

    def v4(q: Any, k: Any, v: Any, *cu: Any, softmax_scale: Any = None, causal: bool = False,
           window_size: Any = (None, None), softcap: float = 0.0, deterministic: bool = False) -> Any:  # fmt: skip
        assert -1 not in window_size
        return run(q, k, v, make(softmax_scale, causal, window_size, softcap), cu)

    function = {2: v2, 3: v3, 4: v4}[version]

    def varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
               **arguments: Any) -> Any:  # fmt: skip
        return function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **arguments)

    module = types.ModuleType(attention_packages.MODULES[version])
    module.flash_attn_func = function  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("limits", [(-1, 0), (-1, -1), (2, 0), (2, 1)])
def test_the_packages_get_our_options(monkeypatch: pytest.MonkeyPatch, version: int, limits: tuple[int, int]) -> None:
    module = fake_package(version)
    if version == 4:
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    q, k, v = (torch.randn(2, 6, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    slopes = torch.rand(4) if version == 2 else None
    options = AttentionOptions(0.4, *limits, softcap=2.0, alibi_slopes=slopes)
    needs_lse = version == 2
    out, lse = attention_packages.attention(version, q, k, v, options, needs_lse)
    expected, expected_lse = oracle(q, k, v, options)
    assert_same(out, expected, (q, k, v))
    assert (lse is not None) == needs_lse
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse)
    starts = cumulative([2, 0, 4])
    out, _ = attention_packages.attention_varlen(version, q[0], k[0], v[0], starts, starts, 4, 4, options)
    assert_same(out, oracle_varlen(q[0], k[0], v[0], starts, starts, options)[0], (q, k, v))


# The choice.


def test_auto_takes_the_fastest_that_can() -> None:
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
    monkeypatch.setattr(attention_backends, "_is_installed", lambda module: has_triton)
    assert choose("auto", "cuda", dtype, asked) == expected


@pytest.mark.parametrize(("has_triton", "expected"), [(True, "triton"), (False, "sdpa")])
def test_packed_rows_go_to_our_kernel_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_triton: bool, expected: str
) -> None:
    monkeypatch.setattr(attention_backends, "_is_installed", lambda module: has_triton)
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


def test_the_choice_is_said_once_and_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "_is_installed", lambda module: False)
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
        ("sdpa", torch.float32, ("softcap", "ALiBi"), r"it does not do ALiBi, softcap\): use reference$"),
        ("flash_attention_2", torch.float16, (), "it runs on cuda, not on cpu.*: use reference or sdpa$"),
        ("reference", torch.float32, ("a padding mask",), "it does not do a padding mask.*: use sdpa$"),
    ],
)
def test_a_forced_backend_that_cannot_says_why_and_what_can(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, asked: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(attention_backends, "_is_installed", lambda module: True)
    with attention_backend(name), pytest.raises(ValueError, match=message) as error:
        choose("auto", "cpu", dtype, asked)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"attention_backend() = {name!r}")


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_a_package_that_is_not_installed_is_named(name: str) -> None:
    version = int(name[-1])
    with pytest.raises(
        ValueError, match=f"the package that has {attention_packages.MODULES[version]} is not installed"
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
    with pytest.raises(ValueError, match=r"it does not do a padding mask.*: use sdpa"):
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


def test_dispatch_gives_what_was_asked_for() -> None:
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
