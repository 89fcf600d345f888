"""Our Triton kernels, under Triton's interpreter where there is no GPU, against softmax attention in float64.

The interpreter uses tiles of 32 x 32, so lengths of 70 have whole tiles and edges. The wide sweep is for a GPU:
``pytest -m gpu``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("triton")
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from flash_experts.kernels.flash_attention_triton import INTERPRETED, attention, attention_varlen
from flash_experts.kernels.flash_decode_triton import decode
from tests.helpers.attention_oracle import oracle, oracle_varlen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu", reason="the wide sweep takes hours in Triton's interpreter"),
]
SEED = torch.tensor([2**40 + 7], device=DEVICE)
CAUSAL = AttentionOptions(scale=0.2, right=0)
OPTIONS = {
    "causal": CAUSAL,
    "full": AttentionOptions(scale=0.2),
    "window": AttentionOptions(scale=0.2, left=20, right=0),
    "two-sided window": AttentionOptions(scale=0.2, left=33, right=5),
    "right window": AttentionOptions(scale=0.2, right=3),
    "softcap": AttentionOptions(scale=0.5, right=0, softcap=3.0),
    "dropout": AttentionOptions(scale=0.2, right=0, dropout=0.17, seed=SEED),
}
LENGTHS = [(70, 70), (40, 75), (75, 40), (1, 65), (64, 64), (33, 1)]


def make(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def gradients(out: torch.Tensor, inputs: list[torch.Tensor], seed: int = 1) -> tuple[torch.Tensor, ...]:
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    return torch.autograd.grad(out, inputs, dout)


def check(ours: tuple[torch.Tensor, torch.Tensor], truth: tuple[torch.Tensor, torch.Tensor], qkv: Any) -> None:
    """Output, log-sum-exp and gradients in float32, to a few roundings."""
    torch.testing.assert_close(ours[0].double(), truth[0], atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(ours[1].double(), truth[1], atol=5e-6, rtol=1e-5)
    for gradient, expected in zip(gradients(ours[0], qkv), gradients(truth[0], qkv), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_batch_equals_softmax_attention(kind: str, lengths: tuple[int, int]) -> None:
    batch = 2 if lengths == LENGTHS[0] else 1  # the interpreter takes as much longer
    qkv = make((batch, lengths[0], 2, 16), (batch, lengths[1], 1, 16), (batch, lengths[1], 1, 16))
    check(attention(*qkv, OPTIONS[kind]), oracle(*qkv, OPTIONS[kind]), qkv)


@pytest.mark.parametrize("limit", [2**31 - 1, 2**40])
def test_a_window_wider_than_any_length_is_none(limit: int) -> None:
    qkv = make(*[(1, 20, 1, 16)] * 3)
    options = AttentionOptions(scale=0.2, left=limit, right=limit)
    check(attention(*qkv, options), oracle(*qkv, OPTIONS["full"]), qkv)
    q, k, v = (x.detach() for x in qkv)
    out, _ = decode(q[:, :1], k, v, options)
    torch.testing.assert_close(out.double(), oracle(q[:, :1], k, v, OPTIONS["full"])[0], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 40, 59, 64, 128, 256])
def test_head_dims(head_dim: int) -> None:
    qkv = make((1, 35, 1, head_dim), (1, 35, 1, head_dim), (1, 35, 1, head_dim))
    options = replace(CAUSAL, scale=head_dim**-0.5)
    check(attention(*qkv, options), oracle(*qkv, options), qkv)


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)], ids=["multi-head", "grouped", "multi-query"])
def test_query_heads_share_key_heads(heads: tuple[int, int]) -> None:
    qkv = make((1, 40, heads[0], 16), (1, 40, heads[1], 16), (1, 40, heads[1], 16))
    check(attention(*qkv, CAUSAL), oracle(*qkv, CAUSAL), qkv)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_alibi(per_sequence: bool) -> None:
    qkv = make((2, 40, 2, 16), (2, 50, 2, 16), (2, 50, 2, 16))
    slopes = torch.tensor([[0.5, 0.03], [0.2, 0.9]], device=DEVICE)
    options = replace(CAUSAL, alibi_slopes=slopes if per_sequence else slopes[0], softcap=4.0)
    check(attention(*qkv, options), oracle(*qkv, options), qkv)


def test_a_cache_is_read_up_to_each_rows_length() -> None:
    q, k, v = make((3, 2, 2, 16), (3, 80, 2, 16), (3, 80, 2, 16))
    lengths = torch.tensor([80, 3, 41], dtype=torch.int32, device=DEVICE)
    check(attention(q, k, v, CAUSAL, lengths), oracle(q, k, v, CAUSAL, lengths), [q, k, v])


@pytest.mark.parametrize("kind", [*OPTIONS, "alibi"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "ragged"])
def test_documents_of_a_packed_sequence(kind: str, packed: bool) -> None:
    """Empty, one-token and many-token documents, in both layouts of the kernels."""
    cu = torch.tensor([0, 5, 5, 6, 38, 39, 103, 110, 110], dtype=torch.int32, device=DEVICE)
    slopes = torch.rand(8, 2, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    options = replace(CAUSAL, alibi_slopes=slopes) if kind == "alibi" else OPTIONS[kind]
    qkv = make((110, 2, 16), (110, 1, 16), (110, 1, 16))
    cu_k = cu if packed else cu.clone()
    check(attention_varlen(*qkv, PackedLengths(cu, cu_k, 64, 64), options), oracle_varlen(*qkv, cu, cu, options), qkv)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0, 1, 31, 32, 33, 40])), min_size=1, max_size=4),
    kind=st.sampled_from(["causal", "full", "two-sided window"]),
)
def test_any_documents_with_their_own_queries_and_keys(lengths: list[tuple[int, int]], kind: str) -> None:
    cu_q, cu_k = (torch.tensor([0, *side]).cumsum(0).to(DEVICE, torch.int32) for side in zip(*lengths, strict=True))
    longest_q, longest_k = (max(side) for side in zip(*lengths, strict=True))
    qkv = make((int(cu_q[-1]), 1, 16), (int(cu_k[-1]), 1, 16), (int(cu_k[-1]), 1, 16))
    truth = oracle_varlen(*qkv, cu_q, cu_k, OPTIONS[kind])
    check(attention_varlen(*qkv, PackedLengths(cu_q, cu_k, longest_q, longest_k), OPTIONS[kind]), truth, qkv)


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_any_short_documents_packed(lengths: list[int]) -> None:
    cu = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    qkv = make(*[(sum(lengths), 1, 16)] * 3)
    check(attention_varlen(*qkv, PackedLengths.of(cu, 12), CAUSAL), oracle_varlen(*qkv, cu, cu, CAUSAL), qkv)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "ragged"])
def test_rows_after_the_last_document_get_zeros(packed: bool) -> None:
    cu = torch.tensor([0, 3, 40], dtype=torch.int32, device=DEVICE)
    q, k, v = make(*[(50, 1, 16)] * 3)
    out, lse = attention_varlen(q, k, v, PackedLengths(cu, cu if packed else cu.clone(), 37, 37), CAUSAL)
    assert (out[40:] == 0).all() and (lse[:, 40:] == -torch.inf).all()
    for gradient in gradients(out, [q, k, v]):
        assert gradient[:40].abs().sum() > 0 and (gradient[40:] == 0).all()


def test_slices_of_a_fused_projection_are_read_in_place() -> None:
    """What GPT-2 hands over: q, k and v side by side in one tensor, heads split off by a view."""
    (fused,) = make((2, 40, 3 * 2 * 16))
    q, k, v = (part.view(2, 40, 2, 16) for part in fused.split(32, dim=2))
    assert not q.is_contiguous()
    check(attention(q, k, v, CAUSAL), oracle(q, k, v, CAUSAL), [fused])
    across = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    check(attention(*across, CAUSAL), oracle(q, k, v, CAUSAL), [fused])
    with_gaps = [torch.stack([x, x], dim=-1)[..., 0] for x in (q, k, v)]
    assert with_gaps[0].stride(-1) == 2
    check(attention(*with_gaps, CAUSAL), oracle(q, k, v, CAUSAL), [fused])


def test_large_scores_do_not_overflow() -> None:
    q, k, v = make((1, 40, 1, 16), (1, 40, 1, 16), (1, 40, 1, 16))
    with torch.no_grad():
        q.mul_(1e3)
        k.mul_(1e3)
    ours, truth = attention(q, k, v, CAUSAL), oracle(q, k, v, CAUSAL)
    assert truth[1].abs().max() > 1e5
    torch.testing.assert_close(ours[0].double(), truth[0], atol=1e-4, rtol=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients(ours[0], [q, k, v]))


def test_a_fully_masked_query_gives_zeros_and_no_gradient() -> None:
    q, k, v = make((1, 70, 1, 16), (1, 30, 1, 16), (1, 30, 1, 16))  # bottom right: the first 40 queries see no key
    out, lse = attention(q, k, v, CAUSAL)
    assert (out[:, :40] == 0).all() and (lse[..., :40] == -torch.inf).all() and (out[:, 40:] != 0).any()
    dq, dk, dv = gradients(out, [q, k, v])
    assert (dq[:, :40] == 0).all() and all(gradient.isfinite().all() for gradient in (dq, dk, dv))


@pytest.mark.parametrize("shape", [(0, 4, 4), (1, 0, 4), (1, 4, 0)], ids=["no sequence", "no query", "no key"])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    B, S_q, S_k = shape
    qkv = make((B, S_q, 1, 16), (B, S_k, 1, 16), (B, S_k, 1, 16))
    out, _ = attention(*qkv, AttentionOptions(scale=1.0))
    assert (out == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(out, qkv))


def math_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Attention in the inputs' own dtype, as PyTorch's unfused path computes it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * options.scale
    if options.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def check_against_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> None:
    """flash-attn's own rule: at most twice (backward: three times) the error of plain attention in the same dtype."""
    ours, plain, truth = attention(q, k, v, options)[0], math_attention(q, k, v, options), oracle(q, k, v, options)[0]

    def error(x: torch.Tensor, y: torch.Tensor) -> float:
        return (x.double() - y).abs().max().item()

    assert error(ours, truth) <= 2 * error(plain, truth) + 1e-5
    sides = (gradients(x, [q, k, v]) for x in (ours, plain, truth))
    for gradient, plain_gradient, expected in zip(*sides, strict=True):
        assert error(gradient, expected.double()) <= 3 * error(plain_gradient, expected.double()) + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_is_as_exact_as_plain_attention(dtype: torch.dtype, causal: bool) -> None:
    options = AttentionOptions(scale=0.25, right=0 if causal else -1)
    check_against_math(*make(*[(1, 80, 1, 16)] * 3, dtype=dtype), options)


def test_dropout_is_replayed_from_its_seed_and_differs_between_seeds() -> None:
    q, k, v = make(*[(1, 40, 1, 16)] * 3)
    first, again = (attention(q, k, v, OPTIONS["dropout"])[0] for _ in range(2))
    other, _ = attention(q, k, v, replace(OPTIONS["dropout"], seed=SEED + 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_gradients_are_the_same_bits_every_time() -> None:
    qkv = make((2, 70, 4, 16), (2, 70, 2, 16), (2, 70, 2, 16))
    runs = [gradients(attention(*qkv, CAUSAL)[0], qkv) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_operators_keep_pytorchs_rules() -> None:
    """Schema, fake tensors, autograd registration, and both together under AOT dispatch, with dynamic shapes too."""
    qkv = make((1, 33, 2, 16), (1, 33, 1, 16), (1, 33, 1, 16))
    cu = torch.tensor([0, 30, 33], dtype=torch.int32, device=DEVICE)
    numbers = (0.2, -1, 0, 0.0, 0.0)
    operator = torch.ops.flash_experts.attention_forward
    torch.library.opcheck(operator, (*qkv, None, None, None, None, None, 33, 33, False, *numbers))
    rows = [x.detach()[0].requires_grad_() for x in qkv]
    torch.library.opcheck(operator, (*rows, cu, cu, None, None, None, 30, 30, True, *numbers))


def test_compiled_without_a_graph_break() -> None:
    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q * 2, k, v, CAUSAL)[0].square().sum()

    qkv = make(*[(1, 33, 1, 16)] * 3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*qkv), qkv)
    for gradient, plain in zip(torch.autograd.grad(compiled(*qkv), qkv), expected, strict=True):
        assert torch.equal(gradient, plain)


@pytest.mark.parametrize("kind", [*(kind for kind in OPTIONS if kind != "dropout"), "alibi"])
@pytest.mark.parametrize("queries", [1, 3])
def test_decoding_splits_the_keys(kind: str, queries: int) -> None:
    """One and three new queries against caches of different fill, two heads to a key head, in three shares."""
    heads = 4 if kind == "causal" else 2
    slopes = torch.tensor([0.5, 0.03], device=DEVICE)
    options = replace(CAUSAL, alibi_slopes=slopes) if kind == "alibi" else OPTIONS[kind]
    q, k, v = (x.detach() for x in make((4, queries, heads, 16), *[(4, 150, heads // 2, 16)] * 2))
    lengths = torch.tensor([150, 3, 64, 0], dtype=torch.int32, device=DEVICE)
    for k_lengths in (None, lengths):
        truth = oracle(q, k, v, options, k_lengths)
        for ours in (decode(q, k, v, options, k_lengths, splits=3), attention(q, k, v, options, k_lengths)):
            torch.testing.assert_close(ours[0].double(), truth[0], atol=3e-6, rtol=1e-5)
            torch.testing.assert_close(ours[1].double(), truth[1], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_query_against_a_long_cache_still_has_gradients(wanted: int) -> None:
    """Decoding has none: a call that wants one, be it of the values alone, goes the other way."""
    qkv = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(make((1, 1, 1, 16), *[(1, 140, 1, 16)] * 2))]
    ours, truth = attention(*qkv, CAUSAL)[0], oracle(*qkv, CAUSAL)[0]
    mine, expected = (gradients(out, [qkv[wanted]])[0] for out in (ours, truth))
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


class TestOnAGpu:
    """The ranges of flash-attn's own tests."""

    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("head_dim", [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256])
    @pytest.mark.parametrize("length", [97, 128, 200, 257, 768, 1025, 2048])
    def test_half_precision(self, dtype: torch.dtype, causal: bool, head_dim: int, length: int) -> None:
        assert not INTERPRETED
        options = AttentionOptions(scale=head_dim**-0.5, right=0 if causal else -1)
        check_against_math(*make(*[(2, length, 2, head_dim)] * 3, dtype=dtype), options)

    @pytest.mark.parametrize("kind", OPTIONS)
    @pytest.mark.parametrize("lengths", [(113, 203), (128, 217), (1024, 1023), (1023, 1024), (2048, 2048)], ids=str)
    def test_options_at_length(self, kind: str, lengths: tuple[int, int]) -> None:
        qkv = make((2, lengths[0], 4, 64), (2, lengths[1], 2, 64), (2, lengths[1], 2, 64))
        options = replace(OPTIONS[kind], scale=0.125)
        ours, truth = attention(*qkv, options)[0], oracle(*qkv, options)[0]
        torch.testing.assert_close(ours.double(), truth, atol=2e-5, rtol=1e-4)
        for gradient, expected in zip(gradients(ours, qkv), gradients(truth, qkv), strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "ragged"])
    def test_a_row_of_names(self, packed: bool) -> None:
        lengths = torch.randint(0, 30, (2000,), generator=torch.Generator().manual_seed(0))
        cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(DEVICE, torch.int32)
        qkv = make(*[(int(cu[-1]), 2, 64)] * 3)
        options = replace(CAUSAL, scale=0.125)
        ours = attention_varlen(*qkv, PackedLengths(cu, cu if packed else cu.clone(), 29, 29), options)
        check(ours, oracle_varlen(*qkv, cu, cu, options), qkv)
