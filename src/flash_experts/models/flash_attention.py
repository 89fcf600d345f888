"""The attention function that GPT-2's blocks call, registered with transformers as ``fe_attention``.

Three kinds of input come here: a padded batch (with a mask where there is padding), one or more new queries against
a KV cache, and a packed row, many names in one row, whose boundaries come as ``cu_seq_lens_q`` (or are read off
``position_ids``). The first two go to PyTorch's fused scaled_dot_product_attention as they are. A packed row must not
attend across names: its names are laid side by side, as long as the longest, for the attention alone. They are short,
so that costs little; every other layer of the model still sees no padding.

Letters in the shapes: B batch, H heads, S length, T tokens of a packed row, N names in it, M length of the longest,
C width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION_IMPLEMENTATION = "fe_attention"  # a name with "flash" in it would be looked up on the hub


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
        module: the attention module (its ``is_causal`` is read for unpacked input).
        query: (B, H, S, C); key and value (B, H, S_k, C).
        key: see ``query``.
        value: see ``query``.
        attention_mask: (B, 1, S, S_k) true where a query may look, or None for plain causal.
        scaling: factor of the scores, 1 / sqrt(C) if None.
        dropout: probability that a weight is dropped.
        cu_seq_lens_q: (N + 1,) starts of the names of a packed row and T at the end.
        max_length_q: M; found from ``cu_seq_lens_q`` (one host synchronisation) if None.
        position_ids: (B, S); tells a packed row by its zeros where ``cu_seq_lens_q`` is not given.
        **kwargs: what transformers hands to every attention function.

    Returns:
        (B, S, H, C), and None for the weights, which are never formed.
    """
    if cu_seq_lens_q is None and attention_mask is None and query.shape[2] == key.shape[2] > 1:
        cu_seq_lens_q = _packed_starts(position_ids, query)
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"a packed row has batch size 1 and no KV cache, but query is {tuple(query.shape)} and key "
            f"{tuple(key.shape)}: pass use_cache=False and one row"
        )
    if max_length_q is None:
        max_length_q = int(cu_seq_lens_q.diff().max())
    return _packed_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling, dropout), None


def _packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """(1, H, T, C) three times to (1, T, H, C), each name attending to itself alone.

    Padding lies after each name's end. A causal query never looks that far, so no mask is needed.
    """
    num_names, total = cu_seq_lens.numel() - 1, query.shape[2]
    lengths_N = cu_seq_lens.diff()
    name_T = torch.repeat_interleave(torch.arange(num_names, device=query.device), lengths_N, output_size=total)
    # Where token t of the row lies among N * M places.
    place_T = torch.arange(total, device=query.device) + (max_length * name_T - cu_seq_lens[name_T])

    def unpack(x_1HTC: torch.Tensor) -> torch.Tensor:
        H, C = x_1HTC.shape[1], x_1HTC.shape[3]
        padded = x_1HTC.new_zeros(num_names * max_length, H, C)
        padded = padded.index_copy(0, place_T, x_1HTC[0].transpose(0, 1))
        return padded.view(num_names, max_length, H, C).transpose(1, 2)

    out_NHMC = F.scaled_dot_product_attention(
        unpack(query), unpack(key), unpack(value), dropout_p=dropout, is_causal=True, scale=scaling
    )
    return out_NHMC.transpose(1, 2).flatten(0, 1)[place_T][None]


def _packed_starts(position_ids: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """(N + 1,) starts of names if the positions of a single row start over somewhere, else None."""
    if position_ids is None or query.shape[0] != 1 or position_ids.shape[-1] != query.shape[2]:
        return None
    starts = (position_ids.reshape(-1) == 0).nonzero()[:, 0]
    if starts.numel() < 2:
        return None
    return F.pad(starts, (0, 1), value=query.shape[2]).to(torch.int32)


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


AttentionInterface.register(ATTENTION_IMPLEMENTATION, fe_attention_forward)
AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, fe_attention_mask)
