"""Problems of the attention benchmark, and what is measured on them: our kernels and baselines.

A problem is a batch, packed card names or decoding, with exact results in float64. Each of `IMPLEMENTATIONS` makes a
`Trial` of one, or raises an error that the report shows.

Shape suffixes: B batch, S sequence length, H heads, C head dim, T tokens of a packed sequence, N names in it, M longest
name, R tokens of the names that are compared with float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_experts.benchmarks.timing import Lap
from flash_experts.kernels import attention_libraries, flash_attention_reference
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from flash_experts.models.attention_backends import is_installed

Tensors = tuple[torch.Tensor, ...]
_CHECKED_NAMES = 32  # first and last names of a packed sequence


@dataclass(frozen=True, slots=True)
class Trial:
    """One implementation on one problem.

    Without ``dout``, the gradient of the output, only the forward runs; ``pick`` selects the part of output and
    gradients that is compared with the exact result; ``context`` is around several passes.
    """

    attend: Callable[..., torch.Tensor]
    inputs: Tensors
    dout: torch.Tensor | None
    pick: Callable[[torch.Tensor], torch.Tensor]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def run(self, lap: Lap) -> Tensors:
        """Returns the output and the gradients of q, k and v; calls ``lap`` after forward and backward."""
        with torch.set_grad_enabled(self.dout is not None):
            out = self.attend(*self.inputs)
        lap()
        if self.dout is None:
            return (out,)
        gradients = torch.autograd.grad(out, self.inputs, self.dout)
        lap()
        return out, *gradients

    def picked(self) -> Tensors:
        return tuple(self.pick(x.detach()) for x in self.run(lambda: None))


def exact(q_BSHC: torch.Tensor, k_BSHC: torch.Tensor, v_BSHC: torch.Tensor, causal: bool, dout: Any = None) -> Tensors:
    """Computes softmax attention in float64, one head at a time: the output, and with ``dout`` the gradients."""
    heads = []
    for h in range(q_BSHC.shape[2]):
        q, k, v = (x[:, :, h].detach().double().requires_grad_(dout is not None) for x in (q_BSHC, k_BSHC, v_BSHC))
        scores_BSS = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if causal:
            S_q, S_k = scores_BSS.shape[1:]
            hidden_SS = torch.ones(S_q, S_k, dtype=torch.bool, device=q.device).triu(S_k - S_q + 1)
            scores_BSS = scores_BSS.masked_fill(hidden_SS, -torch.inf)
        out = scores_BSS.softmax(-1) @ v
        gradients = () if dout is None else torch.autograd.grad(out, (q, k, v), dout[:, :, h].double())
        heads.append((out.detach(), *gradients))
    return tuple(torch.stack(parts, 2) for parts in zip(*heads, strict=True))


def _leaves(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensors:
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    return (*(x.requires_grad_() for x in (q, k, v)), dout)


class _Problem:
    qkv: Tensors
    dout: Any = None  # gradient of the output; without one only the forward runs

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def trial(self, attend: Callable[..., torch.Tensor], context: Any = nullcontext) -> Trial:
        return Trial(attend, self.qkv, self.dout, self.pick, context)

    padded_trial = trial  # all sequences have the same length


class BatchProblem(_Problem):
    """Self-attention of B sequences of one length, as in training; q, k and v are (B, S, H, C)."""

    def __init__(
        self, batch: int, length: int, heads: int, head_dim: int, causal: bool, device: torch.device, dtype: torch.dtype
    ):
        self.batch, self.length, self.heads, self.head_dim, self.causal = batch, length, heads, head_dim, causal
        self.device, self.dtype = device, dtype
        *qkv, self.dout = _leaves((batch, length, heads, head_dim), device, dtype)
        self.qkv = tuple(qkv)
        self.options = AttentionOptions(head_dim**-0.5, right=0 if causal else -1)

    @property
    def flops(self) -> float:
        """FLOPs of the forward; the backward has 2.5 times as many."""
        return 4 * self.batch * self.length**2 * self.heads * self.head_dim / (2 if self.causal else 1)

    def pick(self, x_BSHC: torch.Tensor) -> torch.Tensor:
        return x_BSHC[-1:, :, [0, -1]]

    def truth(self) -> Tensors:
        q, k, v, dout = map(self.pick, (*self.qkv, self.dout))
        return exact(q, k, v, self.causal, dout)


class DecodeProblem(_Problem):
    """One new token for each of B sequences against its KV cache, in the layout of transformers: (B, H, S, C)."""

    causal = False  # one query attends to its whole cache

    def __init__(self, batch: int, length: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.batch, self.length, self.heads, self.head_dim = batch, length, heads, head_dim
        self.device, self.dtype = device, dtype
        shapes = ((batch, heads, 1, head_dim), *[(batch, heads, length, head_dim)] * 2)
        self.qkv = tuple(torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for shape in shapes)
        self.options = AttentionOptions(head_dim**-0.5)

    @property
    def bytes(self) -> int:
        """Minimum memory traffic of the forward: the KV cache, read once."""
        return self.qkv[1].nbytes + self.qkv[2].nbytes

    def pick(self, x_BSHC: torch.Tensor) -> torch.Tensor:
        return x_BSHC[-1:]

    def truth(self) -> Tensors:
        q, k, v = map(self.pick, self.qkv)
        return exact(q, k, v, False)


@dataclass(eq=False)
class PackedProblem(_Problem):
    """Causal attention within each of many card names: one packed sequence, or padded (untimed) for some baselines."""

    lengths: list[int]
    heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype
    causal: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        N, self.longest, self.tokens = len(self.lengths), max(self.lengths), sum(self.lengths)
        length_N = torch.tensor(self.lengths)
        self.cu_seqlens = F.pad(length_N.cumsum(0), (1, 0)).to(self.device, torch.int32)
        self.document_T = torch.repeat_interleave(length_N).to(self.device)
        place_T = torch.arange(self.tokens, device=self.device) - self.cu_seqlens[self.document_T]
        self.padded_place_T = self.document_T * self.longest + place_T
        *qkv, self.dout = _leaves((self.tokens, self.heads, self.head_dim), self.device, self.dtype)
        self.qkv = tuple(qkv)
        self.padded_qkv = tuple(self._padded(x.detach()).requires_grad_() for x in self.qkv)
        self.padded_dout = self._padded(self.dout)
        self.options = AttentionOptions(self.head_dim**-0.5, right=0)
        checked = [n for n in range(N) if n < _CHECKED_NAMES or n >= N - _CHECKED_NAMES]
        starts = self.cu_seqlens.tolist()
        self.checked = [slice(starts[n], starts[n + 1]) for n in checked]
        self.checked_R = torch.cat([torch.arange(s.start, s.stop, device=self.device) for s in self.checked])

    @property
    def bytes(self) -> int:
        """Minimum memory traffic of the forward: q, k and v read once, the output written."""
        return 4 * self.qkv[0].nbytes

    def _padded(self, x_THC: torch.Tensor) -> torch.Tensor:
        shape = (len(self.lengths), self.longest, *x_THC.shape[1:])
        flat = x_THC.new_zeros(shape[0] * shape[1], *shape[2:])
        return flat.index_copy(0, self.padded_place_T, x_THC).view(shape)

    def pick(self, x_THC: torch.Tensor) -> torch.Tensor:
        return x_THC[self.checked_R]

    def pick_padded(self, x_NMHC: torch.Tensor) -> torch.Tensor:
        return x_NMHC.flatten(0, 1)[self.padded_place_T[self.checked_R]]

    def truth(self) -> Tensors:
        names = []
        for rows in self.checked:
            q, k, v, dout = (x[None, rows] for x in (*self.qkv, self.dout))
            names.append(exact(q, k, v, True, dout))
        return tuple(torch.cat(parts, 1)[0] for parts in zip(*names, strict=True))

    def padded_trial(self, attend: Callable[..., torch.Tensor], context: Any = nullcontext) -> Trial:
        return Trial(attend, self.padded_qkv, self.padded_dout, self.pick_padded, context)


Problem = BatchProblem | DecodeProblem | PackedProblem


# --------------------------------------------------------------------------------------------------- implementations


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
    if not is_installed(module):
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

    return problem.padded_trial(attend, partial(sdpa_kernel, backend))


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

    return problem.padded_trial(attend)


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
