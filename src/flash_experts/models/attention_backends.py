"""Attention backends: a registry, and the choice of a kernel for each call, logged once with its reason.

    reference              flash attention in plain PyTorch, for reading; every option, any device
    triton                 our kernel for GPUs
    sdpa                   PyTorch's scaled_dot_product_attention
    flash_attention_2/3/4  Dao-AILab's packages, where installed
    auto                   the first of `preferences` that supports the call

`attention_backend` overrides ``FLASH_EXPERTS_ATTENTION``, which overrides ``config.attention_backend``.

Shape suffixes as in `flash_experts.kernels.attention_options`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch

from flash_experts.kernels import attention_libraries, flash_attention_reference
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from flash_experts.kernels.autocast import autocast_inputs
from flash_experts.terminal import nearest

ENVIRONMENT_VARIABLE = "FLASH_EXPERTS_ATTENTION"

_logger = logging.getLogger(__name__)
_forced: ContextVar[str | None] = ContextVar("attention_backend", default=None)
_HALF = frozenset({torch.float16, torch.bfloat16})
PADDING_MASK = "a padding mask"  # only SDPA supports it
_ODD_SCALE = "scales of zero and below"


@dataclass(frozen=True, slots=True)
class Backend:
    """What one kernel supports."""

    dtypes: frozenset[torch.dtype]
    lacks: frozenset[str]  # features, as `_requested_features` names them
    devices: frozenset[str] | None = None  # None is any
    package: str | None = None  # must be installed

    def obstacle(self, device_type: str, dtype: torch.dtype, features: tuple[str, ...]) -> str | None:
        """Why the backend does not support a call; None if it does."""
        if self.devices is not None and device_type not in self.devices:
            return f"it runs on {_listed(self.devices)}, not on {device_type}"
        if dtype not in self.dtypes:
            return f"it takes {_listed(map(_plain, self.dtypes))}, not {_plain(dtype)}"
        lacking = [feature for feature in features if feature in self.lacks]
        if lacking:
            return f"it does not support {_listed(lacking)}"
        if self.package is not None and not is_installed(self.package):
            return f"the package that has {self.package} is not installed"
        # Before Triton is first imported.
        if self.package == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "on a CPU it runs only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        return None


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module would be in
        return False


def _package(version: int, *lacks: str) -> Backend:
    common = {"key lengths", PADDING_MASK, _ODD_SCALE, "head dims that are not a multiple of 8", "head dims over 256"}
    return Backend(
        _HALF, frozenset(lacks) | common, frozenset({"cuda"}), attention_libraries.FLASH_ATTN_MODULES[version]
    )


_SINGLE = _HALF | {torch.float32}
_NOT_IN_3_AND_4 = ("dropout", "ALiBi", "the log-sum-exp")
BACKENDS: dict[str, Backend] = {
    "reference": Backend(_SINGLE | {torch.float64}, frozenset({PADDING_MASK})),
    "triton": Backend(
        _SINGLE,
        frozenset({PADDING_MASK, _ODD_SCALE, "head dims under 16", "head dims over 256"}),
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
    """The order in which ``auto`` tries the backends."""
    if device_type != "cuda":
        return "sdpa", "reference"
    # Our kernel is first for packed sequences, where SDPA would compute padding.
    return ("triton", "sdpa", "reference") if packed and dtype in _HALF else ("sdpa", "triton", "reference")


def check_name(name: str, source: str) -> str:
    """Returns a known backend name; ValueError for an unknown one, from ``source``."""
    if name in NAMES:
        return name
    near = nearest(name, NAMES, cutoff=0.4)
    hint = f"did you mean {near!r}? " if near else ""
    raise ValueError(f"{source}: there is no attention backend {name!r}; {hint}Known: {', '.join(NAMES)}")


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Forces a backend within this context; ``auto`` undoes an outer one."""
    token = _forced.set(check_name(name, "attention_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def requested(config_backend: str) -> tuple[str, str]:
    """The name of the backend that a user wants, and where it was set."""
    if name := _forced.get():
        return name, "attention_backend()"
    if name := os.environ.get(ENVIRONMENT_VARIABLE):
        return name, ENVIRONMENT_VARIABLE
    return config_backend, "config.attention_backend"


@torch.compiler.assume_constant_result
def choose(
    config_backend: str, device_type: str, dtype: torch.dtype, features: tuple[str, ...] = (), packed: bool = False
) -> str:
    """The backend for a call with these `_requested_features`; ValueError if a forced one does not support it."""
    return _choose(*requested(config_backend), device_type, dtype, features, packed)


@lru_cache(maxsize=1024)
def _choose(
    name: str, source: str, device_type: str, dtype: torch.dtype, features: tuple[str, ...], packed: bool
) -> str:
    """Cached, so each choice is made and logged once."""
    check_name(name, source)
    call = f"{'packed ' if packed else ''}{_plain(dtype)} on {device_type}"
    call += f" with {_listed(features)}" if features else ""
    obstacles: list[str] = []
    for candidate in preferences(device_type, dtype, packed) if name == "auto" else (name,):
        obstacle = BACKENDS[candidate].obstacle(device_type, dtype, features)
        if obstacle is None:
            reason = f"forced by {source}" if name != "auto" else "; ".join(obstacles) or "first choice there"
            _logger.info("attention of %s: %s (%s)", call, candidate, reason)
            return candidate
        obstacles.append(f"{candidate}: {obstacle}")
    able = [known for known, other in BACKENDS.items() if other.obstacle(device_type, dtype, features) is None]
    advice = f"use {' or '.join(able)}" if able else "no backend can"
    raise ValueError(f"{source} = {name!r} cannot compute attention of {call} ({'; '.join(obstacles)}): {advice}")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))


def _requested_features(
    q: torch.Tensor, options: AttentionOptions, has_lengths: bool, needs_lse: bool, deterministic: bool
) -> tuple[str, ...]:
    """What a call needs beyond plain attention."""
    head_dim = q.shape[-1]
    features = (  # comparisons only, which torch.compile folds
        ("head dims under 16", head_dim < 16),
        ("head dims over 128", head_dim > 128),
        ("head dims over 256", head_dim > 256),
        ("head dims that are not a multiple of 8", head_dim % 8 != 0),
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
    return tuple(name for name, is_needed in features if is_needed)


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
    """Attention of a batch by the chosen backend, differentiable in q, k and v.

    ``k_lengths_B`` is the int32 number of keys in use per sequence. Returns (B, S_q, H, C), and the log-sum-exp
    (B, H, S_q) if ``needs_lse``.
    """
    q_BSHC, k_BSGC, v_BSGC = autocast_inputs(q_BSHC, k_BSGC, v_BSGC)
    features = _requested_features(q_BSHC, options, k_lengths_B is not None, needs_lse, deterministic)
    name = choose(backend, q_BSHC.device.type, q_BSHC.dtype, features)
    if name == "sdpa":
        return attention_libraries.sdpa(q_BSHC, k_BSGC, v_BSGC, options, k_lengths_B)
    if name == "triton":
        from flash_experts.kernels import flash_attention_triton

        return flash_attention_triton.attention(q_BSHC, k_BSGC, v_BSGC, options, k_lengths_B)
    if name == "reference":
        return flash_attention_reference.attention(q_BSHC, k_BSGC, v_BSGC, options, k_lengths_B)
    version = int(name.removeprefix("flash_attention_"))
    return attention_libraries.flash_attn(version, q_BSHC, k_BSGC, v_BSGC, options, needs_lse, deterministic)


def attention_varlen(
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    lengths: PackedLengths,
    options: AttentionOptions,
    *,
    backend: str = "auto",
    needs_lse: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` of packed documents; the log-sum-exp is (H, T_q)."""
    q_THC, k_TGC, v_TGC = autocast_inputs(q_THC, k_TGC, v_TGC)
    features = _requested_features(q_THC, options, False, needs_lse, deterministic)
    name = choose(backend, q_THC.device.type, q_THC.dtype, features, packed=True)
    packed = (q_THC, k_TGC, v_TGC, lengths, options)
    if name == "sdpa":
        return attention_libraries.sdpa_varlen(*packed)
    if name == "triton":
        from flash_experts.kernels import flash_attention_triton

        return flash_attention_triton.attention_varlen(*packed)
    if name == "reference":
        return flash_attention_reference.attention_varlen(*packed)
    version = int(name.removeprefix("flash_attention_"))
    return attention_libraries.flash_attn_varlen(version, *packed, needs_lse, deterministic)
