"""Which tile sizes the Triton programs of flash attention try, and how the choice is kept.

Each program is timed with every setting that fits when a new kind of call comes (`triton.autotune`), and the winner is
written beside Triton's compiled programs, so that the next process starts with it.
"""

from __future__ import annotations

from typing import Any

import triton

from flash_experts.kernels.flash_attention_backward import delta_program, keys_program, queries_program
from flash_experts.kernels.flash_attention_programs import forward_program

INTERPRETED: bool = triton.knobs.runtime.interpret
_SHARED_MEMORY = 227 * 1024  # bytes that a program may have on a Hopper GPU; with less, such settings fail and drop out
_SHORTEST_BUCKET, _LONGEST_BUCKET = 64, 8192


def length_bucket(length: int) -> int:
    """The power of two that stands for a length when settings are chosen: 64 for all shorter, 8192 for all longer."""
    return min(max(triton.next_power_of_2(length), _SHORTEST_BUCKET), _LONGEST_BUCKET)


def fitting(program: str, configs: list[Any], block_c: int, element_size: int) -> list[Any]:
    """The settings worth trying at a head dim: tiles in shared memory, accumulators in registers.

    What a thread accumulates must leave room among its 255 registers. Compiled for Hopper, 128 values in the forward
    and 160 in the backward hardly ever spill, and more always do (scripts/hopper_report.py shows it).

    Args:
        program: "forward", "keys" or "queries".
        configs: settings to choose from.
        block_c: head dim, rounded up to a power of two.
        element_size: bytes of an element of q, k and v.

    Returns:
        Those that fit; the smallest one if none does.
    """

    def shared_memory(config: Any) -> int:
        small, large = sorted(config.kwargs.values())
        return block_c * element_size * 2 * (large + config.num_stages * small)

    def per_thread(config: Any) -> int:
        m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
        values = {"forward": m * (block_c + n), "keys": 2 * n * (block_c + m), "queries": m * (block_c + 2 * n)}
        return values[program] // (32 * config.num_warps)

    limit = 128 if program == "forward" else 160
    fit = [config for config in configs if per_thread(config) <= limit and shared_memory(config) <= _SHARED_MEMORY]
    return fit or [min(configs, key=per_thread)]


def _tuned(name: str, program: Any, tiles: list[tuple[int, int, int, int]]) -> Any:
    """A program with the settings (BLOCK_M, BLOCK_N, warps, stages) that it is to try, and what its choice rests on."""

    def prune(configs: list[Any], named_args: dict[str, Any], **meta: Any) -> list[Any]:
        return fitting(name, configs, meta["BLOCK_C"], named_args["Q"].element_size())

    if INTERPRETED:
        tiles = [(32, 32, 4, 1)]
    return triton.autotune(
        [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=s) for m, n, warps, s in tiles],
        key=["LENGTH_BUCKET", "C", "CAUSAL", "PACKED", "LEFT_EDGE", "DROPOUT"],
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )(program)


FORWARD = _tuned(
    "forward",
    forward_program,
    [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 2), (128, 32, 8, 3),
        (128, 32, 4, 3), (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
        (32, 32, 4, 2),
    ],
)  # fmt: skip
KEYS = _tuned(
    "keys",
    keys_program,
    [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2),
        (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (32, 32, 4, 2),
    ],
)  # fmt: skip
QUERIES = _tuned(
    "queries",
    queries_program,
    [
        (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2),
    ],
)  # fmt: skip
DELTA = triton.autotune([triton.Config({"BLOCK_M": 64})], key=[])(delta_program)
