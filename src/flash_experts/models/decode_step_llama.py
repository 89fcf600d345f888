"""A fast decoding step for Llama models, as `decode_step_gpt2`, whose shape suffixes it uses; G key/value heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from flash_experts.kernels.cpu import linear
from flash_experts.models.decode_step_gpt2 import has_hooks, is_attention_forced
from flash_experts.models.ring_cache import RingCache

_PLAIN = (LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, nn.Linear, nn.SiLU)


def supports(model: PreTrainedModel) -> bool:
    """Whether `next_logits` is equal to the model's forward."""
    if type(model) is not LlamaForCausalLM or is_attention_forced(model) or has_hooks(model):
        return False
    body: Any = model.model
    parts = [module for block in body.layers for module in block.modules()]
    is_silu = all(type(block.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for block in body.layers)
    return is_silu and all(type(part) in _PLAIN or not list(part.parameters()) for part in parts)


def next_logits(model: Any, tokens_B: torch.Tensor, cache: RingCache) -> torch.Tensor:
    """As `decode_step_gpt2.next_logits`."""
    body: Any = model.model
    mask_BK, positions_B1 = cache.step(tokens_B.device)
    x_BD = F.embedding(tokens_B, body.embed_tokens.weight)
    penalty_BK = torch.zeros(mask_BK.shape, dtype=x_BD.dtype, device=x_BD.device).masked_fill_(~mask_BK, -torch.inf)
    penalty_N1K = penalty_BK.repeat_interleave(model.config.num_key_value_heads, 0)[:, None]  # N = B * G
    rotary_B11C = body.rotary_emb(x_BD, positions_B1)
    for layer, block in enumerate(body.layers):
        h_BD = _norm(block.input_layernorm, x_BD)
        x_BD = x_BD + _attention(block.self_attn, h_BD, cache, layer, penalty_N1K, rotary_B11C)
        h_BD, mlp = _norm(block.post_attention_layernorm, x_BD), block.mlp
        x_BD = x_BD + _linear(mlp.down_proj, F.silu(_linear(mlp.gate_proj, h_BD)) * _linear(mlp.up_proj, h_BD))
    return _linear(model.lm_head, _norm(body.norm, x_BD)).float()


def activation_dtype(model: Any) -> torch.dtype:
    """The dtype of norms and KV cache: that of the weights."""
    weight: torch.Tensor = model.model.embed_tokens.weight
    return weight.dtype


def _norm(norm: Any, x_BD: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x_BD, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _linear(module: nn.Linear, x_BD: torch.Tensor) -> torch.Tensor:
    return linear(x_BD, module.weight.T, module.bias)


def _attention(
    module: Any,
    x_BD: torch.Tensor,
    cache: RingCache,
    layer: int,
    penalty_N1K: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    B, C, N = len(x_BD), module.head_dim, len(penalty_N1K)
    cos_B1C, sin_B1C = rotary
    q_BHC = _rotated(_linear(module.q_proj, x_BD).view(B, -1, C), cos_B1C, sin_B1C)
    k_BGC = _rotated(_linear(module.k_proj, x_BD).view(B, -1, C), cos_B1C, sin_B1C)
    v_BGC = _linear(module.v_proj, x_BD).view(B, -1, C)
    keys_BGKC, values_BGKC = cache.write(layer, k_BGC, v_BGC)
    K = keys_BGKC.shape[2]
    keys_NCK, values_NKC = keys_BGKC.view(N, K, C).transpose(1, 2), values_BGKC.view(N, K, C)
    q_NRC = q_BHC.reshape(N, module.num_key_value_groups, C)  # the heads that share keys
    scores_NRK = torch.bmm(q_NRC, keys_NCK).mul_(module.scaling).add_(penalty_N1K)
    return _linear(module.o_proj, torch.bmm(scores_NRK.softmax(-1), values_NKC).view(B, -1))


def _rotated(x_BHC: torch.Tensor, cos_B1C: torch.Tensor, sin_B1C: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (RoPE, Su et al. 2021), pairing the halves of a head."""
    first, second = x_BHC.chunk(2, dim=-1)
    return x_BHC * cos_B1C + torch.cat([-second, first], dim=-1) * sin_B1C
