"""Files that a clumsy user or a stranger may offer: of names, of settings, and model folders."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_SUFFIXES = ("txt", "csv", "json", "jsonl", "yaml")
# Nine lines that stand for 9 ** 9 values.
_ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
_YAML = {
    "aliases": _ALIASES,
    "tag": "seed: !!python/object/apply:os.system ['touch pwned']\n",
    "list": "- a\n- b\n",
    "scalar": "hello\n",
    "tab": "seed:\n\t1\n",
    "twice": "seed: 1\nseed: 2\n",
    "null": "null\n",
    "nullbyte": 'data: "a\\0b"\n',
    "again": "config: again.yaml\n",
    "self": "seed: &s [*s]\n",
    "number-key": "1: 2\n",
    "no-group": "training: 3\n",
    "unknown": "model:\n  num_expert: 4\n",
    "type": "training:\n  max_steps: soon\n",
    "levels": "".join(" " * level + "a:\n" for level in range(100)),
    "dots": "seed: 1\n...\n---\nseed: 2\n",
    "many": "x: [" + "1," * 20_000 + "]\n",
    "presets": "bold:\n  temperatur: 1\n",
    "preset-text": "bold:\n  temperature: hot\n",
    "preset-flat": "temperature: 1\n",
}
_NAMES = {
    "bad.jsonl": '{"name": "Mire Seer"}\n{"name": \n',
    "number.jsonl": "3\n",
    "nameless.jsonl": '{"type": "Creature"}\n',
    "nested.jsonl": '{"name": {"en": "Mire Seer"}}\n',
    "surrogate.jsonl": '{"name": "Mire \\ud800Seer"}\n',
    "digits.jsonl": '{"name": "Mire", "mana_value": ' + "9" * 5000 + "}\n",
    "nan.jsonl": '{"name": "Mire", "mana_value": NaN}\n',
    "negative.jsonl": '{"name": "Mire", "mana_value": -1}\n',
    "color.jsonl": '{"name": "Mire", "colors": "purple"}\n',
    "rarity.jsonl": '{"name": "Mire", "rarity": "legendary"}\n',
    "set.jsonl": '{"name": "Mire", "set": "Zendikar Rising"}\n',
    "released.jsonl": '{"name": "Mire", "released": "last year"}\n',
    "object.json": '{"name": "Mire Seer"}',
    "number.json": "3",
    "half.json": '["Mire Seer", "Grave',
    "unnamed.csv": "title,cost\nMire Seer,3\n",
    "ragged.csv": "name,type\nMire Seer\n",
    "quote.csv": 'name,type\n"Mire Seer,Creature\n',
    "long-name.txt": "Mire " * 100 + "\n",
    "nul.txt": "Mire\0Seer\n",
    "few.txt": "1234\n!!!\n",
    "loads.json": '{"loads": {"1": [1, 2]}}',
    "metrics.jsonl": "hello\n{}\n",
}


def spoil_files(folder: Path) -> None:
    """Puts files into a folder that hold no names, no settings and no figures."""
    for suffix in _SUFFIXES:
        (folder / f"folder.{suffix}").mkdir()
        contents = {
            "empty": b"",
            "blank": b"\n \n\n",
            "binary": bytes(range(256)) * 8,
            "utf16": "name\nMire Seer\n".encode("utf-16"),
            "latin1": "name\nJötun Grunt\n".encode("latin-1"),
            "deep": b"[" * 100_000,
            "long": b"x" * (2 * 2**20),
            "gzip": gzip.compress(b"Mire Seer\n" * 100),
        }
        for name, content in contents.items():
            (folder / f"{name}.{suffix}").write_bytes(content)
    for name, text in _YAML.items():
        (folder / f"{name}.yaml").write_text(text, "utf-8")
    for name, text in _NAMES.items():
        (folder / name).write_text(text, "utf-8")
    (folder / "xz.txt").write_bytes(lzma.compress(b"Mire Seer\n" * 10**6))
    with zipfile.ZipFile(folder / "zip.csv", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../names.txt", b"0" * 10**7)


# ------------------------------------------------------------------------------------------------------- model folders


def set_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")

    return spoil


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return spoil


def header(content: bytes, data: bytes = b"") -> Callable[[Path], None]:
    """A safetensors file of this header, the length told as it is."""
    return write("model.safetensors", struct.pack("<Q", len(content)) + content + data)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _nan(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.h.0.ln_1.weight"][3] = float("nan")


def _swap(weights: dict[str, torch.Tensor]) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    weights[name] = weights[name].t().contiguous()


def _other_tokenizer(folder: Path) -> None:
    """A tokenizer whose ids the model has not."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for index in range(500):
        tokenizer["model"]["vocab"][f"zz{index}"] = 10_000 + index
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")


def _remote_code(folder: Path) -> None:
    set_config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="evil")(folder)
    (folder / "evil.py").write_text("open('pwned', 'w')\nclass Config: pass\nclass Model: pass\n", "utf-8")


def _remote_tokenizer(folder: Path) -> None:
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "tokenizer.json").unlink()
    (folder / "evil.py").write_text("open('pwned', 'w')\nclass Evil: pass\n", "utf-8")


def _index(path: str) -> Callable[[Path], None]:
    """Weights in several files, one of them somewhere else."""

    def spoil(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, path)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")

    return spoil


def _no_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[", "utf-8")


_GIGABYTE = b'{"x": {"dtype": "F32", "shape": [268435456], "data_offsets": [0, 1073741824]}}'
MODELS: dict[str, Callable[[Path], None]] = {
    "pickled": _pickled,
    "cut": _cut,
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "no-weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no-tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "config-text": write("config.json", b"hello"),
    "config-list": write("config.json", b"[]"),
    "config-deep": write("config.json", b'{"a":' * 100_000),
    "config-binary": write("config.json", bytes(range(256))),
    "config-huge": write("config.json", b'{"a": "' + b"x" * (20 * 2**20) + b'"}'),
    "other-model": set_config(model_type="bert"),
    "unknown-model": set_config(model_type="gpt17"),
    "no-model-type": set_config(model_type=None),
    "layers": set_config(n_layer=10**9),
    "wide": set_config(n_embd=10**9),
    "vocabulary": set_config(vocab_size=10**9),
    "positions": set_config(n_positions=10**9),
    "negative": set_config(n_layer=-1),
    "word": set_config(n_embd="wide"),
    "heads": set_config(n_head=7),
    "no-heads": set_config(n_head=0),
    "activation": set_config(activation_function="os.system"),
    "more-layers": set_config(n_layer=3),
    "dtype": set_config(dtype="exec"),
    "kernel": set_config(_attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
    "adapter": write("adapter_config.json", b'{"base_model_name_or_path": "../other", "peft_type": "LORA"}'),
    "generation-text": write("generation_config.json", b"hello"),
    "tokenizer-list": write("tokenizer_config.json", b"[]"),
    "quantized": set_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nan": change_weights(_nan),
    "swapped": change_weights(_swap),
    "one-missing": change_weights(lambda weights: weights.pop("transformer.ln_f.weight")),
    "no-tensor": change_weights(dict.clear),
    "header-length": write("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "header-text": header(b"hello world"),
    "gigabyte": header(_GIGABYTE),
    "gigabyte-named": header(_GIGABYTE.replace(b'"x"', b'"transformer.wte.weight"')),
    "empty-weights": write("model.safetensors", b""),
    "tokenizer-text": write("tokenizer.json", b"hello"),
    "tokenizer-deep": write("tokenizer.json", b"[" * 100_000),
    "tokenizer-other": _other_tokenizer,
    "remote-code": _remote_code,
    "remote-tokenizer": _remote_tokenizer,
    "index-above": _index("../base/model.safetensors"),
    "index-root": _index("/etc/passwd"),
    "index-text": _no_index,
}


def spoil_models(models: Path, base: str = "base", more: str = "moe") -> None:
    """Puts spoiled copies of the model ``base`` into a folder, and two of the one with experts."""
    for name, spoil in MODELS.items():
        shutil.copytree(models / base, models / name, ignore=shutil.ignore_patterns("checkpoints"))
        spoil(models / name)
    for name, changes in {"experts": {"num_experts": 10**9}, "top": {"num_experts_per_tok": 99}}.items():
        shutil.copytree(models / more, models / name)
        set_config(**changes)(models / name)
