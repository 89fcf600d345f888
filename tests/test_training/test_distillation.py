"""Knowledge distillation: the loss against float64, a teacher of another family, runs that resume to the bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flash_experts.data.cards import Card
from flash_experts.data.packing import encode_cards, pack
from flash_experts.data.prompts import texts_of_cards
from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.models.loading import load_model
from flash_experts.models.scoring import NameLogits, TopLogits, write_index, write_shard
from flash_experts.models.trimming import trim_tokenizer
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.batches import NameBatches
from flash_experts.training.build import build_model
from flash_experts.training.loss import (
    CausalLoss,
    DistillationLoss,
    TopLogitsLoss,
    kl_divergence,
    make_loss,
    top_divergence,
)
from flash_experts.training.tracking import read_metrics
from flash_experts.training.training_config import ModelConfig
from tests.test_training import TRAIN, VALIDATION, make_model

ONE_BATCH = TrainingConfig(tokens_per_batch=10_000, attribute_dropout=0.0)


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


@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_loss_of_a_packed_row_is_that_of_each_name_alone(
    config: TrainingConfig, dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, share_prompts: bool
) -> None:
    """The teacher, a Llama, keeps the names of a row apart as the student does."""
    student = make_model(dense_config, dropout=0.0)
    loss = make_loss(config, student, tokenizer, torch.device("cpu"))
    assert isinstance(loss, DistillationLoss)
    student.loss_function = loss
    names = encode_cards([replace(card, mana_value=2) for card in TRAIN[:3]], tokenizer)
    row = pack(names, share_prompts)
    assert (row.row_of is not None) == share_prompts
    loss.prepare(row)
    found = student(**row.inputs_with_loss(row.labels.numel())).loss.double()
    found.backward()
    assert all(parameter.grad is None for parameter in loss.teacher.parameters()), "the teacher does not learn"
    with pytest.raises(AssertionError, match="prepare"):  # the teacher's logits are for one forward
        student(**row.inputs_with_loss(row.labels.numel()))
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
        ours = student.eval()(**row.inputs_with_loss(row.labels.numel()))
        torch.testing.assert_close(
            ours.loss, F.cross_entropy(ours.logits[0], row.labels), msg="it has its own loss again"
        )
        theirs = loss.teacher(**row.inputs).logits[0]
        near, far = (
            kl_divergence(model.eval()(**row.inputs).logits[0], theirs, 1.0, "forward").mean()
            for model in (student, make_model(dense_config, seed=3))
        )
    assert near < 0.95 * far


def test_a_wrong_teacher_is_an_error_of_one_line(
    config: TrainingConfig, dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = train_tokenizer(["some other words"] * 3, vocab_size=len(tokenizer))
    model = make_model(dense_config)
    with pytest.raises(ValueError, match=r"another tokenizer than the model .* set model\.tokenizer"):
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
    with pytest.raises(ValueError, match=r"model\.tokenizer is for a new model, but a base is given"):
        build_model(str(teacher), ModelConfig(num_experts=0, tokenizer=str(teacher)), TRAIN, seed=0)


def sampled_cards(count: int) -> list[Card]:
    return [replace(card, source_id=f"sampled:{10 + place}") for place, card in enumerate(TRAIN[:count])]


def write_top_logits(folder: Path, tokenizer: PreTrainedTokenizerFast, cards: list[Card], kept: int) -> torch.Tensor:
    """Random teacher logits of all labels of the cards; returns them (L, V)."""
    torch.manual_seed(1)
    names, every = {}, []
    for card, name in zip(cards, encode_cards(cards, tokenizer), strict=True):
        labels = name.ids[name.prompt_length :]
        logits = torch.randn(len(labels), len(tokenizer)) * 3
        top = logits.log_softmax(-1).topk(kept)
        number = int(card.source_id.removeprefix("sampled:"))
        names[number] = NameLogits(labels, top.indices.to(torch.int32), top.values.half())
        every.append(logits)
    half = len(names) // 2
    for shard, part in enumerate((list(names.items())[:half], list(names.items())[half:])):
        write_shard(folder, shard, dict(part))
    write_index(folder, 2, tokenizer, {"model": "random"})
    return torch.cat(every)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_divergence_over_all_tokens_or_the_top_and_the_rest(kl: str) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(5, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    ids = teacher.topk(4).indices
    p, q = teacher.exp(), student.exp()
    p5, q5 = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(-1, keepdim=True)], dim=-1) for x in (p, q))
    one, other = (p5, q5) if kl == "forward" else (q5, p5)
    found = top_divergence(student.gather(1, ids), teacher.gather(1, ids), kl)
    torch.testing.assert_close(found, (one * (one / other).log()).sum(-1))
    assert (found <= kl_divergence(student, teacher, 1.0, kl) + 1e-12).all(), "a coarser partition never diverges more"


def test_cached_probabilities_that_float16_rounds_to_more_than_one_leave_a_little_for_the_rest() -> None:
    """A rest of nothing would be an infinite divergence, or NaN."""
    rounded, exact = torch.tensor([[0.7, 0.301]]).log(), torch.tensor([[0.7, 0.3 - 4.5e-5]]).log()
    for kl in ("forward", "reverse"):
        assert top_divergence(rounded, rounded, kl).item() == 0  # type: ignore[arg-type]
        assert abs(top_divergence(exact, rounded, kl).item()) < 0.01  # type: ignore[arg-type]


def test_cached_logits_give_the_loss_of_the_teacher_that_runs(
    config: TrainingConfig, dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    cards, kept = sampled_cards(4), 7
    teacher = write_top_logits(tmp_path / "cache", tokenizer, cards, kept).double()
    settings = replace(config, teacher=str(tmp_path / "cache"), distill_temperature=1.0)
    student = make_model(dense_config, dropout=0.0)
    loss = student.loss_function = make_loss(settings, student, tokenizer, torch.device("cpu"))
    assert isinstance(loss, TopLogitsLoss) and loss.top_logits is not None
    batches = NameBatches(
        [*cards, TRAIN[5]],
        tokenizer,
        replace(ONE_BATCH, attribute_dropout=0.9),
        loss.top_logits,
    )
    names = batches.names_of_step(0)
    assert sorted(name.top_row >= 0 for name in names) == [False] + [True] * 4
    whole = {name.ids for name in encode_cards(cards, tokenizer)}
    assert all(name.ids in whole for name in names if name.top_row >= 0), "they keep the prompts they were written for"
    row = pack(names)
    loss.prepare(row)
    found = student(**row.inputs_with_loss(row.labels.numel())).loss.double()
    plain, expected = student.double(), torch.zeros((), dtype=torch.float64)
    for name in names:
        labels = torch.tensor(name.ids[name.prompt_length :])
        logits = plain(torch.tensor([name.ids[:-1]])).logits[0, name.prompt_length - 1 :].log_softmax(-1)
        hard = F.nll_loss(logits, labels, reduction="sum")
        if name.top_row < 0:
            expected += hard
            continue
        p_LV = teacher[name.top_row : name.top_row + len(labels)].softmax(-1)
        ids = p_LV.topk(kept).indices
        p, q = (x.gather(1, ids) for x in (p_LV, logits.exp()))
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        expected += 0.3 * hard + 0.7 * (p * (p / q).log()).sum()
    torch.testing.assert_close(found, expected / row.labels.numel(), atol=2e-3, rtol=2e-3)


def test_cached_logits_of_other_names_are_no_teacher(
    config: TrainingConfig, dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The names lack the numbers of the cards that the teacher wrote, as without extra_names; or have other tokens."""
    cards = sampled_cards(4)
    write_top_logits(tmp_path / "cache", tokenizer, cards, 7)
    settings = replace(config, teacher=str(tmp_path / "cache"), distill_temperature=1.0)
    renamed = [replace(card, name=f"{card.name} Again") for card in cards]
    for others in (TRAIN, [*TRAIN[4:], *renamed]):
        with pytest.raises(
            ValueError, match=r"cache has no logits of any training name: give the names .* extra_names"
        ):
            Trainer(make_model(dense_config), tokenizer, others, VALIDATION, settings)
    Trainer(make_model(dense_config), tokenizer, [*TRAIN[4:], *cards], VALIDATION, settings)


def test_a_run_with_cached_logits_resumes_to_the_bit_and_refuses_what_is_not_its_own(
    config: TrainingConfig, dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    cards = [*sampled_cards(5), *TRAIN[5:]]
    write_top_logits(tmp_path / "cache", tokenizer, cards[:5], 6)
    config = replace(config, teacher=str(tmp_path / "cache"), distill_temperature=1.0)

    def train(settings: TrainingConfig, resume: str | None = None) -> GPT2LMHeadModel:
        model = make_model(dense_config, dropout=0.1, seed=3 if resume is None else 4)
        Trainer(model, tokenizer, cards, VALIDATION, settings).train(resume)
        return model

    whole = train(config)
    stopped = replace(config, run_name="stopped")
    shutil.copytree(config.run_dir, stopped.run_dir)
    shutil.rmtree(stopped.run_dir / "checkpoints" / "step-000004")
    for name, weight in train(stopped, "auto").state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name
    with pytest.raises(ValueError, match="distill_temperature must be 1"):
        train(replace(config, run_name="warm", distill_temperature=2.0))
    other = train_tokenizer(["some other words"] * 3, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="logits of another tokenizer"):
        TopLogits(tmp_path / "cache", other)
    shard = tmp_path / "cache" / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"000001\.safetensors is missing or was changed"):
        TopLogits(tmp_path / "cache", tokenizer)


def test_a_new_student_may_start_from_the_principal_components_of_its_teachers_embeddings(
    teacher: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    weight = load_model(teacher, "cpu").get_input_embeddings().weight.detach()
    centered = weight - weight.mean(0)
    for width, atol in ((32, 1e-5), (48, 1e-5)):  # as wide as the teacher, and wider
        shape = ModelConfig(num_experts=0, n_embd=width, n_head=2, tokenizer=str(teacher), teacher_embeddings=True)
        found = build_model(None, shape, TRAIN, seed=0)[0].get_input_embeddings().weight.detach()
        gram, expected = found @ found.T, centered @ centered.T
        torch.testing.assert_close(gram / gram.norm(), expected / expected.norm(), atol=atol, rtol=1e-3)
        assert found.std() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(ValueError, match=r"teacher_embeddings needs a teacher: set model\.tokenizer"):
        build_model(None, replace(shape, tokenizer=None), TRAIN, seed=0)
    narrow = replace(shape, n_embd=8)
    found = build_model(None, narrow, TRAIN, seed=0)[0].get_input_embeddings().weight.detach()
    u, s, v = torch.linalg.svd(centered, full_matrices=False)
    best = (u[:, :8] * s[:8]) @ v[:8]
    gram, expected = found @ found.T, best @ best.T
    torch.testing.assert_close(gram / gram.norm(), expected / expected.norm(), atol=1e-5, rtol=1e-3)


def test_a_student_with_fewer_tokens_learns_from_those_it_has(
    config: TrainingConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    cards = sampled_cards(4)
    teacher = write_top_logits(tmp_path / "cache", tokenizer, cards, 9)
    small, kept = trim_tokenizer(tokenizer, texts_of_cards(TRAIN))
    assert len(small) < len(tokenizer)
    logits = TopLogits(tmp_path / "cache", small)
    top = teacher.topk(9).indices
    new_id = {old: new for new, old in enumerate(kept)}
    assert logits.ids.tolist() == [[new_id.get(old, -1) for old in row] for row in top.tolist()]
    assert (logits.ids < 0).any() and (logits.ids >= 0).any()
    torch.manual_seed(5)
    student = torch.randn(len(teacher), len(small), requires_grad=True)
    loss = TopLogitsLoss(0.0, logits, weight=1.0, kl="forward")
    names = NameBatches(cards, small, ONE_BATCH, logits).names_of_step(0)
    row = pack(names)
    assert (row.top_rows >= 0).all()
    loss.prepare(row)
    found = loss(student, row.labels, len(small), shift_labels=row.labels)
    expected = torch.zeros((), dtype=torch.float64)
    for place, at in enumerate(row.top_rows.tolist()):
        ids = [old for old in top[at].tolist() if old in new_id]
        p = teacher[at].double().softmax(-1)[ids]
        q = student[place].double().softmax(-1)[[new_id[old] for old in ids]]
        p, q = (torch.cat([x, 1 - x.sum()[None]]) for x in (p, q))
        expected += (p * (p / q).log()).sum()
    torch.testing.assert_close(found.double(), expected / len(row.labels), atol=2e-3, rtol=2e-3)
    found.backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", ["cross-entropy", "forward", "reverse"])
def test_a_loss_in_chunks_is_the_whole_loss(
    kind: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = sampled_cards(6)
    write_top_logits(tmp_path / "cache", tokenizer, cards, 5)
    logits = TopLogits(tmp_path / "cache", tokenizer)
    names = NameBatches([*cards, *TRAIN], tokenizer, ONE_BATCH, logits).names_of_step(0)
    row = pack(names)
    assert (row.top_rows >= 0).any() and (row.top_rows < 0).any()
    loss = CausalLoss(0.1) if kind == "cross-entropy" else TopLogitsLoss(0.1, logits, weight=0.7, kl=kind)
    torch.manual_seed(5)
    student = torch.randn(row.labels.numel(), len(tokenizer), dtype=torch.float64, requires_grad=True)
    found = []
    for chunk in (2**40, 3 * len(tokenizer)):  # all rows at once, and three at a time
        monkeypatch.setattr("flash_experts.training.loss._CHUNK", chunk)
        loss.prepare(row)
        total = loss(student, row.labels, len(tokenizer), 20, shift_labels=row.labels)
        found.append((total.detach(), *torch.autograd.grad(total, student)))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts.double(), whole.double(), rtol=1e-5, atol=1e-7)
