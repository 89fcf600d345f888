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
    """Whether a module is installed; it is not imported. A folder of that name, such as wandb's, does not count."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def missing(module: str, what: str) -> str:
    """One line for the user: what needs a module that is not installed, and the command that installs it."""
    command = install_command(EXTRAS[module]) if module in EXTRAS else f"pip install {module}"
    return f"{module} is not installed, which {what} needs: {command}"


def require(what: str, *modules: str) -> None:
    """Raises a ValueError if a module is not installed that ``what`` needs."""
    for module in modules:
        if not is_installed(module):
            raise ValueError(missing(module, what))
