"""``export gguf``: what a reader of GGUF files finds is the model and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.models.exports import export_gguf
from tests.conftest import WORDS
from tests.helpers.command_line import ok

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[teacher]'")

TEXTS = ["legendary creature goblin, red, 3:", " Jötun Grunt's Bolt", " Ætherling 42", "  two  spaces\n"]


def export(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> gguf.GGUFReader:
    found = export_gguf("models/mine", model, tokenizer, [[1, 2, 3], list(range(70))], out)
    assert found.largest < 1e-4 < found.scale
    return gguf.GGUFReader(out)


@pytest.mark.parametrize("fields", [{}, {"n_inner": 48, "tie_word_embeddings": False}])
def test_weights_and_shape(
    fields: dict[str, object], dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = GPT2Config(**{**dense_config.to_dict(), **fields})
    model = GPT2LMHeadModel(config).eval()
    read = export(model, tokenizer, tmp_path / "model.gguf")
    facts = {name: field.contents() for name, field in read.fields.items()}
    assert facts["general.architecture"] == "gpt2" and facts["general.name"] == "mine"
    assert facts["gpt2.feed_forward_length"] == fields.get("n_inner", 128)
    assert (facts["gpt2.block_count"], facts["gpt2.context_length"], facts["gpt2.attention.head_count"]) == (4, 64, 4)
    weights = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    assert torch.equal(weights["token_embd.weight"], model.transformer.wte.weight)
    assert torch.equal(weights["blk.3.ffn_down.weight"], model.transformer.h[3].mlp.c_proj.weight.T)
    assert torch.equal(weights["blk.3.ffn_down.bias"], model.transformer.h[3].mlp.c_proj.bias)
    assert ("output.weight" in weights) == ("tie_word_embeddings" in fields)
    assert sum(map(torch.numel, weights.values())) == model.num_parameters()


def test_its_tokenizer_is_ours(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    read = export(dense, tokenizer, tmp_path / "model.gguf")
    facts = {name: field.contents() for name, field in read.fields.items() if name.startswith("tokenizer")}
    assert facts["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert facts["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id and facts["tokenizer.ggml.add_bos_token"]
    assert facts["tokenizer.ggml.token_type"][tokenizer.eos_token_id] == gguf.TokenType.CONTROL
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="model.gguf")
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == text


def test_what_llama_cpp_cannot_compute_is_refused(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole_words = train_tokenizer(WORDS, 280, ["goblin"])
    with pytest.raises(ValueError, match="tokens for whole words"):
        export(dense, whole_words, tmp_path / "model.gguf")
    dense.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="scales its attention"):
        export(dense, tokenizer, tmp_path / "model.gguf")
    dense.config.activation_function = "relu"
    with pytest.raises(ValueError, match="the activation relu"):
        export(dense, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_the_commands_from_experts_to_a_file(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ok("upcycle", "base", "--method", "shared", "--num-experts", "3", "--out", "moe", cwd=tmp_path)
    ok("export", "dense", "moe", "--out", "dense", cwd=tmp_path)
    found = json.loads(ok("export", "gguf", "dense", "--out", "names.gguf", "--json", cwd=tmp_path).out)
    assert found["largest_difference"] < 1e-4 and found["names"] == 64
    assert (tmp_path / "names.gguf").read_bytes()[:4] == b"GGUF"
