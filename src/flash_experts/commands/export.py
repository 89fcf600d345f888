"""``flash-experts export``."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_overwrite, command_parser, print_result, refuse_unused
from flash_experts.extras import require
from flash_experts.files import check_out_file, check_out_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flash_experts.models.exports import LogitDifference
    from flash_experts.models.moe import GPT2MoEForCausalLM

FORMATS = {
    "hub": "a folder that transformers loads without flash-experts, with trust_remote_code=True",
    "onnx": "a folder for ONNX Runtime (extra [onnx])",
    "gguf": "a file for llama.cpp, from a dense model (extra [teacher])",
    "dense": "a dense GPT-2 whose MLPs are the mean of the experts",
}
_COMPARED = 64  # real names
_TOKENS_PER_BATCH = 2048


def run(args: Namespace) -> None:
    """Write a model for use elsewhere: hub, onnx, gguf, or dense, a GPT-2 from the mean of the experts."""
    if args.format == "gguf":
        check_out_file(args.out, args.overwrite)
    else:
        check_out_folder(args.out, args.overwrite, args.model)
    for name in ("weighting", "loads"):
        if args.format != "dense" and args[name] != make_parser().get_default(name):
            raise ValueError(f"--{name} is for export dense")
    {"hub": _export_hub, "onnx": _export_onnx, "gguf": _export_gguf, "dense": _export_dense}[args.format](args)


def _export_hub(args: Namespace) -> None:
    from flash_experts.models.hub import export_for_hub

    files = export_for_hub(args.model, Path(args.out), args.overwrite)
    print_result(args, {"out": args.out, "code": files}, f"{args.out}: {args.model} with {', '.join(files)}")


def _export_onnx(args: Namespace) -> None:
    require("export onnx", "onnxruntime", "onnx")
    from flash_experts.models.exports import export_onnx

    model, tokenizer = _load(args.model)
    names = _real_names(tokenizer)
    found = export_onnx(args.model, model, tokenizer, names, Path(args.out), args.overwrite)
    print_result(args, _result(args, found), f"{args.out}: {args.model} as ONNX; {found}")


def _export_gguf(args: Namespace) -> None:
    require("export gguf", "gguf")
    from flash_experts.models.exports import export_gguf

    model, tokenizer = _load(args.model)
    found = export_gguf(args.model, model, tokenizer, _real_names(tokenizer), Path(args.out))
    print_result(args, _result(args, found), f"{args.out}: {args.model} as GGUF, float32; {found}")


def _export_dense(args: Namespace) -> None:
    from flash_experts.models.exports import logit_difference
    from flash_experts.models.moe import GPT2MoEForCausalLM
    from flash_experts.models.saving import write_model
    from flash_experts.models.upcycling import to_dense

    if args.names < 1:
        raise ValueError(f"--names must be 1 or more, not {args.names}")
    if args.loads is not None and args.weighting != "load":
        raise ValueError("--loads is for --weighting load")
    if args.loads is not None or args.weighting != "load":
        refuse_unused(make_parser(), args, ("names", "data"), "only loads that are measured need names")
    model, tokenizer = _load(args.model)
    if not isinstance(model, GPT2MoEForCausalLM):
        raise ValueError(f"{args.model} has no experts: give an MoE model that upcycle or train wrote")
    loads = None
    if args.weighting == "load":
        loads = _read_loads(args.loads) if args.loads else _measured_loads(args, model, tokenizer)
    dense = to_dense(model, loads)
    found = logit_difference(model, lambda ids_1S: dense(ids_1S, use_cache=False).logits, _real_names(tokenizer))
    write_model(Path(args.out), dense, tokenizer, args.overwrite)
    total = sum(parameter.numel() for parameter in dense.parameters())
    result = _result(args, found) | {"parameters": total}
    if loads is not None:
        result["loads"] = {str(block): load_E.tolist() for block, load_E in loads.items()}
    how = "their load" if loads is not None else "equal weight"
    text = f"{args.out}: dense, {total / 1e6:.1f}M parameters, experts averaged by {how}; {found}"
    print_result(args, result, f"{text}; to fine-tune it: train --base {args.out} --model.num-experts 0")


def _load(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from flash_experts.data.tokenizer import load_tokenizer
    from flash_experts.models.loading import load_model

    model = load_model(source, "cpu")
    return model, load_tokenizer(source, model.config.vocab_size)


def _real_names(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Token ids of names of real cards after the prompts of all their attributes, spread over the embedded table."""
    from flash_experts.data.cleaning import clean
    from flash_experts.data.packing import encode_cards
    from flash_experts.data.sources import load_source

    rows = load_source("embedded").rows
    cards = clean(rows[:: len(rows) // (2 * _COMPARED)]).cards  # some rows are no cards
    return [name.ids for name in encode_cards(cards[:_COMPARED], tokenizer)]


def _result(args: Namespace, found: LogitDifference) -> dict[str, Any]:
    return {
        "out": args.out,
        "largest_difference": found.largest,
        "largest_logit": found.scale,
        "names": found.names,
    }


def _read_loads(path: str) -> dict[int, torch.Tensor]:
    """Reads a JSON file of expert loads by block, as this command prints them: ``{"1": [0.5, 0.2, ...], ...}``."""
    import torch

    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        table = table.get("loads", table)
        return {int(block): torch.tensor(load, dtype=torch.float64) for block, load in table.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f'{path} has no loads by block, such as {{"1": [0.5, 0.2, 0.3]}}: {error}') from error


def _measured_loads(
    args: Namespace, model: GPT2MoEForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> dict[int, torch.Tensor]:
    from flash_experts.data.packing import encode_cards, pack_all, split_by_context
    from flash_experts.data.prepare import load_split
    from flash_experts.data.prompts import Attributes
    from flash_experts.models.upcycling import measure_loads

    cards, _ = split_by_context(load_split(args.data, "train"), tokenizer, model.config.n_positions)
    cards = random.Random(f"loads/{args.seed}").sample(cards, min(args.names, len(cards)))
    if not cards:
        raise ValueError(f"there are no names in {args.data} to measure the load with: give --loads FILE")
    batches = pack_all(encode_cards(cards, tokenizer, Attributes.of), _TOKENS_PER_BATCH)
    return measure_loads(model, (batch.inputs for batch in batches))


def make_parser() -> CommandParser:
    parser = command_parser("export", run)
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("format", choices=tuple(FORMATS), help=formats)
    parser.add_argument("model", help="model folder or hub id")
    parser.section("The mean of the experts (dense)")
    parser.add_argument(
        "--weighting",
        type=Literal["mean", "load"],
        default="mean",
        help="weights of the experts in the average; mean: equal; load: by the share of tokens of each",
    )
    parser.add_optional("--loads", "JSON file of loads by block (default: measured)")
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare, for measuring loads")
    parser.add_argument("--names", type=int, default=2000, help="number of names for measuring loads")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the choice of names")
    parser.section("Output")
    parser.add_argument("--out", required=True, help="output folder; of gguf, file")
    add_overwrite(parser)
    return parser
