"""Which kernel computes an attention: a registry, a choice, and one log line that says why.

The names, each with the same two functions behind it:

    reference            flash attention in plain PyTorch, to be read; every option, any device
    triton               our kernel for GPUs
    sdpa                 PyTorch's scaled_dot_product_attention
    flash_attention_2, flash_attention_3, flash_attention_4       Dao-AILab's packages, where they are installed
    auto                 the first of `preferences` that can do the call

A name is taken from, first to last: the context manager `attention_backend`, the environment variable
``FLASH_EXPERTS_ATTENTION``, a model's ``config.attention_backend``, ``auto``. Under ``torch.compile`` the choice is
made while tracing and becomes part of the compiled graph.

Letters in the shapes: B sequences, S length, H query heads, G key/value heads, C width of a head, T tokens of a packed
row, N documents in it.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch

from flash_experts.kernels import attention_packages, attention_sdpa, flash_attention_reference
from flash_experts.kernels.attention_options import AttentionOptions

ENVIRONMENT_VARIABLE = "FLASH_EXPERTS_ATTENTION"

_logger = logging.getLogger(__name__)
_forced: ContextVar[str | None] = ContextVar("attention_backend", default=None)
_HALF = frozenset({torch.float16, torch.bfloat16})
_PADDING_MASK = "a padding mask"
_ODD_SCALE = "scales of zero and below"


@dataclass(frozen=True, slots=True)
class Backend:
    """What one kernel can do.

    Attributes:
        dtypes: of the inputs.
        lacks: what it cannot do, in the words of `_asked`.
        devices: types of device that it runs on; None is any.
        package: the package (or module) that must be installed, or None.
    """

    dtypes: frozenset[torch.dtype]
    lacks: frozenset[str]
    devices: frozenset[str] | None = None
    package: str | None = None

    def obstacle(self, device_type: str, dtype: torch.dtype, asked: tuple[str, ...]) -> str | None:
        """Why it cannot do a call, or None if it can."""
        if self.devices is not None and device_type not in self.devices:
            return f"it runs on {_listed(self.devices)}, not on {device_type}"
        if dtype not in self.dtypes:
            return f"it takes {_listed(map(_plain, self.dtypes))}, not {_plain(dtype)}"
        lacking = [feature for feature in asked if feature in self.lacks]
        if lacking:
            return f"it does not do {_listed(lacking)}"
        if self.package is not None and not _is_installed(self.package):
            return f"the package that has {self.package} is not installed"
        return None


class _TritonBackend(Backend):
    """On a CPU it needs Triton's interpreter, which Triton reads from the environment when it is first imported."""

    def obstacle(self, device_type: str, dtype: torch.dtype, asked: tuple[str, ...]) -> str | None:
        obstacle = Backend.obstacle(self, device_type, dtype, asked)
        if obstacle is None and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "on a CPU it runs only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        return obstacle


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module would be in
        return False


def _package(version: int, *lacks: str) -> Backend:
    common = {"key lengths", _PADDING_MASK, _ODD_SCALE, "head dims that are no multiple of 8", "head dims over 256"}
    return Backend(_HALF, frozenset(lacks) | common, frozenset({"cuda"}), attention_packages.MODULES[version])


_SINGLE = _HALF | {torch.float32}
_NOT_IN_3_AND_4 = ("dropout", "ALiBi", "the log-sum-exp")
BACKENDS: dict[str, Backend] = {
    "reference": Backend(_SINGLE | {torch.float64}, frozenset({_PADDING_MASK})),
    "triton": _TritonBackend(
        _SINGLE,
        frozenset({_PADDING_MASK, _ODD_SCALE, "head dims under 16", "head dims over 256"}),
        frozenset({"cuda", "cpu"}),
        "triton",
    ),
    "sdpa": Backend(
        _SINGLE | {torch.float64},
        frozenset({"softcap", "ALiBi", "the log-sum-exp", "deterministic gradients on CUDA", _ODD_SCALE}),
    ),
    "flash_attention_2": _package(2, "dropout with softcap", "the log-sum-exp with dropout"),
    "flash_attention_3": _package(3, *_NOT_IN_3_AND_4),
    "flash_attention_4": _package(4, *_NOT_IN_3_AND_4, "head dims over 128"),
}
NAMES = (*BACKENDS, "auto")


def preferences(device_type: str, dtype: torch.dtype, packed: bool = False) -> tuple[str, ...]:
    """The order in which ``auto`` asks the backends; the first that can do the call does it.

    On a GPU our kernel comes first where PyTorch's would multiply padding, for packed rows, and where they do not
    reach. For plain batches it has to be measured faster first: where ``flash-experts benchmark attention`` shows
    that for a head dim or a length, this is the place to say so.
    """
    if device_type != "cuda":
        return "sdpa", "reference"
    return ("triton", "sdpa", "reference") if packed and dtype in _HALF else ("sdpa", "triton", "reference")


def check_name(name: str, source: str) -> str:
    """The name of a backend as it is, or a ValueError that says where it came from and what is near it."""
    if name in NAMES:
        return name
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{source}: there is no attention backend {name!r}; {hint}Known: {', '.join(NAMES)}")


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Every attention within this context goes to the named backend; ``auto`` undoes what is set outside.

    Raises:
        ValueError: an unknown name; and, from the attention itself, a call that the backend cannot do.
    """
    token = _forced.set(check_name(name, "attention_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """What the innermost `attention_backend` context asks for."""
    return _forced.get()


@torch.compiler.assume_constant_result
def choose(
    config_backend: str, device_type: str, dtype: torch.dtype, asked: tuple[str, ...] = (), packed: bool = False
) -> str:
    """The name of the backend for a call.

    Args:
        config_backend: what the model's configuration says.
        device_type: of the inputs.
        dtype: of the inputs.
        asked: what the call asks beyond plain attention, in the words of `_asked`.
        packed: whether it is one of packed documents.

    Raises:
        ValueError: an unknown name, or a forced backend that cannot do the call.
    """
    name, source = _forced.get(), "attention_backend()"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE
    if not name:
        name, source = config_backend, "config.attention_backend"
    return _choose(name, source, device_type, dtype, asked, packed)


@lru_cache(maxsize=1024)
def _choose(name: str, source: str, device_type: str, dtype: torch.dtype, asked: tuple[str, ...], packed: bool) -> str:
    """Cached, so each choice is made and logged once."""
    check_name(name, source)
    call = f"{'packed ' if packed else ''}{_plain(dtype)} on {device_type}"
    call += f" with {_listed(asked)}" if asked else ""
    obstacles: list[str] = []
    for candidate in preferences(device_type, dtype, packed) if name == "auto" else (name,):
        obstacle = BACKENDS[candidate].obstacle(device_type, dtype, asked)
        if obstacle is None:
            reason = f"forced by {source}" if name != "auto" else "; ".join(obstacles) or "first choice there"
            _logger.info("attention of %s: %s (%s)", call, candidate, reason)
            return candidate
        obstacles.append(f"{candidate}: {obstacle}")
    able = [known for known, other in BACKENDS.items() if other.obstacle(device_type, dtype, asked) is None]
    advice = f"use {' or '.join(able)}" if able else "no backend can"
    raise ValueError(f"{source} = {name!r} cannot do attention of {call} ({'; '.join(obstacles)}): {advice}")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))


def _asked(
    q: torch.Tensor, options: AttentionOptions, has_lengths: bool, needs_lse: bool, deterministic: bool
) -> tuple[str, ...]:
    """What a call asks beyond plain attention. Comparisons, no numbers: under torch.compile they are constants."""
    head_dim = q.shape[-1]
    features = (
        ("head dims under 16", head_dim < 16),
        ("head dims over 128", head_dim > 128),
        ("head dims over 256", head_dim > 256),
        ("head dims that are no multiple of 8", head_dim % 8 != 0),
        (_ODD_SCALE, options.scale <= 0),
        ("softcap", options.softcap > 0),
        ("ALiBi", options.alibi_slopes is not None),
        ("dropout", options.dropout > 0),
        ("dropout with softcap", options.dropout > 0 and options.softcap > 0),
        ("key lengths", has_lengths),
        ("the log-sum-exp", needs_lse),
        ("the log-sum-exp with dropout", needs_lse and options.dropout > 0),
        ("deterministic gradients on CUDA", deterministic and q.device.type == "cuda"),
    )
    return tuple(name for name, is_asked in features if is_asked)


def attention(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    options: AttentionOptions,
    k_lengths_B: torch.Tensor | None = None,
    *,
    backend: str = "auto",
    needs_lse: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a batch by the backend that is chosen for it, differentiable in q, k and v.

    Args:
        q_BSHC: queries, (B, S_q, H, C), any strides.
        k_BSGC: keys, (B, S_k, G, C); query head h uses key/value head h // (H / G).
        v_BSGC: values, likewise.
        options: see `AttentionOptions`.
        k_lengths_B: (B,) int32, keys of each row in use; the rest of the cache is ignored.
        backend: the name that a configuration gives; context manager and environment override it.
        needs_lse: the log-sum-exp is wanted, too.
        deterministic: gradients must be the same, bit for bit, every time.

    Returns:
        (B, S_q, H, C) in the dtype of q; the log-sum-exp (B, H, S_q) if it was asked for, else perhaps None.

    Raises:
        ValueError: an unknown name, or a forced backend that cannot do the call.
    """
    asked = _asked(q_BSHC, options, k_lengths_B is not None, needs_lse, deterministic)
    name = choose(backend, q_BSHC.device.type, q_BSHC.dtype, asked)
    if name == "sdpa":
        return attention_sdpa.attention(q_BSHC, k_BSGC, v_BSGC, options, k_lengths_B)
    if name == "triton":
        from flash_experts.kernels import flash_attention_triton

        return flash_attention_triton.attention(q_BSHC, k_BSGC, v_BSGC, options, k_lengths_B)
    if name == "reference":
        return flash_attention_reference.attention(q_BSHC, k_BSGC, v_BSGC, options, k_lengths_B)
    version = int(name.removeprefix("flash_attention_"))
    return attention_packages.attention(version, q_BSHC, k_BSGC, v_BSGC, options, needs_lse, deterministic)


def attention_varlen(
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
    *,
    backend: str = "auto",
    needs_lse: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same for packed documents, each seeing itself alone.

    Args:
        q_THC: queries of all documents, (T_q, H, C).
        k_TGC: keys, (T_k, G, C).
        v_TGC: values, likewise.
        cu_seqlens_q: (N + 1,) int32, where each document starts in ``q_THC``, and T_q.
        cu_seqlens_k: likewise for the keys; the same tensor where the lengths are the same, which is quicker.
        max_seqlen_q: the most queries that a document has.
        max_seqlen_k: the most keys.
        options: see `AttentionOptions`.
        backend: see `attention`.
        needs_lse: see `attention`.
        deterministic: see `attention`.

    Returns:
        (T_q, H, C) in the dtype of q; the log-sum-exp (H, T_q) if it was asked for, else perhaps None.

    Raises:
        ValueError: as `attention`.
    """
    asked = _asked(q_THC, options, False, needs_lse, deterministic)
    name = choose(backend, q_THC.device.type, q_THC.dtype, asked, packed=True)
    packed = (q_THC, k_TGC, v_TGC, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options)
    if name == "sdpa":
        return attention_sdpa.attention_varlen(*packed)
    if name == "triton":
        from flash_experts.kernels import flash_attention_triton

        return flash_attention_triton.attention_varlen(*packed)
    if name == "reference":
        return flash_attention_reference.attention_varlen(*packed)
    version = int(name.removeprefix("flash_attention_"))
    return attention_packages.attention_varlen(version, *packed, needs_lse, deterministic)


def choose_for_mask(config_backend: str, device_type: str, dtype: torch.dtype) -> str:
    """As `choose`, for a padded batch with a mask of any shape: SDPA alone takes one."""
    return choose(config_backend, device_type, dtype, (_PADDING_MASK,))
