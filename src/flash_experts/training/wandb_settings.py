"""Whether wandb records online or offline: never a question to the user."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

OFFLINE = ("offline", "dryrun")
_MODES = (*OFFLINE, "online", "run", "shared", "disabled")


def wandb_mode(warn: Callable[[str], None]) -> str:
    """``WANDB_MODE``, or online if there is an API key; always offline without one, for wandb would ask for it."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode not in _MODES:
        raise ValueError(f"WANDB_MODE is {mode!r}: set it to online, offline or disabled, or unset it")
    if mode in (*OFFLINE, "disabled") or _has_key():
        return mode
    warn(f"wandb has no API key for WANDB_MODE={mode}: recording offline (set WANDB_API_KEY, or run `wandb login`)")
    return "offline"


def _has_key() -> bool:
    """Whether an API key is in the environment, or in .netrc, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for place in places:
        try:
            if netrc.netrc(str(place)).hosts.get(str(host)):
                return True
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
    return False
