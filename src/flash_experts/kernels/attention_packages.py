"""Attention by the packages of Dao-AILab, where somebody installed one: flash-attn 2, 3 and 4.

Each is imported when it is called for. What each of them cannot do is written down in
`flash_experts.models.attention_backends`, which never sends it here.

Letters in the shapes: B sequences, S length, H query heads, G key/value heads, C width of a head, T tokens of a packed
row, N documents in it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from flash_experts.kernels.attention_options import AttentionOptions

MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


def attention(
    version: int,
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    options: AttentionOptions,
    needs_lse: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a batch, differentiable in q, k and v.

    Args:
        version: 2, 3 or 4.
        q_BSHC: queries, (B, S_q, H, C) float16 or bfloat16 on CUDA.
        k_BSGC: keys, (B, S_k, G, C).
        v_BSGC: values, likewise.
        options: dropout (by torch's generator: the seed is not used) and slopes with version 2 alone.
        needs_lse: return the log-sum-exp (version 2, without dropout).
        deterministic: sum gradients in a fixed order.

    Returns:
        (B, S_q, H, C), and the log-sum-exp (B, H, S_q) float32 or None.
    """
    function = importlib.import_module(MODULES[version]).flash_attn_func
    return _outputs(
        function(q_BSHC, k_BSGC, v_BSGC, **_arguments(version, options, needs_lse, deterministic)), needs_lse
    )


def attention_varlen(
    version: int,
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
    needs_lse: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same for packed documents.

    Args:
        version: 2, 3 or 4.
        q_THC: queries of all documents, (T_q, H, C).
        k_TGC: keys, (T_k, G, C).
        v_TGC: values, likewise.
        cu_seqlens_q: (N + 1,) int32, where each document starts in ``q_THC``, and T_q.
        cu_seqlens_k: likewise for the keys.
        max_seqlen_q: the most queries that a document has.
        max_seqlen_k: the most keys.
        options: see `attention`.
        needs_lse: see `attention`.
        deterministic: see `attention`.

    Returns:
        (T_q, H, C), and the log-sum-exp (H, T_q) float32 or None.
    """
    function = importlib.import_module(MODULES[version]).flash_attn_varlen_func
    lengths = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }
    arguments = _arguments(version, options, needs_lse, deterministic)
    return _outputs(function(q_THC, k_TGC, v_TGC, **lengths, **arguments), needs_lse)


def _arguments(version: int, options: AttentionOptions, needs_lse: bool, deterministic: bool) -> dict[str, Any]:
    """Our options as keywords of that version."""
    no_limit = None if version == 4 else -1
    # They spell causal attention as a flag, which also picks their quicker programs.
    right = -1 if options.causal else options.right
    left, right_limit = (no_limit if limit < 0 else limit for limit in (options.left, right))
    arguments: dict[str, Any] = {
        "softmax_scale": options.scale,
        "causal": options.causal,
        "window_size": (left, right_limit),
        "softcap": options.softcap,
        "deterministic": deterministic,
    }
    if version == 2:
        arguments["dropout_p"] = options.dropout
        arguments["alibi_slopes"] = options.alibi_slopes
        arguments["return_attn_probs"] = needs_lse
    return arguments


def _outputs(
    returned: torch.Tensor | tuple[torch.Tensor, ...], needs_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some versions return the output alone, some a tuple that begins with it and the log-sum-exp."""
    if isinstance(returned, torch.Tensor):
        return returned, None
    return returned[0], returned[1] if needs_lse else None
