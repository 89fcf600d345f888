"""Knowledge distillation: the loss against float64, a teacher of another family, runs that resume to the bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import TRAIN, VALIDATION, make_model
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flash_experts.data.packing import encode_cards, pack
from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.build import build_model
from flash_experts.training.loss import CausalLoss, DistillationLoss, kl_divergence, make_loss
from flash_experts.training.model_config import ModelConfig
from flash_experts.training.tracking import read_metrics


@pytest.fixture
def teacher(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A tiny Llama with random weights and the student's tokenizer."""
    torch.manual_seed(7)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**heads, **sizes, **ids)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def config(tmp_path: Path, teacher: Path) -> TrainingConfig:
    return TrainingConfig(
        output_dir=str(tmp_path),
        run_name="run",
        max_steps=4,
        tokens_per_batch=150,
        learning_rate=1e-2,
        log_every=1,
        eval_every=None,
        validation_names=4,
        checkpoint_every=2,
        keep_checkpoints=9,
        device="cpu",
        teacher=str(teacher),
        distill_weight=0.7,
        distill_temperature=1.5,
    )


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_divergence_and_its_gradient_are_those_of_float64(kl: str) -> None:
    torch.manual_seed(0)
    student, teacher, temperature = torch.randn(5, 9) * 3, torch.randn(5, 9) * 3, 1.7
    student.requires_grad_(True)
    found = kl_divergence(student, teacher, temperature, kl)
    p, q = ((x.detach().double() / temperature).softmax(-1) for x in (teacher, student))
    one, other = (p, q) if kl == "forward" else (q, p)
    torch.testing.assert_close(found.double(), (one * (one / other).log()).sum(-1), atol=1e-5, rtol=1e-5)
    found.sum().backward()
    if kl == "forward":  # softmax of the student less that of the teacher
        expected = (q - p) / temperature
    else:
        ratio = (q / p).log()
        expected = q * (ratio - (q * ratio).sum(-1, keepdim=True)) / temperature
    torch.testing.assert_close(student.grad.double(), expected, atol=1e-5, rtol=1e-4)


def test_the_loss_of_a_packed_row_is_that_of_each_name_alone(
    config: TrainingConfig, dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The teacher, a Llama, keeps the names of a row apart as the student does."""
    student = make_model(dense_config, dropout=0.0)
    loss = make_loss(config, student, tokenizer, torch.device("cpu"))
    assert isinstance(loss, DistillationLoss)
    student.loss_function = loss
    names = encode_cards(TRAIN[:3], tokenizer)
    row = pack(names)
    loss.prepare(row)
    found = student(**row.inputs_with_loss(row.labels.numel())).loss.double()
    expected = torch.zeros((), dtype=torch.float64)
    teacher, plain = loss.teacher.double(), student.double()
    for name in names:
        ids = torch.tensor([name.ids])
        logits, theirs = (model(ids[:, :-1]).logits[0, name.prompt_length - 1 :] for model in (plain, teacher))
        p, q = (theirs / 1.5).softmax(-1), (logits / 1.5).softmax(-1)
        hard = F.cross_entropy(logits, ids[0, name.prompt_length :], reduction="sum")
        expected += 0.3 * hard + 0.7 * 1.5**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(found, expected / row.labels.numel(), atol=1e-5, rtol=1e-5)


def test_a_distilled_run_follows_its_teacher_and_resumes_to_the_bit(
    config: TrainingConfig, dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def train(settings: TrainingConfig, resume: str | None = None) -> GPT2LMHeadModel:
        model = make_model(dense_config, dropout=0.1, seed=3 if resume is None else 4)
        Trainer(model, tokenizer, TRAIN, VALIDATION, settings).train(resume)
        return model

    whole = train(config)
    lines = read_metrics(config.run_dir / "metrics.jsonl", "train")
    assert len(lines) == 4 and "bits_per_char" not in lines[0], "the loss is not a code length"
    stopped = replace(config, run_name="stopped")
    shutil.copytree(config.run_dir, stopped.run_dir)
    shutil.rmtree(stopped.run_dir / "checkpoints" / "step-000004")
    resumed = train(stopped, "auto")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    alone = replace(config, run_name="alone", distill_weight=1.0, distill_temperature=1.0, max_steps=25)
    student = train(alone)
    loss = make_loss(alone, student, tokenizer, torch.device("cpu"))
    assert isinstance(loss, DistillationLoss)
    row = pack(encode_cards(VALIDATION, tokenizer))
    with torch.no_grad():
        theirs = loss.teacher(**row.inputs).logits[0]
        near, far = (
            kl_divergence(model.eval()(**row.inputs).logits[0], theirs, 1.0, "forward").mean()
            for model in (student, make_model(dense_config, seed=3))
        )
    assert near < 0.95 * far


def test_what_a_teacher_cannot_be_is_said_in_one_line(
    config: TrainingConfig, dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = train_tokenizer(["some other words"] * 3, vocab_size=len(tokenizer))
    model = make_model(dense_config)
    with pytest.raises(ValueError, match=r"another tokenizer than the model .* give model\.tokenizer"):
        make_loss(config, model, other, torch.device("cpu"))
    with pytest.raises(ValueError, match="no model at nowhere"):
        make_loss(replace(config, teacher="nowhere"), model, tokenizer, torch.device("cpu"))
    assert type(make_loss(replace(config, teacher=None), model, tokenizer, torch.device("cpu"))) is CausalLoss
    with pytest.raises(ValueError, match=r"distill_weight is 2.*; compile does not work with a teacher"):
        replace(config, distill_weight=2.0, compile=True).validate()


def test_a_new_student_takes_its_teachers_tokenizer(teacher: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    shape = ModelConfig(num_experts=0, n_layer=2, n_embd=32, n_head=2, tokenizer=str(teacher))
    model, its_tokenizer = build_model(None, shape, TRAIN, seed=0)
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert isinstance(model, GPT2LMHeadModel) and model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    trimmed, small = build_model(None, replace(shape, trim_vocabulary=True), TRAIN, seed=0)
    assert trimmed.config.vocab_size == len(small) <= len(tokenizer)
    with pytest.raises(ValueError, match=r"model\.tokenizer is for a new model"):
        build_model(str(teacher), shape, TRAIN, seed=0)
