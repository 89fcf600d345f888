"""A fast decoding step: one token per row through a GPT-2 (dense or MoE) or Llama, with a KV cache and few operations.

Other models, and models with adapters, hooks or a forced attention backend, use their own forward.

Shape suffixes: B rows, D width, H heads, G key/value heads, N = B * G, R = H / G, C head dim, K columns of the cache, V
tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import output_capturing

from flash_experts.kernels.cpu import linear, linear_gelu_tanh
from flash_experts.models.attention_backends import requested
from flash_experts.models.moe import GPT2MoEBlock, GPT2MoEForCausalLM
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import MoELayer, TopKRouter
from flash_experts.models.ring_cache import RingCache

_TANH_GELUS = (GELUTanh, NewGELUActivation)  # transformers' two classes of one function
_GPT2_MODULES = (nn.Embedding, nn.LayerNorm, nn.Linear, nn.Dropout, Conv1D, GPT2Attention)
_LLAMA_MODULES = (LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, nn.Embedding, nn.Linear, nn.SiLU)


def supports(model: PreTrainedModel) -> bool:
    """Whether `next_logits` is equal to the model's forward."""
    inner: Any = model
    backend = model.config.attention_backend if isinstance(model.config, GPT2MoEConfig) else "auto"
    if requested(backend)[0] != "auto" or _has_hooks(model):
        return False
    if type(model) is LlamaForCausalLM:
        body = inner.model
        ends = [body.embed_tokens, body.norm, inner.lm_head]
        return all(type(end) in _LLAMA_MODULES for end in ends) and all(map(_is_plain_llama, body.layers))
    if type(model) not in (GPT2LMHeadModel, GPT2MoEForCausalLM) or model.config.add_cross_attention:
        return False
    body = inner.transformer
    ends = [body.wte, body.wpe, body.ln_f, inner.lm_head]
    return all(type(end) in _GPT2_MODULES for end in ends) and all(map(_is_plain_gpt2, body.h))


def _has_hooks(model: nn.Module) -> bool:
    """Whether modules have hooks other than those that transformers leaves after recording outputs once."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    is_heard = any(hook.__module__ != output_capturing.__name__ for hook in hooks)
    return is_heard or any(module._forward_pre_hooks for module in model.modules())


def _is_plain_gpt2(block: Any) -> bool:
    if type(block) not in (GPT2Block, GPT2MoEBlock) or type(block.attn) is not GPT2Attention:
        return False
    own = [block.ln_1, block.ln_2, *block.attn.modules()]
    if isinstance(block.mlp, MoELayer):
        # Router and experts are called as modules; only token choice is independent of the other rows.
        is_known = isinstance(block.mlp.router, TopKRouter) and "up_proj" in block.mlp.experts._parameters
        shared = block.mlp.shared_experts
        own += [] if shared is None else [shared.c_fc, shared.c_proj]
    else:
        is_known = type(block.mlp) is GPT2MLP
        own += [block.mlp.c_fc, block.mlp.c_proj] if is_known else []
    return is_known and all(type(module) in _GPT2_MODULES for module in own)


def _is_plain_llama(block: Any) -> bool:
    is_silu = type(block.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    return is_silu and all(type(part) in _LLAMA_MODULES or not list(part.parameters()) for part in block.modules())


def activation_dtype(model: Any) -> torch.dtype:
    """The dtype of residual stream, norms and KV cache: the weights', but at least float32 for GPT-2 on a CPU."""
    is_llama = isinstance(model, LlamaForCausalLM)
    weight: torch.Tensor = model.model.embed_tokens.weight if is_llama else model.transformer.wte.weight
    is_raised = not is_llama and weight.device.type == "cpu"
    return torch.promote_types(weight.dtype, torch.float32) if is_raised else weight.dtype


def next_logits(model: Any, tokens_B: torch.Tensor, cache: RingCache) -> torch.Tensor:
    """(B, V) float32 logits after one more token per row; writes the next column of the cache."""
    is_llama = isinstance(model, LlamaForCausalLM)
    mask_BK, positions_B1 = cache.step(tokens_B.device)
    penalty_BK = torch.zeros(mask_BK.shape, dtype=activation_dtype(model), device=tokens_B.device)
    penalty_BK.masked_fill_(~mask_BK, -torch.inf)
    heads = model.config.num_key_value_heads if is_llama else model.config.n_head
    penalty_N1K = penalty_BK.repeat_interleave(heads, 0)[:, None]
    forward = _llama_logits if is_llama else _gpt2_logits
    return forward(model, tokens_B, positions_B1, cache, penalty_N1K).float()


# --------------------------------------------------------------------------------------------------------------- GPT-2
def _gpt2_logits(
    model: Any, tokens_B: torch.Tensor, positions_B1: torch.Tensor, cache: RingCache, penalty_N1K: torch.Tensor
) -> torch.Tensor:
    body = model.transformer
    tokens_BD = F.embedding(tokens_B, body.wte.weight).to(penalty_N1K.dtype)
    x_BD = tokens_BD + F.embedding(positions_B1[:, 0], body.wpe.weight)
    for layer, block in enumerate(body.h):
        x_BD = x_BD + _gpt2_attention(block.attn, _layer_norm(block.ln_1, x_BD), cache, layer, penalty_N1K)
        x_BD = x_BD + _gpt2_feed_forward(block.mlp, _layer_norm(block.ln_2, x_BD))
    return _linear(_layer_norm(body.ln_f, x_BD), model.lm_head.weight.T)


def _layer_norm(norm: nn.LayerNorm, x_BD: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x_BD, norm.normalized_shape, norm.weight.to(x_BD.dtype), norm.bias.to(x_BD.dtype), norm.eps)


def _linear(x_BD: torch.Tensor, weight_DF: torch.Tensor, bias_F: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` in the weights' dtype."""
    return linear(x_BD.to(weight_DF.dtype), weight_DF, bias_F).to(x_BD.dtype)


def _gpt2_attention(
    module: Any, x_BD: torch.Tensor, cache: RingCache, layer: int, penalty_N1K: torch.Tensor
) -> torch.Tensor:
    (B, D), N = x_BD.shape, len(penalty_N1K)
    qkv_B3HC = _linear(x_BD, module.c_attn.weight, module.c_attn.bias).view(B, 3, N // B, -1)
    keys_BHKC, values_BHKC = cache.write(layer, qkv_B3HC[:, 1], qkv_B3HC[:, 2])
    C, K = keys_BHKC.shape[3], keys_BHKC.shape[2]
    q_N1C = qkv_B3HC[:, 0].reshape(N, 1, C)
    scores_N1K = torch.baddbmm(penalty_N1K, q_N1C, keys_BHKC.view(N, K, C).transpose(1, 2), alpha=module.scaling)
    out_BD = torch.bmm(scores_N1K.softmax(-1), values_BHKC.view(N, K, C)).view(B, D)
    return _linear(out_BD, module.c_proj.weight, module.c_proj.bias)


def _gpt2_feed_forward(module: Any, x_BD: torch.Tensor) -> torch.Tensor:
    if not isinstance(module, MoELayer):
        return _gpt2_mlp(module, x_BD)
    _, gates_BK, experts_BK = module.router(x_BD)
    short_BD = x_BD.to(module.experts.up_proj.dtype)
    out_BD: torch.Tensor = module.experts(short_BD, experts_BK, gates_BK.to(short_BD.dtype)).to(x_BD.dtype)
    return out_BD if module.shared_experts is None else out_BD + _gpt2_mlp(module.shared_experts, x_BD)


def _gpt2_mlp(module: Any, x_BD: torch.Tensor) -> torch.Tensor:
    fc, proj = module.c_fc, module.c_proj
    short_BD = x_BD.to(fc.weight.dtype)
    if isinstance(module.act, _TANH_GELUS):
        hidden_BF = linear_gelu_tanh(short_BD, fc.weight, fc.bias)
    else:
        hidden_BF = module.act(linear(short_BD, fc.weight, fc.bias))
    return linear(hidden_BF, proj.weight, proj.bias).to(x_BD.dtype)


# --------------------------------------------------------------------------------------------------------------- Llama
def _llama_logits(
    model: Any, tokens_B: torch.Tensor, positions_B1: torch.Tensor, cache: RingCache, penalty_N1K: torch.Tensor
) -> torch.Tensor:
    body = model.model
    x_BD = F.embedding(tokens_B, body.embed_tokens.weight)
    rotary_B1C = body.rotary_emb(x_BD, positions_B1)
    for layer, block in enumerate(body.layers):
        h_BD = _rms_norm(block.input_layernorm, x_BD)
        x_BD = x_BD + _llama_attention(block.self_attn, h_BD, cache, layer, penalty_N1K, rotary_B1C)
        h_BD, mlp = _rms_norm(block.post_attention_layernorm, x_BD), block.mlp
        x_BD = x_BD + _apply(mlp.down_proj, F.silu(_apply(mlp.gate_proj, h_BD)) * _apply(mlp.up_proj, h_BD))
    return _apply(model.lm_head, _rms_norm(body.norm, x_BD))


def _rms_norm(norm: Any, x_BD: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x_BD, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _apply(module: nn.Linear, x_BD: torch.Tensor) -> torch.Tensor:
    return linear(x_BD, module.weight.T, module.bias)


def _llama_attention(
    module: Any,
    x_BD: torch.Tensor,
    cache: RingCache,
    layer: int,
    penalty_N1K: torch.Tensor,
    rotary_B1C: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    B, C, N = len(x_BD), module.head_dim, len(penalty_N1K)
    q_BHC = _rotated(_apply(module.q_proj, x_BD).view(B, -1, C), *rotary_B1C)
    k_BGC = _rotated(_apply(module.k_proj, x_BD).view(B, -1, C), *rotary_B1C)
    v_BGC = _apply(module.v_proj, x_BD).view(B, -1, C)
    keys_BGKC, values_BGKC = cache.write(layer, k_BGC, v_BGC)
    K = keys_BGKC.shape[2]
    keys_NCK, values_NKC = keys_BGKC.view(N, K, C).transpose(1, 2), values_BGKC.view(N, K, C)
    q_NRC = q_BHC.reshape(N, module.num_key_value_groups, C)  # the R heads that share keys
    scores_NRK = torch.bmm(q_NRC, keys_NCK).mul_(module.scaling).add_(penalty_N1K)
    return _apply(module.o_proj, torch.bmm(scores_NRK.softmax(-1), values_NKC).view(B, -1))


def _rotated(x_BHC: torch.Tensor, cos_B1C: torch.Tensor, sin_B1C: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (RoPE, Su et al. 2021), pairing the halves of a head."""
    first, second = x_BHC.chunk(2, dim=-1)
    return x_BHC * cos_B1C + torch.cat([-second, first], dim=-1) * sin_B1C
