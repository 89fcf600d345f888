"""``flash-experts serve``."""

from __future__ import annotations

import warnings
from contextlib import suppress

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_device, add_model_family, command_parser
from flash_experts.extras import require
from flash_experts.released import default_model
from flash_experts.terminal import say


def run(args: Namespace) -> None:
    """Serve the playground: names in a browser and over HTTP."""
    require("the playground", "gradio")
    warnings.filterwarnings("ignore", message=r"found \d+ of \d+ names")  # the page shows it
    sources = args.model or [default_model()]

    from flash_experts.app.server import bind, make_server
    from flash_experts.app.service import Playground

    with bind(args.host, args.port) as listener:
        playground = Playground.load(sources, args.device, args.time_limit)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"The playground: http://{shown}:{port}  (models: {', '.join(playground.models)}; Ctrl+C ends it)")
        with suppress(KeyboardInterrupt):  # the user ends it
            make_server(playground, [args.host, *(args.allowed_host or ())]).run(sockets=[listener])
    say("The playground is closed.")


def make_parser() -> CommandParser:
    parser = command_parser("serve", run)
    parser.section("The models")
    parser.add_argument(
        "--model",
        type=str,
        nargs="+",
        default=None,
        help="model folders or hub ids, separated by commas or spaces (default: the newest released model)",
    )
    add_model_family(parser)
    add_device(parser)
    parser.section("The server")
    parser.add_argument("--port", type=int, default=7860, help="port; 0: any free port")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 admits the network")
    parser.add_argument(
        "--allowed_host",
        action="append",
        help="name that clients reach the server by, once per name (default: only localhost and --host)",
    )
    parser.add_argument("--time_limit", type=float, default=20.0, help="longest time of a request in seconds")
    return parser
