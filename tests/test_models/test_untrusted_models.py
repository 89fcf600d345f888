"""Untrusted model folders: one line within seconds and little memory; nothing of theirs runs or is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config
from transformers.models.qwen2 import Qwen2ForCausalLM

from flash_experts.commands.export import _read_loads as read_loads
from flash_experts.data.tokenizer import WORD_MARK, before_words, check_tokenizer, load_tokenizer
from flash_experts.evaluation.curves import read_curve, read_curves
from flash_experts.evaluation.routing.maps import read_loads as read_training_loads
from flash_experts.model_files import any_family
from flash_experts.models.loading import load_model
from tests.helpers.command_line import TINY_RUN, ok, run
from tests.helpers.spoiled import MODELS, set_config, set_tokenizer_config, spoil_models

ANSWERS = {
    "pickled": "is a pickle, which can run code when loaded: refused",
    "cut": "model.safetensors is damaged",
    "no-config": "config.json is missing",
    "no-weights": "model.safetensors is missing",
    "no-tokenizer": "no tokenizer at",
    "config-text": "config.json is damaged",
    "config-list": "config.json is damaged: it does not hold settings",
    "config-deep": "config.json is damaged",
    "config-binary": "config.json is damaged",
    "config-huge": "where at most 1,048,576 are allowed",
    "other-model": "this is 'bert'",
    "unknown-model": "gpt17",
    "no-model-type": "add --model-family any",
    "layers": "asks for 1,000,000,000 layers, but there are only 28 tensors",
    "wide": "asks for the impossible",
    "vocabulary": "asks for 32,",
    "positions": "asks for 32,",
    "negative": "asks for -1 layers",
    "word": "n_embd",
    "heads": "divisible",
    "no-heads": "asks for the impossible",
    "activation": "os.system",
    "more-layers": "the checkpoint is incomplete, or of another model",
    "dtype": "cannot be loaded",
    "kernel": "names kernels of a hub to run",
    "adapter": "is an adapter for another model",
    "tokenizer-list": "no tokenizer at",
    "quantized": "is quantized",
    "nan": "ln_1.weight has values that are not finite numbers",
    "swapped": "the shape of a weight does not match config.json",
    "one-missing": "the checkpoint is incomplete, or of another model",
    "no-tensor": "asks for 2 layers, but there are only 0 tensors",
    "header-length": "a header of 1,152,921,504,606,846,976 bytes",
    "header-text": "model.safetensors is damaged",
    "gigabyte": "bytes instead of 1,073,741,910",
    "gigabyte-named": "bytes instead of 1,073,741,931",
    "empty-weights": "model.safetensors is damaged",
    "tokenizer-text": "no tokenizer at",
    "tokenizer-deep": "no tokenizer at",
    "tokenizer-other": "they do not belong together",
    "remote-code": "names code of its own to run",
    "remote-tokenizer": "no tokenizer at",
    "index-above": "names weights that are not in its folder",
    "index-root": "names weights that are not in its folder",
    "index-text": "model.safetensors.index.json is damaged",
    "experts": "num_experts is 1000000000, but it must be from 0 to 10,000",
    "top": "num_experts_per_tok (99)",
    "config-twice": "the key 'model_type' occurs twice",
    "config-infinite": "the number Infinity is not finite",
    "config-1e400": "the number 1e400 is not finite",
    "config-digits": "a number of 401 digits",
    "config-latin1": "not UTF-8 text at byte",
    "other-weights": "names other files of weights",
    "pickled-weights": "names other files of weights",
    "other-settings": "names other files of settings",
    "named-file": "names a file, '../base/model.safetensors', which is not read: remove draft",
    "labels": "num_labels is 1,000,000,000",
    "qwen2": "this is 'qwen2'",
    "gpt-neo": "this is 'gpt_neo'",
    "nested": "rope_parameters does not hold settings of rotary positions",
    "rope": "rope_type is one of default",
    "float8": "x has dtype 'F8_E4M3'",
    "shape-text": "x has a shape or offsets that are not whole numbers",
    "shape-negative": "x has a shape or offsets that are not whole numbers",
    "shape-long": "x has a shape or offsets that are not whole numbers",
    "shape-other": "x has 2 elements in 4 bytes",
    "header-list": "model.safetensors is damaged",
    "sparse-weights": "more than half of it was never written",
    "sparse-template": "where at most 1,048,576 are allowed",
    "sparse-templates": "where at most 1,048,576 are allowed",
    "sparse-added": "where at most 4,194,304 are allowed",
    "sparse-tokenizer": "where at most 25,165,824 are allowed",
    "link-config": "config.json is a link that leads out of its folder",
    "link-weights": "model.safetensors is a link that leads out of its folder",
    "link-tokenizer": "tokenizer.json is a link that leads out of its folder",
    "link-nowhere": "added_tokens.json is a broken link",
    "link-loop": "chat_template.jinja is a broken link",
    "link-folder": "additional_chat_templates is a link that leads out of its folder",
    "pipe": "chat_template.jinja is not a regular file",
    "tokenizer-doubling": "replaces text by a longer one",
    "tokenizer-expression": "splits text at a regular expression",
    "tokenizer-prefix": "a BPE with continuing_subword_prefix",
    "tokenizer-merges": "no tokenizer at",
    "tokenizer-unigram": "its model is not a BPE",
    "tokenizer-ids": "larger than any vocabulary",
    "tokenizer-sequence": "its pre_tokenizer is damaged",
    "tokenizer-bytes": "its pre_tokenizer makes text longer more than once",
    "tokenizer-template": "its template adds more than 16 tokens",
    "tokenizer-rag": "its tokenizer_class is 'RagTokenizer'",
    "tokenizer-code": "names code of its own to run",
    "tokenizer-file": "vocab_file names a file",
    "tokenizer-extra": "more than 10,000",
    "tokenizer-bos": "its bos_token '<nowhere>' is not in the vocabulary",
}
HARMLESS = ("generation-text",)  # transformers continues without it
SECONDS, BYTES = 5, 2**30


@pytest.fixture(scope="module")
def untrusted(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrusted") / "place"
    shutil.copytree(workplace, folder, ignore=shutil.ignore_patterns("tuned", "*.html"))
    spoil_models(folder / "models")
    return folder


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What every command does with a model folder."""
    model = load_model(folder, "cpu")
    return model, load_tokenizer(folder, model.config.vocab_size)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", ANSWERS)
def test_it_is_refused_in_one_line(name: str, untrusted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before, start, memory = sorted(untrusted.rglob("*")), time.process_time(), peak_bytes()
    with pytest.raises(ValueError) as error:
        load(untrusted / "models" / name)
    assert time.process_time() - start < SECONDS and peak_bytes() - memory < BYTES
    assert len(str(error.value).splitlines()) == 1 and ANSWERS[name] in str(error.value), error.value
    assert "panicked" not in capfd.readouterr().err
    assert sorted(untrusted.rglob("*")) == before and not list(untrusted.rglob("pwned"))


def test_every_spoiled_folder_is_tried() -> None:
    assert ANSWERS.keys() | set(HARMLESS) == MODELS.keys() | {"experts", "top"}


@pytest.mark.parametrize("name", ["tokenizer-other", "tokenizer-prefix", "nan", "layers"])
@pytest.mark.parametrize(
    "command", ["generate --count 1 --model", "upcycle --out new", "train --base", "evaluate --names names.txt"]
)
def test_commands_refuse_it_too(name: str, command: str, untrusted: Path) -> None:
    done = run(*command.split(), f"models/{name}", cwd=untrusted)
    assert done.status == 1 and len(done.err.splitlines()) == 1 and ANSWERS[name] in done.err, done.err
    assert not (untrusted / "new").exists() and not list(untrusted.rglob("pwned"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_a_gigabyte_that_is_claimed_is_never_asked_of_the_system(untrusted: Path) -> None:
    """A process of its own that may take one gigabyte of memory beyond what its imports took."""
    script = """
import resource, sys
from pathlib import Path
from flash_experts.models.loading import load_model
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in ("gigabyte", "gigabyte-named", "experts", "layers", "vocabulary", "header-length", "config-huge"):
    try:
        load_model(f"models/{name}")
    except ValueError as error:
        print(name)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=untrusted, env=environment, capture_output=True, text=True, timeout=300
    )
    assert len(done.stdout.split()) == 7, done.stderr


# ----------------------------------------------------------------------------------------------------- what is accepted


@pytest.fixture
def sound(untrusted: Path, tmp_path: Path) -> Path:
    """A copy of a sound model, to be changed."""
    return Path(shutil.copytree(untrusted / "models/base", tmp_path / "sound"))


def test_fields_without_effect_are_left_out(sound: Path) -> None:
    before = load_model(sound, "cpu").config.to_dict()
    set_config(
        return_dict=False,
        id2label={"0": "a"},
        _name_or_path="/home/somebody/gpt2",
        task_specific_params={"text-generation": {"max_length": 50}},
    )(sound)
    assert load_model(sound, "cpu").config.to_dict() == before
    set_config(num_local_experts=4, unsloth_version="2026.1")(sound)
    with pytest.warns(UserWarning, match="ignored unknown fields of a gpt2 model: num_local_experts, unsloth_version"):
        assert not hasattr(load_model(sound, "cpu").config, "num_local_experts")


def test_conditions_and_other_names_of_fields_are_kept(sound: Path) -> None:
    set_config(conditions={"rarity": ["rare"]})(sound)
    config = json.loads((sound / "config.json").read_text("utf-8"))
    config["hidden_size"] = config.pop("n_embd")
    (sound / "config.json").write_text(json.dumps(config), "utf-8")
    loaded = load_model(sound, "cpu").config
    assert loaded.conditions == {"rarity": ["rare"]} and loaded.n_embd == config["hidden_size"]


def test_a_folder_of_the_hub_cache_whose_files_are_links(sound: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--somebody--names"
    snapshot = cache / "snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in filter(Path.is_file, sound.iterdir()):
        shutil.copy(file, cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    load(snapshot)


def test_settings_of_the_tokenizer_are_kept(sound: Path) -> None:
    set_tokenizer_config(name_or_path="/home/somebody/gpt2", padding_side="left", model_max_length=10**30)(sound)
    (sound / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    tokenizer = load_tokenizer(sound)
    positions = json.loads((sound / "config.json").read_text("utf-8"))["n_positions"]
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", positions)
    assert tokenizer.chat_template == "{{ messages }}"
    for name in ("tokenizer_config.json", "chat_template.jinja"):  # then the ids of config.json name the special tokens
        (sound / name).unlink()
    assert load_tokenizer(sound).eos_token == tokenizer.eos_token


def test_of_regular_expressions_a_decoder_has_only_that_of_whole_words() -> None:
    model = {"type": "BPE", "vocab": {}, "merges": []}
    for expression, mark in (("^(?=(?:(a+)+)$)", WORD_MARK), (before_words(["elf", "urza's"]), WORD_MARK * 2)):
        replace = {"type": "Replace", "pattern": {"Regex": expression}, "content": mark}
        with pytest.raises(ValueError, match="by a regular expression"):
            check_tokenizer({"model": model, "decoder": replace})


def test_a_llama_works_in_every_command_and_another_family_where_it_is_allowed(untrusted: Path) -> None:
    tokenizer = load_tokenizer(untrusted / "models/base")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape["num_key_value_heads"] = 4
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, **shape, **ids}
    for name, kind, config in (("llama", LlamaForCausalLM, LlamaConfig), ("qwen2", Qwen2ForCausalLM, Qwen2Config)):
        kind(config(**common)).save_pretrained(untrusted / "models" / f"own-{name}")
        tokenizer.save_pretrained(untrusted / "models" / f"own-{name}")
    model = "models/own-llama"
    ok("evaluate", model, "--names", "names.txt", cwd=untrusted)
    assert len(ok("generate", "--model", model, "--count", "2", cwd=untrusted).out.splitlines()) == 2
    run_name = ("--training.run-name=llama", "--training.max-steps=2", *TINY_RUN)
    ok("train", "--base", model, "--model.num-experts=0", *run_name, cwd=untrusted)
    ok("evaluate", "models/llama", "--names", "names.txt", cwd=untrusted)
    with pytest.raises(ValueError, match="this is 'qwen2'"):
        load(untrusted / "models/own-qwen2")
    ok("evaluate", "models/own-qwen2", "--names", "names.txt", "--model-family", "any", cwd=untrusted)
    with any_family():
        assert load(untrusted / "models/own-qwen2")[0].config.model_type == "qwen2"


def test_metrics_and_loads_of_an_untrusted_run(untrusted: Path, tmp_path: Path) -> None:
    """Numbers beyond float range, and values that are not numbers, are left out before plotting."""
    large = "1" + "0" * 400
    lines = [
        '{"event": "train", "step": 1, "loss": 2.5, "seconds": 1.0, "router/1/load_cv": {"a": 1}}',
        f'{{"event": "train", "step": 2, "loss": {large}, "seconds": {large}, "lr": [1], "router/1/load_cv": {large}}}',
        '{"event": "validation", "step": 2, "bits_per_char": {"a": 1}, "tokens": "many"}',
        f'{{"event": "train", "step": 3, "loss": NaN, "seconds": 1e999, "tokens": -{large}}}',
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join([*lines, f'{{"event": "train", "step": {large}}}', "{}"]), "utf-8")
    points = read_curve(metrics)
    assert [(point.step, point.train_loss) for point in points] == [(1, 2.5), (2, None), (3, None)]
    assert not any(point.tokens for point in points)
    metrics.write_text("\n".join(lines), "utf-8")
    [panels] = read_curves([metrics]).values()
    assert panels["loss"] == [(1, 2.5)] and not panels["load_imbalance"] and not panels["lr"]
    metrics.write_text(f'{{"event": "train", "step": 1, "router/1/load/0": {large}}}', "utf-8")
    assert read_training_loads(metrics) is None
    loads = tmp_path / "loads.json"
    for text in (f'{{"1": [{large}]}}', '{"1": {"a": 1}}', '{"x": [1]}', "[" * 100_000, "3"):
        loads.write_text(text, "utf-8")
        with pytest.raises(ValueError, match="has no loads by block"):
            read_loads(str(loads))
