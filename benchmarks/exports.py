"""How far exports of the released models are from their sources: the table of docs/change_this.md.

    python benchmarks/exports.py [--out benchmarks/results/exports.json]

llama.cpp comes with the package xllamacpp (pip install xllamacpp); llama-cpp-python has no wheels on the index.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

from flash_experts.cli import main
from flash_experts.data.cleaning import clean
from flash_experts.data.prompts import Attributes
from flash_experts.data.sources import load_source
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.files import sha256_of
from flash_experts.models.loading import load_model

EXPORTS = (
    ("onnx", "models/mtg-base", "base-onnx"),
    ("onnx", "models/mtg-names", "names-onnx"),
    ("gguf", "models/mtg-base", "base.gguf"),
    ("dense", "models/mtg-names", "names-dense"),
)
TOP = 20  # tokens that llama.cpp gives


def exported(form: str, model: str, out: Path) -> dict[str, Any]:
    """What ``flash-experts export`` prints, without the place."""
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["export", form, model, "--out", str(out), "--json"]) == 0
    found = json.loads(printed.getvalue())
    size = out.stat().st_size if out.is_file() else sum(path.stat().st_size for path in out.iterdir())
    sha256 = sha256_of(Path(model) / "model.safetensors")
    return {"format": form, "model": model, "sha256": sha256, **found, "bytes": size, "out": out.name}


def in_llama_cpp(file: Path, source: str) -> dict[str, Any]:
    """llama.cpp's tokens and next-token log-probabilities after prompts and names of real cards, next to ours."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), 128, 1, False
    settings.cpuparams.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(settings)
    model, tokenizer = load_model(source, "cpu"), load_tokenizer(source)
    cards = clean(load_source("embedded").rows[::1000]).cards
    largest = 0.0
    for card in cards:
        text = f"{Attributes.of(card).prompt()} {card.name}"
        request = {"prompt": text, "n_predict": 1, "temperature": 0, "n_probs": TOP}
        answer = server.handle_completions(request)
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        assert answer["usage"]["prompt_tokens"] == len(ids), text
        with torch.no_grad():
            logprob_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            largest = max(largest, abs(token["logprob"] - logprob_V[token["id"]].item()))
    return {"version": xllamacpp.__version__, "largest_log_probability_difference": largest, "names": len(cards)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/exports.json")
    out = Path(parser.parse_args().out)
    with tempfile.TemporaryDirectory() as folder:
        rows = [exported(form, model, Path(folder) / name) for form, model, name in EXPORTS]
        result: dict[str, Any] = {"torch": torch.__version__, "rows": rows}
        try:
            result["llama.cpp"] = in_llama_cpp(Path(folder) / "base.gguf", "models/mtg-base")
        except ModuleNotFoundError:
            print("xllamacpp is not installed: llama.cpp is left out", file=sys.stderr)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
