"""Attention by kernels of others: PyTorch's scaled_dot_product_attention (SDPA), and flash-attn 2, 3 and 4 (Dao-AILab).

`flash_experts.models.attention_backends` has what each does not support. Dropout uses torch's generator, not
``options.seed``. flash-attn is imported on first use. Shape suffixes as in `attention_options`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional as F

from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths

FLASH_ATTN_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
# Documents of very different lengths are mostly padding. Where padding would multiply the tokens by more than this,
# they are grouped by length first (which reads the lengths on the host).
_MOST_PADDING = 8
# On a CPU in bfloat16, the backward of PyTorch's fused kernel is many times slower than plain matmuls for sequences up
# to this length (docs/experiments.md), whose scores fit in memory.
_SHORT = 128


def sdpa(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    options: AttentionOptions,
    k_lengths_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Attention of a batch by SDPA, differentiable in q, k and v, without softcap, ALiBi and log-sum-exp.

    Returns (B, S_q, H, C), zeros for a fully masked query. ``k_lengths_B`` is the int32 number of keys in use per
    sequence, read on the host.
    """
    if k_lengths_B is not None:
        return _with_lengths(q_BSHC, k_BSGC, v_BSGC, options, k_lengths_B.tolist()), None
    S_q, S_k = q_BSHC.shape[1], k_BSGC.shape[1]
    if options.left >= 0:  # cut off the keys before the first query's window
        unseen = max(0, S_k - S_q - options.left)
        k_BSGC, v_BSGC, S_k = k_BSGC[:, unseen:], v_BSGC[:, unseen:], S_k - unseen
    # Leading queries may stand before the first key.
    fully_masked = S_q if S_k == 0 else max(0, S_q - S_k - options.right) if options.right >= 0 else 0
    if fully_masked > 0:
        out_BSHC = _masked(q_BSHC[:, fully_masked:], k_BSGC, v_BSGC, options)
        return F.pad(out_BSHC, (0, 0, 0, 0, fully_masked, 0)), None
    return _masked(q_BSHC, k_BSGC, v_BSGC, options), None


def _with_lengths(
    q_BSHC: torch.Tensor, k_BSGC: torch.Tensor, v_BSGC: torch.Tensor, options: AttentionOptions, lengths: list[int]
) -> torch.Tensor:
    """One call per run of sequences with equal lengths, on views of the cache."""
    outputs, start = [], 0
    for length, run in groupby(lengths):
        rows = slice(start, start + len(list(run)))
        outputs.append(sdpa(q_BSHC[rows], k_BSGC[rows, :length], v_BSGC[rows, :length], options)[0])
        start = rows.stop
    return torch.cat(outputs) if outputs else torch.zeros_like(q_BSHC)


def _masked(
    q_BSHC: torch.Tensor, k_BSGC: torch.Tensor, v_BSGC: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """Uses no mask, SDPA's causal one, or a full one; every query must see a key."""
    S_q, S_k = q_BSHC.shape[1], k_BSGC.shape[1]
    limited_left = 0 <= options.left < S_k - 1
    limited_right = 0 <= options.right < S_q - 1
    if not (limited_left or limited_right):
        return _call_sdpa(q_BSHC, k_BSGC, v_BSGC, options)
    if not limited_left and options.right == 0 and S_q == S_k:
        return _call_sdpa(q_BSHC, k_BSGC, v_BSGC, options, is_causal=True)
    place_S = torch.arange(S_k - S_q, S_k, device=q_BSHC.device)
    distance_SS = place_S[:, None] - torch.arange(S_k, device=q_BSHC.device)
    return _call_sdpa(q_BSHC, k_BSGC, v_BSGC, options, visible=_within(distance_SS, options))


def _within(distance: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    visible = torch.ones_like(distance, dtype=torch.bool)
    if options.left >= 0:
        visible = visible & (distance <= options.left)
    if options.right >= 0:
        visible = visible & (distance >= -options.right)
    return visible


def _call_sdpa(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    options: AttentionOptions,
    visible: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    k_BGSC, v_BGSC = k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2)
    S_q, H, G = q_BSHC.shape[1], q_BSHC.shape[2], k_BSGC.shape[2]
    if S_q == 1 and H != G and visible is None:
        # The heads of a group become the queries of one head, so the cache is not repeated.
        q_BGRC = q_BSHC[:, 0].unflatten(1, (G, H // G))
        out_BGRC = F.scaled_dot_product_attention(
            q_BGRC, k_BGSC, v_BGSC, dropout_p=options.dropout, scale=options.scale
        )
        return out_BGRC.flatten(1, 2)[:, None]
    out_BHSC = F.scaled_dot_product_attention(
        q_BSHC.transpose(1, 2),
        k_BGSC,
        v_BGSC,
        attn_mask=visible,
        dropout_p=options.dropout,
        is_causal=is_causal,
        scale=options.scale,
        **({"enable_gqa": True} if H != G else {}),  # as a value H != G is a symbol under torch.compile(dynamic=True)
    )
    return out_BHSC.transpose(1, 2)


def _unfused_causal(
    q_NMHC: torch.Tensor, k_NMHC: torch.Tensor, v_NMHC: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    q_NHMC, k_NHMC, v_NHMC = (x.transpose(1, 2) for x in (q_NMHC, k_NMHC, v_NMHC))
    hidden_MM = torch.full((q_NMHC.shape[1],) * 2, -torch.inf, dtype=q_NMHC.dtype).triu(1)
    scores_NHMM = (q_NHMC @ k_NHMC.mT) * options.scale + hidden_MM
    weights_NHMM = F.dropout(scores_NHMM.softmax(-1), options.dropout)
    return (weights_NHMM @ v_NHMC).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Documents:
    """Positions of a packed sequence's tokens when its documents are padded."""

    length_N: torch.Tensor
    longest: int
    document_T: torch.Tensor
    place_T: torch.Tensor  # of each token among N * M

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, longest: int, total: int) -> _Documents:
        length_N = cu_seqlens.diff()
        numbers_N = torch.arange(length_N.numel(), device=cu_seqlens.device)
        document_T = torch.repeat_interleave(numbers_N, length_N, output_size=total)
        first_T = longest * document_T - cu_seqlens[document_T]
        return cls(length_N, longest, document_T, torch.arange(total, device=cu_seqlens.device) + first_T)

    def pad(self, x_THC: torch.Tensor) -> torch.Tensor:
        """(T, H, C) to (N, M, H, C), zeros after each document's end."""
        N = self.length_N.numel()
        padded = x_THC.new_zeros(N * self.longest, *x_THC.shape[1:]).index_copy(0, self.place_T, x_THC)
        return padded.view(N, self.longest, *x_THC.shape[1:])

    def unpad(self, x_NMHC: torch.Tensor) -> torch.Tensor:
        return x_NMHC.flatten(0, 1)[self.place_T]


def sdpa_varlen(
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    lengths: PackedLengths,
    options: AttentionOptions,
) -> tuple[torch.Tensor, None]:
    """`sdpa` of packed documents (variable length), each of which attends to itself only."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    total_q, total_k, N = q_THC.shape[0], k_TGC.shape[0], cu_seqlens_q.numel() - 1
    if N * (max_seqlen_q + max_seqlen_k) > _MOST_PADDING * (total_q + total_k) > 0:
        return _by_length(q_THC, k_TGC, v_TGC, cu_seqlens_q, cu_seqlens_k, options), None
    of_q = _Documents.of(cu_seqlens_q, max_seqlen_q, total_q)
    of_k = of_q
    if cu_seqlens_k is not cu_seqlens_q:
        of_k = _Documents.of(cu_seqlens_k, max_seqlen_k, total_k)
    q, k, v = of_q.pad(q_THC), of_k.pad(k_TGC), of_k.pad(v_TGC)
    limited_left = 0 <= options.left < max_seqlen_k - 1
    if of_k is of_q and options.right == 0 and not limited_left:  # no mask: padding comes after each document
        is_short = max_seqlen_q <= _SHORT and q.shape[2] == k.shape[2]
        if is_short and q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
            return of_q.unpad(_unfused_causal(q, k, v, options)), None
        return of_q.unpad(_call_sdpa(q, k, v, options, is_causal=True)), None
    visible_NMM = _visible(of_q, of_k, options)
    # A fully masked query attends to everything instead (no inf - inf), and its output is set to 0.
    empty_NM1 = ~visible_NMM.any(-1, keepdim=True)
    out_NMHC = _call_sdpa(q, k, v, options, visible=(visible_NMM | empty_NM1)[:, None])
    return of_q.unpad(out_NMHC.masked_fill(empty_NM1[..., None], 0)), None


def _visible(of_q: _Documents, of_k: _Documents, options: AttentionOptions) -> torch.Tensor:
    """(N, M_q or 1, M_k), true at visible keys; M_q is 1 where all queries see the same."""
    device = of_q.place_T.device
    column_M = torch.arange(of_k.longest, device=device)
    is_key_N1M = (column_M < of_k.length_N[:, None])[:, None]
    if options.left < 0 and options.right < 0:
        return is_key_N1M
    offset_N = of_k.length_N - of_q.length_N
    place_NM = torch.arange(of_q.longest, device=device) + offset_N[:, None]
    return is_key_N1M & _within(place_NM[..., None] - column_M, options)


def _by_length(
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Groups documents by the binary digits of their length: at most half is padding."""
    lengths_2N = torch.stack([cu_seqlens_q.diff(), cu_seqlens_k.diff()])
    digits_N = torch.tensor([length.bit_length() for length in lengths_2N.amax(0).tolist()], device=q_THC.device)
    of_q = _Documents.of(cu_seqlens_q, 0, q_THC.shape[0])
    of_k = _Documents.of(cu_seqlens_k, 0, k_TGC.shape[0])
    outputs, rows = [], []
    for digits in digits_N.unique().tolist():
        chosen_N = digits_N == digits
        rows_q, rows_k = (chosen_N[of.document_T].nonzero()[:, 0] for of in (of_q, of_k))
        starts = F.pad(lengths_2N[:, chosen_N].cumsum(1), (1, 0)).to(cu_seqlens_q.dtype)
        cu_q = starts[0]
        cu_k = cu_q if torch.equal(cu_q, starts[1]) else starts[1]
        longest_q, longest_k = lengths_2N[:, chosen_N].amax(1).tolist()
        lengths = PackedLengths(cu_q, cu_k, longest_q, longest_k)
        out, _ = sdpa_varlen(q_THC[rows_q], k_TGC[rows_k], v_TGC[rows_k], lengths, options)
        outputs.append(out)
        rows.append(rows_q)
    return torch.cat(outputs)[torch.cat(rows).argsort()]


def flash_attn(
    version: int,
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    options: AttentionOptions,
    needs_lse: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a batch by flash-attn ``version`` 2, 3 or 4 on CUDA, differentiable in q, k and v.

    Returns (B, S_q, H, C), and the log-sum-exp (B, H, S_q) or None. Version 2 alone has dropout, ALiBi and the latter.
    """
    qkv = q_BSHC, k_BSGC, v_BSGC
    return _call_flash_attn(version, "flash_attn_func", qkv, {}, options, needs_lse, deterministic)


def flash_attn_varlen(
    version: int,
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    lengths: PackedLengths,
    options: AttentionOptions,
    needs_lse: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`flash_attn` of packed documents: (T_q, H, C), and the log-sum-exp (H, T_q) float32 or None."""
    qkv = q_THC, k_TGC, v_TGC
    return _call_flash_attn(
        version, "flash_attn_varlen_func", qkv, lengths._asdict(), options, needs_lse, deterministic
    )


def _call_flash_attn(
    version: int,
    name: str,
    qkv: tuple[torch.Tensor, ...],
    lengths: dict[str, Any],
    options: AttentionOptions,
    needs_lse: bool,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    function = getattr(importlib.import_module(FLASH_ATTN_MODULES[version]), name)
    no_limit = None if version == 4 else -1
    # Causal attention is a flag there, which also selects faster kernels.
    limits = options.left, -1 if options.causal else options.right
    arguments = lengths | {
        "softmax_scale": options.scale,
        "causal": options.causal,
        "window_size": tuple(no_limit if limit < 0 else limit for limit in limits),
        "softcap": options.softcap,
        "deterministic": deterministic,
    }
    if version == 2:
        arguments["dropout_p"] = options.dropout
        arguments["alibi_slopes"] = options.alibi_slopes
        arguments["return_attn_probs"] = needs_lse
    returned = function(*qkv, **arguments)
    # Some versions return the output alone, some a tuple that begins with output and log-sum-exp.
    if isinstance(returned, torch.Tensor):
        return returned, None
    return returned[0], returned[1] if needs_lse else None
