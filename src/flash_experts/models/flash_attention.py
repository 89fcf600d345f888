"""The attention function that GPT-2's blocks call, registered with transformers as ``fe_attention``.

A padding mask goes to PyTorch's SDPA; the rest, also packed sequences (names in one row that must not attend to each
other), goes without mask to the backend that `flash_experts.models.attention_backends` chooses.

Shape suffixes as in `flash_experts.kernels.attention_options`; E tokens of packed names, each with its prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, GPT2Config, LlamaConfig, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from flash_experts.models.attention_backends import PADDING_MASK, attention, attention_varlen, choose
from flash_experts.models.moe_config import GPT2MoEConfig

ATTENTION_IMPLEMENTATION = "fe_attention"  # a name with "flash" in it would be looked up on the hub
_NOT_PACKED = ("position_bias", "softcap", "sliding_window")  # arguments of models other than GPT-2 and Llama


def separates_packed_sequences(config: PretrainedConfig) -> bool:
    """Whether the model's blocks pass the boundaries of a packed sequence to the attention function."""
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
    packed_row_of: torch.Tensor | None = None,
    packed_copy_of: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (B, H, S, C) with the signature of transformers' attention functions; returns (B, S, H, C), None.

    Args:
        attention_mask: (B, 1, S, S_k), true where a query attends; None for causal attention.
        cu_seq_lens_q: (N + 1,) starts of the names of a packed sequence, and E.
        max_length_q: M; None reads it from ``cu_seq_lens_q`` (one host synchronisation).
        position_ids: (B, S); without ``cu_seq_lens_q``, a jump in them starts another document.
        packed_row_of: (E,) where names share prompts (`flash_experts.data.packing.PackedBatch`), place of each token.
        packed_copy_of: (S,) first copy of each token.
    """
    config = getattr(module, "config", None)
    backend = config.attention_backend if isinstance(config, GPT2MoEConfig) else "auto"
    if cu_seq_lens_q is None and attention_mask is None and query.shape[2] == key.shape[2] > 1:
        cu_seq_lens_q = packed_starts(position_ids, query.shape[0], query.shape[2])
    if packed_row_of is not None:
        assert packed_copy_of is not None and cu_seq_lens_q is not None, "PackedBatch.inputs has all three"
        query, key, value = (_copies(x, packed_row_of) for x in (query, key, value))
    if cu_seq_lens_q is not None:
        if unsupported := [name for name in _NOT_PACKED if kwargs.get(name) is not None]:
            raise ValueError(
                f"packed sequences do not support {', '.join(unsupported)}: use attn_implementation='sdpa'"
            )
        out_BSHC = _packed(query, key, value, cu_seq_lens_q, max_length_q, scaling, dropout, backend)
        return (out_BSHC if packed_copy_of is None else out_BSHC[:, packed_copy_of]), None
    if attention_mask is not None or _needs_sdpa_function(kwargs):
        choose(backend, query.device.type, query.dtype, (PADDING_MASK,))  # an error if another is forced
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    S = query.shape[2]
    is_causal = module.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
    if is_causal and 1 < S < key.shape[2]:
        # Prefill of a static cache: the entries after these tokens are not written yet.
        key, value = key[:, :, :S], value[:, :, :S]
    options = _options(query, 0 if is_causal else -1, scaling, dropout)
    q_BSHC, k_BSGC, v_BSGC = (x.transpose(1, 2) for x in (query, key, value))
    is_deterministic = torch.are_deterministic_algorithms_enabled()  # custom kernels must check it themselves
    return attention(q_BSHC, k_BSGC, v_BSGC, options, backend=backend, deterministic=is_deterministic)[0], None


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
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"a packed sequence has batch size 1 and no KV cache, but query is {tuple(query.shape)} and key "
            f"{tuple(key.shape)}: pass use_cache=False and one sequence"
        )
    if max_length is None:
        max_length = int(cu_seq_lens.diff().max())
    q_THC, k_THC, v_THC = (x[0].transpose(0, 1) for x in (query, key, value))
    lengths, options = PackedLengths.of(cu_seq_lens, max_length), _options(query, 0, scaling, dropout)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    out_THC, _ = attention_varlen(
        q_THC, k_THC, v_THC, lengths, options, backend=backend, deterministic=is_deterministic
    )
    return out_THC[None]


def _copies(x_1HTC: torch.Tensor, row_of_E: torch.Tensor) -> torch.Tensor:
    """(1, H, E, C), as an embedding, whose backward is the fast sum over copies."""
    rows_TD = x_1HTC[0].transpose(0, 1).flatten(1)
    return F.embedding(row_of_E, rows_TD).unflatten(1, (x_1HTC.shape[1], -1)).transpose(0, 1)[None]


def _options(query: torch.Tensor, right: int, scaling: float | None, dropout: float) -> AttentionOptions:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout == 0:
        return AttentionOptions(scale, right=right)
    # Drawn on the device, without a synchronisation; torch.manual_seed and activation checkpointing replay it.
    seed = torch.randint(2**63 - 1, (1,), device=query.device)
    return AttentionOptions(scale, right=right, dropout=dropout, seed=seed)


def _needs_sdpa_function(kwargs: dict[str, Any]) -> bool:
    """Whether only transformers' SDPA function supports the call (models other than GPT-2)."""
    return bool(kwargs.get("output_attentions")) or any(
        kwargs.get(name) is not None for name in (*_NOT_PACKED, "cache")
    )


def packed_starts(position_ids: torch.Tensor | None, rows: int, length: int) -> torch.Tensor | None:
    """(N + 1,) int32 starts of packed documents (where a position jumps), and ``length``; None for a single one."""
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
    packed_copy_of: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, int]:
    """(T,) number of each token's document, or row of a batch, and their count. A shared prompt is its first name's."""
    num_rows, length = hidden.shape[:2]
    token_T = torch.arange(num_rows * length, device=hidden.device)
    if cu_seq_lens_q is None:
        cu_seq_lens_q = packed_starts(position_ids, num_rows, length)
    if cu_seq_lens_q is None:
        return token_T // max(length, 1), num_rows
    places_T = token_T if packed_copy_of is None else packed_copy_of
    return torch.searchsorted(cu_seq_lens_q[1:].long(), places_T, right=True), len(cu_seq_lens_q) - 1


def fe_attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    config: PretrainedConfig | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """SDPA's mask, but no (T, T) mask for a packed sequence of a model that `separates_packed_sequences`."""
    # For that transformers sets allow_is_causal_skip=False. An exported graph cannot depend on where documents start.
    is_packed = attention_mask is None and not allow_is_causal_skip and batch_size == 1 and q_length == kv_length > 1
    is_exported = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if is_packed and not is_exported and (config is None or separates_packed_sequences(config)):
        return None
    kwargs |= {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "config": config}
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


AttentionInterface.register(ATTENTION_IMPLEMENTATION, fe_attention_forward)
AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, fe_attention_mask)
