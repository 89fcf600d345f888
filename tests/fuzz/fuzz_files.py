"""Coverage-guided fuzzing of what reads strangers' files, by hand (pip install atheris; Linux, CPython 3.11 or 3.12):

    python tests/fuzz/fuzz_files.py cards -max_total_time=120
    python tests/fuzz/fuzz_files.py model -max_total_time=120
    python tests/fuzz/fuzz_files.py checkpoint -max_total_time=120

`cards` feeds bytes to the readers of txt, csv, json, jsonl and YAML; `model` to the checks of config.json, of the index
and of the header of a safetensors file; `checkpoint` to the manifest, the state and the tensors that a run of a tiny
model is resumed from, up to the optimizer's next step. A ValueError that names the file is an answer; anything else
ends the run with the input that caused it. Seeds are the test data, and small files of each kind. What was found is in
`test_properties_of_files` and `test_checkpoint.test_foreign`.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import atheris
import torch
from safetensors.torch import load, save
from transformers import GPT2Config, GPT2LMHeadModel

with atheris.instrument_imports(include=["flash_experts", "json", "csv", "yaml"]):
    import json

    from flash_experts.data.cleaning import clean
    from flash_experts.data.sources import read_file
    from flash_experts.models import loading
    from flash_experts.models.saving import MANIFEST
    from flash_experts.options import read_yaml
    from flash_experts.training import checkpoint as checkpoints
    from flash_experts.training.checkpointer import Checkpointer
    from flash_experts.training.optimizer import OptimizerState
    from flash_experts.training.training_config import TrainingConfig

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
SUFFIXES = (".txt", ".csv", ".json", ".jsonl", ".yaml")


def cards(data: bytes) -> None:
    if not data:
        return
    suffix = SUFFIXES[data[0] % len(SUFFIXES)]
    path = FOLDER / f"cards{suffix}"
    path.write_bytes(data[1:])
    try:
        if suffix == ".yaml":
            read_yaml(path)
        else:
            clean(read_file(path).rows)
    except ValueError as error:
        assert path.name in str(error), repr(error)


def model(data: bytes) -> None:
    """The first byte says which file the rest is; the others are empty settings and an empty header."""
    if not data:
        return
    files = {
        "config.json": b"{}",
        loading.WEIGHTS: (2).to_bytes(8, "little") + b"{}",
        loading.INDEX: b"{}",
    }
    chosen = list(files)[data[0] % 3]
    files[chosen] = data[1:]
    if chosen == loading.INDEX:
        files.pop(loading.WEIGHTS)
        (FOLDER / loading.WEIGHTS).unlink(missing_ok=True)
    else:
        files.pop(loading.INDEX)
    for name, content in files.items():
        (FOLDER / name).write_bytes(content)
    try:
        loading.check_folder(FOLDER)
        for path in loading.weight_files(FOLDER):
            loading.tensor_sizes(path)
    except ValueError as error:
        assert str(FOLDER) in str(error), repr(error)


def tiny_run() -> tuple[Checkpointer, torch.optim.Optimizer, dict[str, bytes]]:
    """A run of a model of 300 weights after one step, and the files of its checkpoint but for the manifest."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 2, dtype=torch.int64), labels=torch.zeros(1, 2, dtype=torch.int64)).loss.backward()
    optimizer.step()
    state = OptimizerState(model, optimizer)
    config = TrainingConfig(output_dir=str(FOLDER), run_name="run", keep_checkpoints=1, save_in_background=False)
    about: dict[str, Any] = {"config": asdict(config), "data": {"train_sha256": ""}}
    about |= {
        "processes": 1,
        "device": "cpu",
        "identity": {"tokenizer": "", "validation_names": None, "model_config": {}},
    }
    tokenizer: Any = None  # what is read has none
    run = Checkpointer(config, model, tokenizer, about, str, is_main=True)
    run.register("optimizer", state)
    tensors = {f"optimizer/{name}": tensor for name, tensor in state.state_dict().items()}
    about |= {"state": asdict(checkpoints.TrainerState(step=1)), "registered": {"optimizer": {}}}
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    files = {
        checkpoints.STATE: json.dumps(about).encode(),
        checkpoints.TENSORS: save(tensors),
        "config.json": b"{}",
        "model.safetensors": save(weights),
    }
    return run, optimizer, files


RUN, OPTIMIZER, FILES = tiny_run()


def edited(tensors_file: bytes, data: bytes) -> bytes:
    """Some of its tensors gone, renamed, of another shape or type, as the bytes say: a sound file of other things."""
    provider, tensors = atheris.FuzzedDataProvider(data), load(tensors_file)
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        name = provider.PickValueInList(sorted(tensors))
        tensor, what = tensors.pop(name), provider.ConsumeIntInRange(0, 3)
        if what == 1:
            tensors[provider.ConsumeUnicodeNoSurrogates(40)] = tensor
        elif what == 2:
            shape = [provider.ConsumeIntInRange(0, 8) for _ in range(provider.ConsumeIntInRange(0, 3))]
            tensors[name] = tensor.new_zeros(shape)
        elif what == 3:
            tensors[name] = tensor.to(provider.PickValueInList([torch.int8, torch.bool, torch.float16, torch.float64]))
    return save(tensors)


def checkpoint(data: bytes) -> None:
    """The first byte says which file the rest is, or the edits of. The manifest fits the others: damage alone would be
    found by it."""
    if not data:
        return
    files = dict(FILES)
    chosen = [checkpoints.STATE, checkpoints.TENSORS, "model.safetensors", MANIFEST][data[0] % 4]
    if data[0] & 4 and chosen.endswith(".safetensors"):
        files[chosen] = edited(FILES[chosen], data[1:])
    elif chosen in files:
        files[chosen] = data[1:]
    for name, content in files.items():
        (FOLDER / name).write_bytes(content)
    manifest = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()
    }
    own = data[1:] if chosen == MANIFEST else json.dumps(manifest).encode()
    (FOLDER / MANIFEST).write_bytes(own)
    try:
        RUN.restore(FOLDER)
        OPTIMIZER.step()
    except ValueError as error:
        assert str(FOLDER) in str(error), repr(error)


def seeds(name: str) -> list[bytes]:
    """Inputs to begin with: small, and of each kind."""
    if name == "cards":
        folder = Path(__file__).parents[1] / "test_data"
        found = [(index, path) for index, suffix in enumerate(SUFFIXES) for path in folder.glob(f"own*{suffix}")]
        return [bytes([index]) + path.read_bytes()[:2000] for index, path in found]
    entry = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}'
    tensors = len(entry).to_bytes(8, "little") + entry + bytes(8)
    if name == "model":
        config = b'{"model_type":"gpt2","n_layer":2,"n_embd":8,"n_head":2,"auto_map":{"AutoConfig":"x.y"}}'
        index = b'{"metadata":{"total_size":8},"weight_map":{"a":"model.safetensors"}}'
        return [b"\0" + config, b"\1" + tensors, b"\2" + index]
    manifest = b'{"config.json":{"sha256":"%s","bytes":2}}' % hashlib.sha256(b"{}").hexdigest().encode()
    return [
        b"\0" + FILES[checkpoints.STATE],
        b"\1" + FILES[checkpoints.TENSORS],
        b"\2" + FILES["model.safetensors"],
        b"\3" + manifest,
        b"\5" + bytes(range(40)),
        b"\6" + bytes(range(40)),
    ]


def main() -> None:
    target = {"cards": cards, "model": model, "checkpoint": checkpoint}[sys.argv[1]]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, content in enumerate(seeds(sys.argv[1])):
        (corpus / str(number)).write_bytes(content)
    atheris.Setup([sys.argv[0], str(corpus), "-max_len=16384", *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
