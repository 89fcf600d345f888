"""``flash-experts downcycle``."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_overwrite, command_parser, print_result
from flash_experts.files import check_out_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from flash_experts.models.moe import GPT2MoEForCausalLM

_TOKENS_PER_BATCH = 2048


def run(args: Namespace) -> None:
    """Average the experts of an MoE model to a dense GPT-2."""
    from flash_experts.data.tokenizer import load_tokenizer
    from flash_experts.models.downcycling import to_dense
    from flash_experts.models.loading import load_model
    from flash_experts.models.moe import GPT2MoEForCausalLM
    from flash_experts.models.saving import write_model

    check_out_folder(args.out, args.overwrite, args.model)
    if args.names < 1:
        raise ValueError(f"--names must be 1 or more, not {args.names}")
    if args.loads is not None and args.weighting != "load":
        raise ValueError("--loads is for --weighting load")
    model = load_model(args.model, "cpu")
    if not isinstance(model, GPT2MoEForCausalLM):
        raise ValueError(f"{args.model} has no experts: give an MoE model that upcycle or train wrote")
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    loads = None
    if args.weighting == "load":
        loads = _read_loads(args.loads) if args.loads else _measured_loads(args, model, tokenizer)
    dense = to_dense(model, loads, args.granularity)
    write_model(Path(args.out), dense, tokenizer, args.overwrite)
    total = sum(parameter.numel() for parameter in dense.parameters())
    result: dict[str, object] = {"out": args.out, "parameters": total}
    if loads is not None:
        result["loads"] = {str(block): load_E.tolist() for block, load_E in loads.items()}
    how = "their load" if loads is not None else "equal weight"
    print_result(args, result, f"{args.out}: dense, {total / 1e6:.1f}M parameters, experts averaged by {how}")


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
    """Measures expert loads on training names with all their attributes in the prompt."""
    from flash_experts.data.packing import encode_cards, pack_all, split_by_context
    from flash_experts.data.prepare import load_split
    from flash_experts.data.prompts import Attributes
    from flash_experts.models.downcycling import measure_loads

    cards, _ = split_by_context(load_split(args.data, "train"), tokenizer, model.config.n_positions)
    cards = random.Random(f"loads/{args.seed}").sample(cards, min(args.names, len(cards)))
    if not cards:
        raise ValueError(f"there are no names in {args.data} to measure the load with: give --loads FILE")
    batches = pack_all(encode_cards(cards, tokenizer, Attributes.of), _TOKENS_PER_BATCH)
    return measure_loads(model, (batch.inputs for batch in batches))


def make_parser() -> CommandParser:
    parser = command_parser("downcycle", run)
    parser.add_argument("model", help="model folder or hub id of an MoE model")
    parser.section("The average")
    parser.add_argument(
        "--weighting",
        type=Literal["mean", "load"],
        default="mean",
        help="weights of the experts in the average; mean: equal; load: by the share of tokens of each",
    )
    parser.add_argument(
        "--loads", type=str | None, default=None, help="JSON file of loads by block (default: measured)"
    )
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare, for measuring loads")
    parser.add_argument("--names", type=int, default=2000, help="number of names for measuring loads")
    parser.add_argument("--granularity", type=int, default=1, help="granularity that the model was upcycled with")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the choice of names")
    parser.section("Output")
    parser.add_argument("--out", required=True, help="output folder")
    add_overwrite(parser)
    return parser
