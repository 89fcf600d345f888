"""Attention by its definition, in float64: what every kernel is held to.

Letters in the shapes: B sequences, S length (q and k may differ), H query heads, G key/value heads, C width of a head,
T tokens of a packed row, N documents in it.
"""

from __future__ import annotations

import torch

from flash_experts.kernels.attention_options import AttentionOptions
from flash_experts.kernels.flash_attention_reference import dropout_keep_mask


def oracle(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    options: AttentionOptions,
    k_lengths_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with the whole matrix of weights, differentiable by autograd.

    Returns:
        (B, S, H, C) and the log-sum-exp of the scores (B, H, S) without gradient, both float64. A query that sees no
        key has output 0 and log-sum-exp -inf, and passes no gradient on.
    """
    B, S_q = q_BSHC.shape[:2]
    outputs = []
    for b in range(B):
        length = k_BSGC.shape[1] if k_lengths_B is None else int(k_lengths_B[b])
        outputs.append(_one_sequence(q_BSHC[b], k_BSGC[b, :length], v_BSGC[b, :length], options, b))
    if not outputs:
        return q_BSHC.double(), q_BSHC.new_zeros(0, q_BSHC.shape[2], S_q, dtype=torch.float64)
    return torch.stack([out for out, _ in outputs]), torch.stack([lse for _, lse in outputs])


def oracle_varlen(
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for packed documents: (T, H, C) and (H, T), each document seeing itself alone."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outputs = []
    for n in range(len(starts_q) - 1):
        queries, keys = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])
        outputs.append(_one_sequence(q_THC[queries], k_TGC[keys], v_TGC[keys], options, n))
    return torch.cat([out for out, _ in outputs]), torch.cat([lse for _, lse in outputs], dim=1)


def visible_keys(S_q: int, S_k: int, options: AttentionOptions, device: torch.device) -> torch.Tensor:
    """(S_q, S_k) true where a query may look."""
    distance = _distance(S_q, S_k, device)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if options.right >= 0:
        visible &= distance >= -options.right
    if options.left >= 0:
        visible &= distance <= options.left
    return visible


def _distance(S_q: int, S_k: int, device: torch.device) -> torch.Tensor:
    """(S_q, S_k): how far before the query's own place the key lies; the last query's place is the last key."""
    return (torch.arange(S_q, device=device) + S_k - S_q)[:, None] - torch.arange(S_k, device=device)


def _one_sequence(
    q_SHC: torch.Tensor, k_SGC: torch.Tensor, v_SGC: torch.Tensor, options: AttentionOptions, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    S_q, H, _ = q_SHC.shape
    S_k, G, _ = k_SGC.shape
    q, k, v = (x.double().transpose(0, 1) for x in (q_SHC, k_SGC, v_SGC))
    k, v = (x.repeat_interleave(H // G, dim=0) for x in (k, v))
    scores = options.scale * (q @ k.transpose(1, 2))
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        slopes_H = options.alibi_slopes if options.alibi_slopes.dim() == 1 else options.alibi_slopes[number]
        scores = scores - slopes_H.double()[:, None, None] * _distance(S_q, S_k, q.device).abs()
    scores = scores.masked_fill(~visible_keys(S_q, S_k, options, q.device), -torch.inf)
    lse = scores.detach().logsumexp(-1) if S_k else scores.new_full((H, S_q), -torch.inf)
    # exp(score - lse) is the softmax; its gradient needs the sum to be part of the graph, and no inf - inf.
    shift = lse.masked_fill(lse == -torch.inf, 0)[..., None]
    exponentials = (scores - shift).exp()
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / total.masked_fill(total == 0, 1)
    if options.seed is not None:
        keep = dropout_keep_mask(options.seed, range(number, number + 1), H, S_q, S_k, options.dropout)[0]
        weights = weights * keep / (1 - options.dropout)
    return (weights @ v).transpose(0, 1), lse
