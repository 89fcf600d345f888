"""Attention by Dao-AILab's packages flash-attn 2, 3 and 4, where installed; imported on first use.

`flash_experts.models.attention_backends` has what each does not support. Shape suffixes as in `attention_sdpa`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths

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
    """Attention of a batch by flash-attn ``version`` 2, 3 or 4, differentiable in q, k and v.

    Float16 or bfloat16 on CUDA: (B, S_q, H, C), and the log-sum-exp (B, H, S_q) float32 or None. Version 2 alone has
    dropout (by torch's generator, not the seed), ALiBi, and the log-sum-exp (without dropout).
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
    lengths: PackedLengths,
    options: AttentionOptions,
    needs_lse: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` of packed documents: (T_q, H, C), and the log-sum-exp (H, T_q) float32 or None."""
    function = importlib.import_module(MODULES[version]).flash_attn_varlen_func
    arguments = _arguments(version, options, needs_lse, deterministic)
    return _outputs(function(q_THC, k_TGC, v_TGC, **lengths._asdict(), **arguments), needs_lse)


def _arguments(version: int, options: AttentionOptions, needs_lse: bool, deterministic: bool) -> dict[str, Any]:
    no_limit = None if version == 4 else -1
    # Causal attention is a flag there, which also selects faster kernels.
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
    """Some versions return the output alone, some a tuple that begins with output and log-sum-exp."""
    if isinstance(returned, torch.Tensor):
        return returned, None
    return returned[0], returned[1] if needs_lse else None
