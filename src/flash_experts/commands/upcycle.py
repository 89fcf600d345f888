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
    "num_experts": "experts per MoE layer",
    "num_experts_per_tok": "experts per token",
    "moe_layer_freq": "distance between MoE layers in blocks; 1: every block, 2: every other block",
    "granularity": "parts that each expert is cut into, for --method granular and shared",
    "noise_scale": "standard deviation of the noise, as a share of that of each matrix, for --method noise",
    "drop_ratio": "share of the hidden units that are initialized again, for --method drop",
    "router_init": "initialization of the routers",
    "routing": "routing: tokens choose experts, or experts choose tokens (not causal)",
    "scoring_func": "function that turns router logits into gates",
    "capacity_factor": "capacity of an expert in training, as a multiple of the mean load; null: no token dropping",
}


def run(args: Namespace) -> None:
    """Upcycle a dense GPT-2 to an MoE model with the same outputs."""
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
    parser.add_argument("dense", help="model folder or hub id of a dense GPT-2")
    parser.add_argument(
        "--method",
        type=types["upcycling"],
        default=defaults["upcycling"],
        help="initialization of the experts; copy: copies of the dense layer; noise: copies with noise; drop: "
        "copies with some hidden units initialized again; granular: parts of the layer; shared: the layer for every "
        "token, and routed experts that start at zero",
    )
    for name, text in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=types[name], default=defaults[name], help=text)
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="data type of the weights; bfloat16 takes half the memory and disk",
    )
    parser.add_argument("--out", required=True, help="output folder")
    add_overwrite(parser)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the routers, the noise and the drawn units")
    return parser
