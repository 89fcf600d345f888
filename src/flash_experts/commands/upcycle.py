"""``flash-experts upcycle``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Literal, get_type_hints

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_overwrite, command_parser, print_result
from flash_experts.files import check_out_folder

# Of `flash_experts.training.model_config.ModelConfig`: those that a saved model keeps or that its weights depend on.
_OPTIONS = {
    "num_experts": "experts in each MoE layer",
    "num_experts_per_tok": "experts that each token is sent to",
    "moe_layer_freq": "1: experts in every block, 2: in every other",
    "granularity": "granular, shared: parts of a layer; there are this many times more experts, smaller",
    "noise_scale": "noise: as a share of each matrix's standard deviation",
    "drop_ratio": "drop: share of the hidden units drawn anew",
    "router_init": "first weights of the routers: normal, zeros or orthogonal",
    "routing": "token_choice, or expert_choice (not causal)",
    "scoring_func": "softmax, topk_softmax or sigmoid",
    "capacity_factor": "most tokens of an expert in training, over the mean; null drops nothing",
}


def run(args: Namespace) -> None:
    """Turn a dense GPT-2 into a mixture of experts that computes the same."""
    import torch

    from flash_experts.data.tokenizer import load_tokenizer
    from flash_experts.models.loading import load_config
    from flash_experts.models.moe import GPT2MoEForCausalLM
    from flash_experts.training.checkpoint import write_model
    from flash_experts.training.model_config import ModelConfig

    check_out_folder(args.out, args.overwrite, args.dense)
    if args.num_experts < 1:
        raise ValueError(f"--num-experts must be 1 or more, not {args.num_experts}")
    if load_config(args.dense).model_type != "gpt2":
        raise ValueError(f"{args.dense} is no dense GPT-2 or has experts already: upcycle takes a dense GPT-2")
    config = ModelConfig(upcycling=args.method, **{name: args[name] for name in _OPTIONS})
    config.validate()
    torch.manual_seed(args.seed)
    model = GPT2MoEForCausalLM.from_dense(args.dense, dtype=getattr(torch, args.dtype), **config.moe_fields)
    tokenizer = load_tokenizer(args.dense, model.config.vocab_size)
    write_model(Path(args.out), model, tokenizer, args.overwrite)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = model.config.num_experts
    text = f"{args.out}: {experts} experts by {args.method}, {total / 1e6:.1f}M parameters"
    print_result(args, {"out": args.out, "experts": experts, "parameters": total}, text)


def make_parser() -> CommandParser:
    from flash_experts.training.model_config import ModelConfig

    parser = command_parser("upcycle", run)
    types = get_type_hints(ModelConfig)
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    parser.add_argument("dense", help="folder or hub id of a dense GPT-2")
    parser.add_argument(
        "--method",
        type=types["upcycling"],
        default=defaults["upcycling"],
        help="copy; noise: copies that differ a little; drop: some hidden units drawn anew; granular: parts of a "
        "layer; shared: the dense layer for every token, and silent experts",
    )
    for name, text in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=types[name], default=defaults[name], help=text)
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="to compute and save the weights in; bfloat16 takes half the memory and disk",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    add_overwrite(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the routers' random weights, noise and drawn units")
    return parser
