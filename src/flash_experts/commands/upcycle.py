"""``flash-experts upcycle``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_type_hints

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_overwrite, command_parser, print_result
from flash_experts.files import check_out_folder
from flash_experts.models.moe_options import EXPERTS, METHOD_HELP, Method, MoEOptions, UpcyclingOptions
from flash_experts.options import defaults_of, options_of

_OPTIONS = {name: cls for cls in (MoEOptions, UpcyclingOptions) for name in options_of(cls)}


def run(args: Namespace) -> None:
    """Upcycle a dense GPT-2 to an MoE model with the same outputs."""
    import torch

    from flash_experts.data.tokenizer import load_tokenizer
    from flash_experts.models.loading import load_config, use_tokens_of
    from flash_experts.models.moe import GPT2MoEForCausalLM
    from flash_experts.models.saving import write_model

    check_out_folder(args.out, args.overwrite, args.dense)
    if args.num_experts < 1:
        raise ValueError(f"--num-experts must be 1 or more, not {args.num_experts}")
    if load_config(args.dense).model_type != "gpt2":
        raise ValueError(f"{args.dense} is not a dense GPT-2, or has experts already: upcycle takes a dense GPT-2")
    options = {name: args[name] for name in _OPTIONS}
    torch.manual_seed(args.seed)
    model = GPT2MoEForCausalLM.from_dense(args.dense, method=args.method, dtype=getattr(torch, args.dtype), **options)
    tokenizer = load_tokenizer(args.dense, model.config.vocab_size)
    use_tokens_of(model, tokenizer)
    write_model(Path(args.out), model, tokenizer, args.overwrite)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = model.config.num_experts
    text = f"{args.out}: {experts} experts by {args.method}, {total / 1e6:.1f}M parameters"
    print_result(args, {"out": args.out, "experts": experts, "parameters": total}, text)


def make_parser() -> CommandParser:
    parser = command_parser("upcycle", run)
    parser.add_argument("dense", help="model folder or hub id of a dense GPT-2")
    parser.section(EXPERTS)
    parser.add_argument("--method", type=Method, default="copy", help=METHOD_HELP)
    for name, cls in _OPTIONS.items():
        hint, default = get_type_hints(cls)[name], defaults_of(cls)[name]
        parser.add_argument(f"--{name}", type=hint, default=default, help=options_of(cls)[name].help)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the routers, the noise and the drawn units")
    parser.section("Output")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="data type of the weights; bfloat16 takes half the memory and disk",
    )
    parser.add_argument("--out", required=True, help="output folder")
    add_overwrite(parser)
    return parser
