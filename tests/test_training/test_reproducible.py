"""The same seed on the same machine gives the same, and a silent change of the numbers is seen."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, PreTrainedTokenizerFast

from flash_experts.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from flash_experts.models import GPT2MoEForCausalLM
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.loss import deterministic_algorithms
from tests.helpers.command_line import ok
from tests.test_training import TRAIN, VALIDATION, make_model, run

GOLDEN = Path(__file__).parents[1] / "test_data" / "golden_losses.json"
# Losses differ between CPUs by the order that their vector units add in. With SSE4.1 in AVX's place, and with two
# threads, fifty steps came out within 2e-7 of a value. This leaves room for other makers' chips and math libraries, and
# is far below what a change of the arithmetic, the data's order or a default does (another tokenizer: 6e-2).
TOLERANCE = 1e-4


def golden_config(folder: Path) -> TrainingConfig:
    return TrainingConfig(
        output_dir=str(folder),
        run_name="golden",
        seed=3,
        max_steps=50,
        max_epochs=None,
        tokens_per_batch=200,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        log_every=1,
        eval_every=None,
        checkpoint_every=None,
        device="cpu",
    )


def golden_losses(folder: Path) -> list[float]:
    """Fifty steps of two experts of four, from weights that are drawn here, with dropout; a token is a byte."""
    tokenizer = train_tokenizer([], SMALLEST_VOCABULARY)
    end = tokenizer.eos_token_id
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 128, "vocab_size": len(tokenizer)}
    config = GPT2Config(**sizes, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model = GPT2MoEForCausalLM.from_dense(make_model(config), 4, 2, 2)
    return [line["loss"] for line in run(model, tokenizer, golden_config(folder))]


def test_fifty_losses_are_those_that_were_written_down(tmp_path: Path) -> None:
    losses = golden_losses(tmp_path)
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert len(losses) == len(golden) == 50 and losses[-1] < 0.7 * losses[0]
    assert losses == pytest.approx(golden, rel=TOLERANCE)


def test_deterministic_training_learns_the_same_and_leaves_no_trace(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = replace(golden_config(tmp_path), max_steps=3)
    plain = run(make_model(dense_config), tokenizer, config)
    wanted = replace(config, run_name="deterministic", deterministic=True)
    seen: list[bool] = []
    model = make_model(dense_config)
    model.register_forward_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    steps = run(model, tokenizer, wanted)
    assert seen and all(seen) and not torch.are_deterministic_algorithms_enabled()
    assert [line["loss"] for line in steps] == [line["loss"] for line in plain]


def test_the_callers_deterministic_mode_comes_back() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_algorithms(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_attention_gets_the_deterministic_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA this selects a backend with deterministic gradients: see test_attention/test_backends.py."""
    from flash_experts.models import flash_attention

    flags: list[bool] = []

    def attention(q: torch.Tensor, *_: object, deterministic: bool, **__: object) -> tuple[torch.Tensor, None]:
        flags.append(deterministic)
        return q, None

    monkeypatch.setattr(flash_attention, "attention", attention)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=5)
    config._attn_implementation = flash_attention.ATTENTION_IMPLEMENTATION
    model = make_model(config)
    for wanted in (False, True):
        with deterministic_algorithms(wanted):
            model(torch.tensor([[1, 2]]))
    assert flags == [False, True]


def test_the_same_seed_gives_the_same_names_and_metrics(workplace: Path) -> None:
    """That the report repeats to the byte is in test_compare, with the speeds held still."""

    def everything(seed: str) -> tuple[str, str]:
        names = ok("generate", "--model", "models/moe", "--count", "5", "--seed", seed, "--json", cwd=workplace).out
        command = ("evaluate", "models/base", "--samples", "20", "--seed", seed, "--json")
        metrics = re.sub(
            r'"[a-z_]*(per_second|seconds|mib|bytes)[a-z_]*": [^,}\n]*', "", ok(*command, cwd=workplace).out
        )
        return names, metrics

    first = everything("3")
    assert first == everything("3")
    other = everything("4")
    assert other[0] != first[0] and other[1] != first[1]


def test_a_tokenizer_is_that_of_its_texts() -> None:
    """In any order, and with every pair as frequent as many others: hashes get a new seed at each training.

    `train_tokenizer` explains why; this test would notice a library that orders ties differently.
    """
    texts = [f"{first}{second} {second}{first}" for first in "abcdefghij" for second in "klmnopqrst"] * 2
    rng = random.Random(0)
    found = set()
    for _ in range(40):
        rng.shuffle(texts)
        found.add(train_tokenizer(texts, 330, ["goblin", "red"]).backend_tokenizer.to_str())
    assert len(found) == 1
    merges = json.loads(found.pop())["model"]["merges"]
    assert len(merges) == 330 - 257 and merges[:2] == [["Ġ", "k"], ["Ġ", "l"]]


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_only_where_the_processor_has_it(
    has_it: bool,
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In software its matmuls take more than forty times as long as in float32."""
    monkeypatch.setattr("flash_experts.training.loss.has_bfloat16", lambda: has_it)
    config = replace(config, precision="bfloat16", device="cpu")
    trainer = Trainer(make_model(dense_config), tokenizer, TRAIN, VALIDATION, config)
    assert trainer.autocast == has_it
    assert ("bfloat16 in software" in capsys.readouterr().err) != has_it
