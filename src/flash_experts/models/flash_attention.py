"""The attention function that GPT-2's blocks call, registered with transformers as ``fe_attention``.

Three kinds of input come here: a padded batch (with a mask where there is padding), one or more new queries against
a KV cache, and a packed row, many names in one row, whose boundaries come as ``cu_seq_lens_q`` (or are read off
``position_ids``) and whose names must not attend to each other. A mask goes to PyTorch's scaled_dot_product_attention;
the rest goes, without mask and without copy, to the backend that `flash_experts.models.attention_backends` chooses.

Letters in the shapes: B batch, H heads, S length, T tokens of a packed row, N names in it, M length of the longest,
C width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, GPT2Config, LlamaConfig, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from flash_experts.kernels.attention_options import AttentionOptions
from flash_experts.models.attention_backends import attention, attention_varlen, choose_for_mask
from flash_experts.models.moe_config import GPT2MoEConfig

ATTENTION_IMPLEMENTATION = "fe_attention"  # a name with "flash" in it would be looked up on the hub


def keeps_packed_apart(config: PretrainedConfig) -> bool:
    """Whether a model with this attention keeps the names of a packed row apart: its blocks hand the row's boundaries
    on to the attention function."""
    return isinstance(config, GPT2Config | LlamaConfig)


def fe_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention as transformers' blocks call it.

    Args:
        module: the attention module. Read of it: ``is_causal`` for unpacked input, and ``config.attention_backend``.
        query: (B, H, S, C); key and value (B, H, S_k, C).
        key: see ``query``.
        value: see ``query``.
        attention_mask: (B, 1, S, S_k) true where a query may look, or None for plain causal.
        scaling: factor of the scores, 1 / sqrt(C) if None.
        dropout: probability that a weight is dropped.
        cu_seq_lens_q: (N + 1,) starts of the names of a packed row and T at the end.
        max_length_q: M; found from ``cu_seq_lens_q`` (one host synchronisation) if None.
        position_ids: (B, S); a jump in them starts another document where ``cu_seq_lens_q`` is not given.
        **kwargs: what transformers hands to every attention function.

    Returns:
        (B, S, H, C), and None for the weights, which are never formed.

    Raises:
        ValueError: a packed row with a batch or a cache, or a forced backend that cannot do the call.
    """
    backend = _configured_backend(module)
    if cu_seq_lens_q is None and attention_mask is None and query.shape[2] == key.shape[2] > 1:
        cu_seq_lens_q = packed_starts(position_ids, query.shape[0], query.shape[2])
    if cu_seq_lens_q is not None:
        return _packed(query, key, value, cu_seq_lens_q, max_length_q, scaling, dropout, backend), None
    if attention_mask is not None or _asks_more(kwargs):
        choose_for_mask(backend, query.device.type, query.dtype)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    S = query.shape[2]
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = module.is_causal
    if is_causal and 1 < S < key.shape[2]:
        # The first tokens of a static cache: what lies after them is not written yet.
        key, value = key[:, :, :S], value[:, :, :S]
    options = _options(query, -1 if not is_causal else 0, scaling, dropout)
    heads_last = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out_BSHC, _ = attention(*heads_last, options, backend=backend, deterministic=_deterministic())
    return out_BSHC, None


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int | None,
    scaling: float | None,
    dropout: float,
    backend: str,
) -> torch.Tensor:
    """(1, H, T, C) three times to (1, T, H, C), each name attending to itself alone."""
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"a packed row has batch size 1 and no KV cache, but query is {tuple(query.shape)} and key "
            f"{tuple(key.shape)}: pass use_cache=False and one row"
        )
    if max_length is None:
        max_length = int(cu_seq_lens.diff().max())
    q_THC, k_THC, v_THC = (x[0].transpose(0, 1) for x in (query, key, value))
    options = _options(query, 0, scaling, dropout)
    out_THC, _ = attention_varlen(
        q_THC,
        k_THC,
        v_THC,
        cu_seq_lens,
        cu_seq_lens,
        max_length,
        max_length,
        options,
        backend=backend,
        deterministic=_deterministic(),
    )
    return out_THC[None]


def _options(query: torch.Tensor, right: int, scaling: float | None, dropout: float) -> AttentionOptions:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout == 0:
        return AttentionOptions(scale, right=right)
    # Drawn on the device, without a wait for it; torch.manual_seed and activation checkpointing replay it.
    seed = torch.randint(2**63 - 1, (1,), device=query.device)
    return AttentionOptions(scale, right=right, dropout=dropout, seed=seed)


def _configured_backend(module: torch.nn.Module) -> str:
    """What the model's configuration says; a dense GPT-2's says nothing."""
    config = getattr(module, "config", None)
    return config.attention_backend if isinstance(config, GPT2MoEConfig) else "auto"


def _asks_more(kwargs: dict[str, Any]) -> bool:
    """Whether transformers asks for what only its own SDPA function does or refuses: other models than GPT-2 do."""
    more = ("position_bias", "softcap", "sliding_window", "cache")
    return bool(kwargs.get("output_attentions")) or any(kwargs.get(name) is not None for name in more)


def packed_starts(position_ids: torch.Tensor | None, rows: int, length: int) -> torch.Tensor | None:
    """(N + 1,) int32 starts of the documents of a single row, and ``length``; None where it is one document.

    A document starts wherever a position is not the last one plus one, as in transformers.
    """
    if position_ids is None or rows != 1 or position_ids.shape[-1] != length:
        return None
    later = (position_ids.reshape(-1).diff() != 1).nonzero()[:, 0] + 1
    if not later.numel():
        return None
    return F.pad(F.pad(later, (1, 0)), (0, 1), value=length).to(torch.int32)


def sequence_of_tokens(
    hidden: torch.Tensor,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, int]:
    """(T,) the sequence of each token, and how many there are: documents of a packed row, or rows of a batch."""
    num_rows, length = hidden.shape[:2]
    token_T = torch.arange(num_rows * length, device=hidden.device)
    if cu_seq_lens_q is None:
        cu_seq_lens_q = packed_starts(position_ids, num_rows, length)
    if cu_seq_lens_q is None:
        return token_T // max(length, 1), num_rows
    return torch.searchsorted(cu_seq_lens_q[1:].long(), token_T, right=True), len(cu_seq_lens_q) - 1


def fe_attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that transformers builds for `fe_attention_forward`: none for a packed row, else that of SDPA.

    Transformers asks for a full (T, T) mask of a packed row (it takes away the leave to skip the mask); we keep the
    names apart without one.
    """
    is_packed = attention_mask is None and not allow_is_causal_skip and batch_size == 1 and q_length == kv_length > 1
    if is_packed:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def _deterministic() -> bool:
    """Whether `torch.use_deterministic_algorithms` is on, which our own kernels have to look up for themselves."""
    return torch.are_deterministic_algorithms_enabled()


AttentionInterface.register(ATTENTION_IMPLEMENTATION, fe_attention_forward)
AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, fe_attention_mask)
