"""``flash-experts upcycle``."""

from __future__ import annotations

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, command_parser, print_result


def run(args: Namespace) -> None:
    """Turn a dense GPT-2 into a mixture of experts that computes the same."""
    from flash_experts.training.build import build_model
    from flash_experts.training.model_config import ModelConfig

    if args.num_experts < 1:
        raise ValueError(f"--num-experts must be 1 or more, not {args.num_experts}")
    config = ModelConfig(
        num_experts=args.num_experts,
        num_experts_per_tok=args.num_experts_per_tok,
        moe_layer_freq=args.moe_layer_freq,
    )
    model, tokenizer = build_model(args.dense, config, cards=(), seed=args.seed)
    if model.config.num_experts != args.num_experts:
        raise ValueError(f"{args.dense} has experts already: upcycle takes a dense GPT-2")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    total = sum(parameter.numel() for parameter in model.parameters())
    text = f"{args.out}: {args.num_experts} experts, {total / 1e6:.1f}M parameters"
    print_result(args, {"out": args.out, "parameters": total}, text)


def make_parser() -> CommandParser:
    parser = command_parser("upcycle", run)
    parser.add_argument("dense", help="folder or hub id of a dense GPT-2")
    parser.add_argument("--num_experts", type=int, default=8, help="experts in each MoE layer")
    parser.add_argument("--num_experts_per_tok", type=int, default=2, help="experts that each token is sent to")
    parser.add_argument("--moe_layer_freq", type=int, default=2, help="1: experts in every block, 2: in every other")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the routers' random weights")
    return parser
