"""``export onnx``: ONNX Runtime gives our logits, for any batch and length."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.models.exports import export_onnx
from tests.helpers.command_line import ok, run

pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install -e '.[onnx]'")

KINDS = {
    "plain": {},
    "shared": {"num_shared_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 3, "n_inner": 48},
    "sigmoid": {"scoring_func": "sigmoid", "norm_topk_prob": False, "moe_layer_freq": 1, "tie_word_embeddings": False},
    "capacity": {"capacity_factor": 1.1, "activation_function": "relu"},
}


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options)


def make(kind: str, tokenizer: PreTrainedTokenizerFast) -> GPT2MoEForCausalLM:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = GPT2MoEForCausalLM(GPT2MoEConfig(**{**shape, **ids, "num_experts": 4, **KINDS[kind]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def check(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    implementations = model.config._attn_implementation, model.config._experts_implementation
    found = export_onnx("models/mine", model, tokenizer, [[1, 2, 3], list(range(70))], out)
    assert found.largest < 1e-4 < found.scale and found.names == 2
    assert implementations == (model.config._attn_implementation, model.config._experts_implementation)
    running = session(out)
    for shape in ((3, 17), (1, 1), (2, 64)):
        ids = torch.randint(len(tokenizer), shape, generator=torch.Generator().manual_seed(1))
        [logits] = running.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(ids).logits, rtol=0, atol=1e-4)
    assert f"differ from the source's by at most {found.largest:.2g}" in (out / "README.md").read_text("utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_are_ours(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    check(make(kind, tokenizer), tokenizer, tmp_path / "out")


def test_those_of_a_dense_model(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    check(dense, tokenizer, tmp_path / "out")


def test_expert_choice_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = GPT2MoEForCausalLM(GPT2MoEConfig(n_layer=1, n_embd=8, n_head=1, moe_layer_freq=1, routing="expert_choice"))
    with pytest.raises(ValueError, match="expert choice, whose experts depend on later tokens"):
        export_onnx("models/mine", model, tokenizer, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_and_the_program_in_its_readme(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("export", "onnx", workplace / "models/moe", "--out", "onnx")
    found = json.loads(ok(*command, "--json", cwd=tmp_path).out)
    assert found["largest_difference"] < 1e-4 and found["names"] == 64
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "onnx").iterdir()}
    again = run(*command, cwd=tmp_path)
    assert again.status == 1 and "is not empty" in again.err
    card = (tmp_path / "onnx/README.md").read_text("utf-8")
    [program] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "onnx")
    texts: list[str] = []
    exec(program, {"print": texts.append})
    assert texts[0].startswith("legendary creature goblin, red, 3:")
