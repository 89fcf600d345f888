"""A fast decoding step: one token per row through a GPT-2, dense or MoE, with a KV cache and few operations.

Anything but a plain GPT-2 (adapters, hooks, a forced attention backend) uses the model's own forward. On a CPU
activations stay float32.

Shape suffixes: B rows, D width, H heads, C head dim, K columns of the cache, V tokens of the vocabulary.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D
from transformers.utils import output_capturing

from flash_experts.kernels.cpu import linear, linear_gelu_tanh
from flash_experts.models.attention_backends import ENVIRONMENT_VARIABLE, forced_backend
from flash_experts.models.moe import GPT2MoEBlock, GPT2MoEForCausalLM
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import MoELayer, TopKRouter
from flash_experts.models.ring_cache import RingCache

_TANH_GELUS = (GELUTanh, NewGELUActivation)  # transformers' two classes of one function
_PLAIN = (nn.Embedding, nn.LayerNorm, nn.Linear, nn.Dropout, Conv1D, GPT2Attention)


def supports(model: PreTrainedModel) -> bool:
    """Whether `next_logits` is equal to the model's forward."""
    if type(model) not in (GPT2LMHeadModel, GPT2MoEForCausalLM):
        return False
    blocks: Any = model.transformer
    is_other = model.config.add_cross_attention or is_attention_forced(model) or has_hooks(model)
    return not is_other and all(map(_is_plain, blocks.h))


def is_attention_forced(model: PreTrainedModel) -> bool:
    """Whether an attention backend is forced: by context, environment or configuration."""
    config = model.config
    chosen = config.attention_backend if isinstance(config, GPT2MoEConfig) else "auto"
    return bool(forced_backend() or os.environ.get(ENVIRONMENT_VARIABLE) or chosen != "auto")


def has_hooks(model: nn.Module) -> bool:
    """Whether modules have hooks other than those that transformers leaves after recording outputs once."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    is_heard = any(hook.__module__ != output_capturing.__name__ for hook in hooks)
    return is_heard or any(module._forward_pre_hooks for module in model.modules())


def _is_plain(block: Any) -> bool:
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
    return is_known and all(type(module) in _PLAIN for module in own)


def next_logits(model: Any, tokens_B: torch.Tensor, cache: RingCache) -> torch.Tensor:
    """(B, V) float32 logits after one more int64 token per row; writes the next column of the cache."""
    body: Any = model.transformer
    mask_BK, positions_B1 = cache.step(tokens_B.device)
    dtype = activation_dtype(model)
    penalty_BK = torch.zeros(mask_BK.shape, dtype=dtype, device=tokens_B.device)
    penalty_BK.masked_fill_(~mask_BK, -torch.inf)
    # One row per head: (B * H, 1, K).
    penalty_N1K = penalty_BK.repeat_interleave(model.config.n_head, 0)[:, None]
    x_BD = F.embedding(tokens_B, body.wte.weight).to(dtype) + F.embedding(positions_B1[:, 0], body.wpe.weight)
    for layer, block in enumerate(body.h):
        x_BD = x_BD + _attention(block.attn, _norm(block.ln_1, x_BD), cache, layer, penalty_N1K)
        x_BD = x_BD + _feed_forward(block.mlp, _norm(block.ln_2, x_BD))
    return _linear(_norm(body.ln_f, x_BD), model.lm_head.weight.T).float()


def activation_dtype(model: Any) -> torch.dtype:
    """The dtype of the residual stream, norms and KV cache."""
    weight: torch.Tensor = model.transformer.wte.weight  # `model.dtype` would go through all modules
    return torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype


def _norm(norm: nn.LayerNorm, x_BD: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x_BD, norm.normalized_shape, norm.weight.to(x_BD.dtype), norm.bias.to(x_BD.dtype), norm.eps)


def _linear(x_BD: torch.Tensor, weight_DF: torch.Tensor, bias_F: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` in the weights' dtype; (B, F) in that of ``x_BD``."""
    return linear(x_BD.to(weight_DF.dtype), weight_DF, bias_F).to(x_BD.dtype)


def _attention(
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


def _feed_forward(module: Any, x_BD: torch.Tensor) -> torch.Tensor:
    if not isinstance(module, MoELayer):
        return _mlp(module, x_BD)
    _, gates_BK, experts_BK = module.router(x_BD)
    short_BD = x_BD.to(module.experts.up_proj.dtype)
    out_BD: torch.Tensor = module.experts(short_BD, experts_BK, gates_BK.to(short_BD.dtype)).to(x_BD.dtype)
    return out_BD if module.shared_experts is None else out_BD + _mlp(module.shared_experts, x_BD)


def _mlp(module: Any, x_BD: torch.Tensor) -> torch.Tensor:
    fc, proj = module.c_fc, module.c_proj
    short_BD = x_BD.to(fc.weight.dtype)
    if isinstance(module.act, _TANH_GELUS):
        hidden_BF = linear_gelu_tanh(short_BD, fc.weight, fc.bias)
    else:
        hidden_BF = module.act(linear(short_BD, fc.weight, fc.bias))
    return linear(hidden_BF, proj.weight, proj.bias).to(x_BD.dtype)
