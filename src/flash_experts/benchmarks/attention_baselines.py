"""Implementations in the attention benchmark: our kernels, and baselines from PyTorch, transformers and flash-attn.

Each entry of `IMPLEMENTATIONS` makes a `Trial` of a problem, or raises an error that the report shows.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_experts.benchmarks.attention_problems import DecodeProblem, PackedProblem, Problem, Trial
from flash_experts.kernels import attention_libraries, flash_attention_reference
from flash_experts.kernels.attention_options import PackedLengths


class Unavailable(Exception):
    """The implementation cannot run here, with the reason."""


def _need_gpu(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise Unavailable("needs a GPU")


def _ours(attention: Callable[..., Any], attention_varlen: Callable[..., Any], problem: Problem) -> Trial:
    """Functions of `flash_experts.kernels` for a batch and for packed names."""
    if isinstance(problem, PackedProblem):
        lengths = PackedLengths.of(problem.cu_seqlens, problem.longest)
        return problem.trial(lambda q, k, v: attention_varlen(q, k, v, lengths, problem.options)[0])
    return problem.trial(lambda q, k, v: attention(q, k, v, problem.options)[0])


def _triton(problem: Problem) -> Trial:
    _need_gpu(problem)
    from flash_experts.kernels.flash_attention_triton import attention, attention_varlen

    return _ours(attention, attention_varlen, problem)


def _reference(problem: Problem) -> Trial:
    if problem.device.type == "cuda":
        raise Unavailable("loops over tiles in Python (reference code): not run on a GPU")
    return _ours(flash_attention_reference.attention, flash_attention_reference.attention_varlen, problem)


def _package(version: int, problem: Problem) -> Trial:
    _need_gpu(problem)
    module = attention_libraries.FLASH_ATTN_MODULES[version]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise Unavailable(f"the package with {module} is not installed")
    attention = partial(attention_libraries.flash_attn, version)
    return _ours(attention, partial(attention_libraries.flash_attn_varlen, version), problem)


def _sdpa(backend: SDPBackend, problem: Problem) -> Trial:
    """One backend of scaled_dot_product_attention, on names padded to the longest.

    It needs no padding mask: padding comes after each name, and attention is causal.
    """
    if problem.device.type != "cuda" and backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        raise Unavailable("needs a GPU")
    causal = problem.causal

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    def context() -> Any:
        return sdpa_kernel(backend)

    if isinstance(problem, PackedProblem):
        return problem.padded_trial(attend, context)
    return problem.trial(attend, context)


def _eager(problem: Problem) -> Trial:
    """transformers' eager attention, as GPT-2 calls it, on names padded to the longest."""
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, eager_attention_forward

    module = GPT2Attention(GPT2Config(n_embd=8, n_head=1), layer_idx=0).eval()
    mask = None
    if problem.causal:
        S = problem.longest if isinstance(problem, PackedProblem) else problem.length
        lowest = torch.finfo(problem.dtype).min
        mask = torch.full((S, S), lowest, dtype=problem.dtype, device=problem.device).triu(1)[None, None]
    scale = problem.options.scale

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return eager_attention_forward(module, q, k, v, mask, scaling=scale)[0]

    return problem.padded_trial(attend) if isinstance(problem, PackedProblem) else problem.trial(attend)


def _flex(problem: Problem) -> Trial:
    """FlexAttention, compiled for these shapes. The block mask is not timed, since all layers share it."""
    _need_gpu(problem)
    if isinstance(problem, DecodeProblem):
        raise Unavailable("would be compiled for each of many sizes: not run in decoding")
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # each size is compiled again; after eight, compilation would stop
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if isinstance(problem, PackedProblem):
        document_T, T = problem.document_T, problem.tokens

        def same_name(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return (document_T[i] == document_T[j]) & (i >= j)

        mask = create_block_mask(same_name, None, None, T, T, device=problem.device)

        def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

        return problem.trial(attend_packed)
    if problem.causal:
        S = problem.length
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device=problem.device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    return problem.trial(attend)


def _nested(problem: Problem) -> Trial:
    """SDPA on a jagged nested tensor, without padding."""
    if not isinstance(problem, PackedProblem):
        raise Unavailable("is for packed names")
    offsets = problem.cu_seqlens.to(torch.int64)
    shortest, longest = min(problem.lengths), problem.longest

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)
            for x in (q, k, v)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).values()

    return problem.trial(attend)


def _varlen_attn(problem: Problem) -> Trial:
    """torch.nn.attention.varlen, PyTorch's function for packed sequences since 2.10."""
    if not isinstance(problem, PackedProblem):
        raise Unavailable("is for packed names")
    _need_gpu(problem)
    from torch.nn.attention.varlen import varlen_attn

    # The argument for causal attention changed after its first release.
    parameters = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    cu, longest = problem.cu_seqlens, problem.longest

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = varlen_attn(q, k, v, cu, cu, longest, longest, **causal)
        assert isinstance(out, torch.Tensor)
        return out

    return problem.trial(attend)


IMPLEMENTATIONS: dict[str, Callable[[Any], Trial]] = {
    "triton": _triton,
    "sdpa": partial(_ours, attention_libraries.sdpa, attention_libraries.sdpa_varlen),
    "reference": _reference,
    "sdpa_flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa_math": partial(_sdpa, SDPBackend.MATH),
    "sdpa_nested": _nested,
    "varlen_attn": _varlen_attn,
    "flex": _flex,
    "eager": _eager,
    "flash_attention_2": partial(_package, 2),
    "flash_attention_3": partial(_package, 3),
    "flash_attention_4": partial(_package, 4),
}


# Backends of `config.attention_backend`, which `auto` chooses from.
SELECTABLE = ("triton", "sdpa", "reference", "flash_attention_2", "flash_attention_3", "flash_attention_4")
OURS = ("triton", "reference")
PACKED_ONLY = ("sdpa_nested", "varlen_attn")
