"""Packages that are not needed for everything, and the extra of pyproject.toml that installs each."""

from __future__ import annotations

from importlib.util import find_spec

# Module to extra.
EXTRAS = {
    "gguf": "teacher",
    "gradio": "app",
    "httpx": "data",
    "ijson": "data",
    "matplotlib": "eval",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "platformdirs": "data",
    "sklearn": "eval",
    "tensorboard": "tensorboard",
    "wandb": "track",
}


def install_command(extra: str) -> str:
    """The command that installs an extra: ``pip install "flash-experts[eval]"``."""
    return f'pip install "flash-experts[{extra}]"'


def is_installed(module: str) -> bool:
    """Whether a module of `EXTRAS` is installed; it is not imported."""
    assert module in EXTRAS, module
    return find_spec(module) is not None


def missing(module: str, what: str) -> str:
    """One line for the user: what needs a module that is not installed, and the command that brings it."""
    return f"{module} is not installed, which {what} needs: {install_command(EXTRAS[module])}"


def require(what: str, *modules: str) -> None:
    """Checks that modules are installed.

    Args:
        what: what needs them, for the message.

    Raises:
        ValueError: one is not.
    """
    for module in modules:
        if not is_installed(module):
            raise ValueError(missing(module, what))
