"""Compiles the Triton kernels for a Hopper GPU, without one, and reports registers, spills and tensor core use.

    python scripts/hopper_report.py                      every autotuned tile, head dims 64 and 128
    python scripts/hopper_report.py --variants packed dropout --head-dims 64 --first
    python scripts/hopper_report.py --experts            the grouped matmuls of the MoE layer instead

For each kernel and tile: registers, bytes spilled to local memory, tensor core instructions (HGMMA) and shared memory.
A tile that spills is slow; a kernel without HGMMA does not use the tensor cores. Only a GPU can measure the speed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_experts.kernels import flash_attention_triton as tuning
from flash_experts.kernels import flash_decode_triton, grouped_mlp_triton

FLAGS = ("CAUSAL", "RAGGED", "PACKED", "LEFT_EDGE", "SOFTCAP", "ALIBI", "DROPOUT", "UPCAST")
VARIANTS: dict[str, dict[str, bool]] = {
    "causal": {"CAUSAL": True},
    "full": {},
    "window": {"CAUSAL": True, "LEFT_EDGE": True},
    "packed": {"CAUSAL": True, "PACKED": True, "LEFT_EDGE": True},
    "ragged": {"CAUSAL": True, "RAGGED": True},
    "dropout": {"CAUSAL": True, "DROPOUT": True},
    "packed dropout": {"CAUSAL": True, "PACKED": True, "LEFT_EDGE": True, "DROPOUT": True},
    "softcap": {"CAUSAL": True, "SOFTCAP": True},
    "alibi": {"CAUSAL": True, "ALIBI": True},
}
TUNED = {"forward": tuning.FORWARD, "keys": tuning.KEYS, "queries": tuning.QUERIES}
FLOAT32 = {"LSE", "DELTA", "SLOPES", "PARTS", "LSES", "DGATE"}
INT32 = {"CU_Q", "CU_K", "K_LENGTHS", "DOC", "TOKEN", "PAIR", "OFFSETS"}
OPTIONAL = {"CU_Q", "CU_K", "K_LENGTHS", "DOC", "SEED", "SLOPES"}
NUMBERS = {"H", "E", "S", "LENGTH_BUCKET", "ROWS_BUCKET"}


def pointers(flags: dict[str, Any]) -> set[str]:
    """Returns the optional pointer arguments of a variant."""
    tables = {"CU_Q", "CU_K"} if flags.get("RAGGED") or flags.get("PACKED") else set()
    optional = {"DOC": "PACKED", "SLOPES": "ALIBI", "SEED": "DROPOUT"}
    return tables | {table for table, flag in optional.items() if flags.get(flag)}


def compiled(function: Any, constants: dict[str, Any], dtype: str, warps: int, stages: int) -> Any:
    """Compiles a kernel for sm_90 as its launch would, with aligned pointers and strides."""
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    given = pointers(constants)
    for place, parameter in enumerate(function.params):
        name = parameter.name
        if name in constants or (name in OPTIONAL and name not in given) or name == "GROUP":
            signature[name] = "constexpr"
            constexprs[(place,)] = constants.get(name, 1 if name == "GROUP" else None)
            continue
        is_pointer = name.isupper() and name not in NUMBERS
        if is_pointer:
            signature[name] = "*" + (
                "fp32" if name in FLOAT32 else "i32" if name in INT32 else "i64" if name == "SEED" else dtype
            )
        else:
            signature[name] = "fp32" if name in ("scale", "softcap", "dropout") else "i32"
        if is_pointer or name.startswith(("stride", "S_", "size")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


def resources(kernel: Any) -> dict[str, int]:
    """Reads resource usage from the machine code with the disassembler of Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "hgmma": code.count("HGMMA"),
        "shared_kib": kernel.metadata.shared // 1024,
    }


def attention_rows(variant: str, head_dim: int, dtype: str, first_only: bool) -> list[dict[str, Any]]:
    flags = {flag: VARIANTS[variant].get(flag, False) for flag in FLAGS}
    block_c = triton.next_power_of_2(head_dim)
    rows = []
    for name, tuner in TUNED.items():
        left_edge = flags["LEFT_EDGE"] or (name == "keys" and flags["CAUSAL"])
        constants = {**flags, "LEFT_EDGE": left_edge, "C": head_dim, "BLOCK_C": block_c}
        configs = tuning.fitting(name, tuner.configs, block_c, 4 if dtype == "fp32" else 2)
        for config in configs[:1] if first_only else configs:
            kernel = compiled(tuner.fn, constants | config.kwargs, dtype, config.num_warps, config.num_stages)
            tile = (*config.kwargs.values(), config.num_warps, config.num_stages)
            rows.append({"program": name, "variant": variant, "head_dim": head_dim, "tile": tile, **resources(kernel)})
    return rows


def decode_rows(head_dim: int, dtype: str) -> list[dict[str, Any]]:
    constants = {"C": head_dim, "BLOCK_C": triton.next_power_of_2(head_dim), "BLOCK_R": 16, "BLOCK_N": 64}
    constants |= {"SOFTCAP": False, "ALIBI": False, "UPCAST": False}
    kernel = compiled(flash_decode_triton.decode_kernel, constants, dtype, 4, 3)
    return [
        {"program": "decode", "variant": "cache", "head_dim": head_dim, "tile": (16, 64, 4, 3), **resources(kernel)}
    ]


def expert_rows(dtype: str, first_only: bool) -> list[dict[str, Any]]:
    """Compiles the kernels of an MoE layer with 8 experts."""
    row_flags = {"BLOCK_E": 8, "EVEN": True, "UPCAST": False, "stride_wn": 1}
    transposed = {**row_flags, "stride_wi": 1}
    del transposed["stride_wn"]
    programs = {
        "up": (grouped_mlp_triton._UP, row_flags | {"ACTIVATION": 0, "KEEP": True}),
        "down": (grouped_mlp_triton._DOWN, row_flags | {"GATED": True}),
        "dx": (grouped_mlp_triton._DOWN, transposed | {"GATED": False}),
        "dhidden": (grouped_mlp_triton._HIDDEN_GRADIENT, transposed | {"ACTIVATION": 0}),
        "dup": (grouped_mlp_triton._WEIGHT_GRADIENT, {"GATHER_A": True, "GATHER_B": False, "UPCAST": False}),
        "ddown": (grouped_mlp_triton._WEIGHT_GRADIENT, {"GATHER_A": False, "GATHER_B": True, "UPCAST": False}),
    }
    rows = []
    for name, (tuner, constants) in programs.items():
        for config in tuner.configs[:1] if first_only else tuner.configs:
            kernel = compiled(tuner.fn, constants | config.kwargs, dtype, config.num_warps, config.num_stages)
            tile = (*config.kwargs.values(), config.num_warps, config.num_stages)
            rows.append({"program": name, "variant": "experts", "head_dim": 0, "tile": tile, **resources(kernel)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["causal", "packed"])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--first", action="store_true", help="only the first tile of each kernel")
    parser.add_argument("--experts", action="store_true", help="the grouped matmuls of the MoE layer instead")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    if tuning.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: unset it, since the interpreter does not compile")
    if not args.json:
        print(f"Triton {triton.__version__}, sm_90")
        print(f"{'kernel':9}{'variant':16}{'head dim':>9}  tile (M, N, warps, stages)")
    groups = [expert_rows(args.dtype, args.first)] if args.experts else []
    for head_dim in [] if args.experts else args.head_dims:
        rows = [row for variant in args.variants for row in attention_rows(variant, head_dim, args.dtype, args.first)]
        groups.append(rows + decode_rows(head_dim, args.dtype))
    for row in (row for group in groups for row in group):
        if args.json:
            print(json.dumps(row))
        else:
            head = f"{row['program']:9}{row['variant']:16}{row['head_dim']:9}  {row['tile']!s:24}"
            print(head + "".join(f"  {key} {row[key]}" for key in list(row)[4:]), flush=True)


if __name__ == "__main__":
    main()
