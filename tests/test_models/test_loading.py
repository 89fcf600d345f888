"""Folders that are not a model, damaged or unsafe: one line that says what to do."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import GPT2LMHeadModel

from flash_experts.models.loading import load_dense, load_model, resolve_device


@pytest.fixture
def folder(dense: GPT2LMHeadModel, tmp_path: Path) -> Path:
    dense.save_pretrained(tmp_path)
    return tmp_path


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_loads_dense_in_float32_with_our_attention(folder: Path, dense: GPT2LMHeadModel) -> None:
    dense.to(torch.bfloat16).save_pretrained(folder)
    model = load_model(folder, "cpu")
    assert model.dtype == torch.float32 and not model.training
    assert model.config._attn_implementation == "fe_attention"
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, dense.float()(ids).logits, rtol=0, atol=1e-5)
    assert model.config.activation_function == "gelu_pytorch_tanh", "the same function, fused"


def test_a_truncated_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged") as error:
        load_model(folder)
    one_line(error)


def test_a_pickle_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle") as error:
        load_model(folder)
    one_line(error)


def test_weights_that_the_configuration_has_no_place_for_are_refused(folder: Path) -> None:
    """Else a model without its last blocks would write nonsense."""
    config = folder / "config.json"
    layers = json.loads(config.read_text())["n_layer"]
    config.write_text(config.read_text().replace(f'"n_layer": {layers}', f'"n_layer": {layers - 1}'))
    with pytest.raises(ValueError, match=rf"config.json has no place, transformer.h.{layers - 1}\.") as error:
        load_model(folder)
    one_line(error)


def test_a_setting_that_the_model_does_not_have(folder: Path) -> None:
    with pytest.raises(ValueError, match="'num_expert_per_tok' is not a setting of a gpt2 model"):
        load_model(folder, settings={"num_expert_per_tok": 3})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt9"}'), "gpt9"),
    ],
)
def test_a_folder_that_lacks_something(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    one_line(error)


def test_a_checkpoint_of_another_shape_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    with pytest.raises(ValueError, match="of another model") as error:
        load_model(folder)
    one_line(error)


def test_upcycling_takes_gpt2_only_and_rejects_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a file"):
        load_dense(folder / "config.json")


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="unknown device"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            resolve_device("cuda")


def test_an_unreachable_hub_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port on this machine where nobody listens stands for the hub."""
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{unused.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ValueError, match=r"is not available from the hub.*models/mtg-base") as error:
            load_dense("openai-community/gpt2-that-nobody-has")
    one_line(error)
