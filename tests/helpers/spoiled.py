"""Malformed and malicious input files: names, settings and model folders."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
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
    "object.json": '{"name": "Mire Seer"}',
    "number.json": "3",
    "half.json": '["Mire Seer", "Grave',
    "unnamed.csv": "label,cost\nMire Seer,3\n",
    "numbers.csv": "idProduct;groupCount;price\n743311;1;12.00\n",
    "script.txt": "Name:Mire Seer\nManaCost:1 U\nTypes:Creature Wizard\n",
    "page.txt": "<!DOCTYPE html>\n<html>Mire Seer</html>\n",
    "cards.xml": "<cockatrice_carddatabase/>\n",
    "ragged.csv": "name,type\nMire Seer\n",
    "quote.csv": 'name,type\n"Mire Seer,Creature\n',
    "long-name.txt": "Mire " * 100 + "\n",
    "nul.txt": "Mire\0Seer\n",
    "few.txt": "1234\n!!!\n",
    "loads.json": '{"loads": {"1": [1, 2]}}',
    "metrics.jsonl": "hello\n{}\n",
}


def spoil_files(folder: Path) -> None:
    """Writes files without valid names, settings or metrics into a folder."""
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
    """A safetensors file with this header and its correct length."""
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
    """A tokenizer with ids that the model does not have."""
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
    """Sharded weights, with one shard outside the folder."""

    def spoil(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, path)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")

    return spoil


def _no_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[", "utf-8")


def set_tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        change(tokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")

    return spoil


def set_tokenizer_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    return spoil


def sparse(name: str, size: int = 3 * 2**30) -> Callable[[Path], None]:
    """A sparse file: gigabytes in size without taking disk space."""

    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return spoil


def _sparse_weights(folder: Path) -> None:
    """A header for 3.8 GB that matches its configuration, without any data."""
    weights = load_file(folder / "model.safetensors")
    tensors, place = {}, 0
    for name, weight in weights.items():
        shape = [30_000_000, weight.shape[1]] if name.endswith("wte.weight") else list(weight.shape)
        size = 4 * math.prod(shape)
        tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    content = json.dumps(tensors).encode()
    header(content)(folder)
    sparse("model.safetensors", 8 + len(content) + place)(folder)
    set_config(vocab_size=30_000_000)(folder)


def link(name: str, target: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def _pipe(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    os.mkfifo(folder / "chat_template.jinja")


def _doubling(tokenizer: dict[str, Any]) -> None:
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [twice] * 16}


def _expression(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "^(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }


def _long_template(tokenizer: dict[str, Any]) -> None:
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece] * 99,
        "pair": [],
        "special_tokens": {},
    }


def _tensor(**changes: Any) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}).encode()


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
    "config-twice": write("config.json", b'{"model_type": "gpt2", "model_type": "gpt2"}'),
    "config-infinite": set_config(layer_norm_epsilon=float("inf")),
    "config-1e400": write("config.json", b'{"model_type": "gpt2", "layer_norm_epsilon": 1e400}'),
    "config-digits": write("config.json", b'{"model_type": "gpt2", "n_layer": 1%s}' % (b"0" * 400)),
    "config-latin1": write("config.json", '{"model_type": "gpt2", "x": "ö"}'.encode("latin-1")),
    "other-weights": set_config(transformers_weights="../base/model.safetensors"),
    "pickled-weights": set_config(transformers_weights="adapter_model.bin"),
    "other-settings": set_config(configuration_files=["config.4.0.0.json"]),
    "named-file": set_config(draft={"path": ["../base/model.safetensors"]}),
    "labels": set_config(num_labels=10**9),
    "qwen2": set_config(model_type="qwen2", num_hidden_layers=10**9),
    "gpt-neo": set_config(model_type="gpt_neo", attention_types=[[["global"], 10**9]]),
    "nested": set_config(model_type="llama", rope_parameters={"full": {"rope_type": "default"}}),
    "rope": set_config(model_type="llama", rope_scaling={"rope_type": "evil", "factor": 2.0}),
    "float8": header(_tensor(dtype="F8_E4M3", shape=[4]), bytes(4)),
    "shape-text": header(_tensor(shape=["999"]), bytes(4)),
    "shape-negative": header(_tensor(shape=[-1, -1]), bytes(4)),
    "shape-long": header(_tensor(shape=[1] * 99), bytes(4)),
    "shape-other": header(_tensor(shape=[2]), bytes(4)),
    "header-list": header(b"[]"),
    "sparse-weights": _sparse_weights,
    "sparse-template": sparse("chat_template.jinja"),
    "sparse-templates": sparse("additional_chat_templates/tools.jinja"),
    "sparse-added": sparse("added_tokens.json"),
    "sparse-tokenizer": sparse("tokenizer.json"),
    "link-config": link("config.json", "../base/config.json"),
    "link-weights": link("model.safetensors", "../base/model.safetensors"),
    "link-tokenizer": link("tokenizer.json", "../base/tokenizer.json"),
    "link-nowhere": link("added_tokens.json", "nowhere"),
    "link-loop": link("chat_template.jinja", "chat_template.jinja"),
    "link-folder": link("additional_chat_templates", "/etc"),
    "pipe": _pipe,
    "tokenizer-doubling": set_tokenizer(_doubling),
    "tokenizer-expression": set_tokenizer(_expression),
    "tokenizer-prefix": set_tokenizer(lambda it: it["model"].update(continuing_subword_prefix="#####")),
    "tokenizer-merges": set_tokenizer(lambda it: it["model"].update(merges=[["q", "nowhere"]])),
    "tokenizer-unigram": set_tokenizer(lambda it: it["model"].update(type="Unigram", vocab=[["a", 0.0]])),
    "tokenizer-ids": set_tokenizer(lambda it: it["model"]["vocab"].update({"zz": 4_294_967_295})),
    "tokenizer-sequence": set_tokenizer(lambda it: it.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [3]})),
    "tokenizer-bytes": set_tokenizer(
        lambda it: it.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [it["pre_tokenizer"]] * 16})
    ),
    "tokenizer-template": set_tokenizer(_long_template),
    "tokenizer-rag": set_tokenizer_config(tokenizer_class="RagTokenizer"),
    "tokenizer-code": set_tokenizer_config(auto_map={"AutoTokenizer": ["evil.Evil", None]}),
    "tokenizer-file": set_tokenizer_config(vocab_file="../base/vocab.json"),
    "tokenizer-extra": set_tokenizer_config(extra_special_tokens=[f"<{index}>" for index in range(20_000)]),
    "tokenizer-bos": set_tokenizer_config(bos_token="<nowhere>"),
}


def spoil_models(models: Path, base: str = "base", more: str = "moe") -> None:
    """Writes spoiled copies of the model ``base`` into a folder, and two of the MoE model ``more``."""
    for name, spoil in MODELS.items():
        shutil.copytree(models / base, models / name, ignore=shutil.ignore_patterns("checkpoints"))
        spoil(models / name)
    for name, changes in {"experts": {"num_experts": 10**9}, "top": {"num_experts_per_tok": 99}}.items():
        shutil.copytree(models / more, models / name)
        set_config(**changes)(models / name)
