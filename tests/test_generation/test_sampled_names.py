"""Sampled names as training data for distillation: written in pieces, resumed after an interruption."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.cli import main
from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.packing import encode_cards
from flash_experts.data.prepare import extra_cards, load_cards, load_known_names
from flash_experts.data.prompts import Attributes
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.generation import sampled_names
from flash_experts.generation.filters.base import NameVocabulary
from flash_experts.models.loading import load_model
from flash_experts.models.scoring import TopLogits

_TRAIN = [f"{first} {second}" for first in ("Goblin", "Elvish", "Angelic") for second in ("Guide", "Bolt", "Growth")]
_TYPES = (("Creature",), ("Instant",), ("Artifact", "Creature"))


def _write_data(folder: Path) -> Path:
    folder.mkdir()
    splits = {"train": _TRAIN, "validation": ["Silver Oracle"], "test": ["Grave Warden"], "test_iid": ["Grave Thief"]}
    for split, names in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for index, name in enumerate(names):
                types, colors = _TYPES[index % 3], ((), ("R",), ("W", "U"))[index % 3]
                card = Card(name, " ".join(types), (), types, (), colors, index % 5, f"test:{index}")
                print(json.dumps(card.to_json()), file=file)
    (folder / "known_names.txt").write_text("\n".join(_TRAIN) + "\n", encoding="utf-8")
    return folder


def _prefer_words(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes tokens of letters, and the end, e^6 times as likely as the rest."""
    texts = NameVocabulary(tokenizer).texts
    liked = [text.strip().isalpha() and text.isascii() and len(text) > 2 for text in texts]
    liked[tokenizer.eos_token_id] = True
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 10
        model.transformer.wte.weight[:, 0] = torch.tensor(liked) * 0.6


@pytest.fixture
def command(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setattr(sampled_names, "_PIECE", 16)
    _prefer_words(model, tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = _write_data(tmp_path / "data")
    where = ["--model", str(tmp_path / "model"), "--device", "cpu", "--data", str(data), "--batch-size", "8"]
    return ["generate", *where, "--attributes-from", "train", "--count", "50", "--seed", "3", "--top-k", "0"]


def test_training_names_follow_the_model_and_not_the_presets_guidance(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "names.jsonl", tmp_path / "unguided.jsonl"
    assert main([*command, "--out", str(out[0])]) == main([*command, "--guidance", "1", "--out", str(out[1])]) == 0
    assert out[0].read_bytes() == out[1].read_bytes()


def test_names_are_new_and_trainable_with_the_models_log_probability(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "names.jsonl"
    assert main([*command, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    cards, matching = load_cards(out), list[bool]()
    keys = [normal_form(card.name) for card in cards]
    assert 20 < len(cards) <= 50 and len(set(keys)) == len(keys)
    assert not set(keys) & load_known_names(tmp_path / "data")
    prompts = {Attributes.of(card).prompt() for card in cards}
    assert {":", "creature, colorless:"} & prompts and len(prompts) > 3, "whole and dropped attribute sets"
    assert [path.name for path in out.parent.iterdir()] == ["names.jsonl"]
    assert extra_cards(out, tmp_path / "data") == cards
    model, vocabulary = load_model(tmp_path / "model", "cpu"), NameVocabulary(load_tokenizer(tmp_path / "model"))
    end = vocabulary.eos_id
    for line, card in list(zip(lines, cards, strict=True)):
        prompt = [end, *vocabulary.encode(Attributes.of(card).prompt())]
        # The tokens that were drawn are not in the file: of names of one token a word they are the tokenizer's.
        ids = vocabulary.encode(" " + card.name)
        with torch.no_grad():
            log_probs = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        expected = float(log_probs.gather(1, torch.tensor([*ids, end])[:, None]).sum())
        assert line["log_prob"] <= 0
        matching.append(line["log_prob"] == pytest.approx(expected, abs=1e-3))
    assert sum(matching) >= 2


def test_a_stopped_run_continues_to_the_same_names(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert main([*command, "--out", str(whole)]) == 0
    pieces = sampled_names._piece

    def dies(*args: object) -> object:
        if args[1].pieces == 2:  # type: ignore[attr-defined]
            with (tmp_path / "stopped.jsonl.part").open("ab") as file:
                file.write(b'{"half a li')
            raise OSError(28, "No space left on device")
        return pieces(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sampled_names, "_piece", dies)
    assert main([*command, "--out", str(stopped)]) == 1
    monkeypatch.setattr(sampled_names, "_piece", pieces)
    assert not stopped.exists()
    assert main([*command, "--out", str(stopped), "--temperature", "0.5"]) == 1
    assert "has other settings (sampling)" in capsys.readouterr().err
    assert main([*command, "--out", str(stopped)]) == 0
    assert stopped.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob("*.lock"))
    assert main([*command, "--out", str(stopped)]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.fixture
def stopped(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of a run with top logits that was stopped after its first piece."""
    command = [*command, "--count", "20", "--top-logits", "2", "--out", str(tmp_path / "names.jsonl")]
    pieces = sampled_names._piece

    def stops(*args: object) -> object:
        if args[1].pieces == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return pieces(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sampled_names, "_piece", stops)
    assert main(command) == 130
    monkeypatch.setattr(sampled_names, "_piece", pieces)
    return command


def test_a_run_is_not_resumed_on_other_data(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, train = tmp_path / "data/known_names.txt", tmp_path / "data/train.jsonl"
    before = train.read_bytes()
    train.write_bytes(before[: before.rindex(b"{")])
    assert main(stopped) == 1
    assert "has other settings (cards): use those" in capsys.readouterr().err
    train.write_bytes(before)
    known.write_text(known.read_text("utf-8") + "Elvish Gronk\n", encoding="utf-8")
    assert main(stopped) == 1
    assert "has other settings (known): use those" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["no shards", "not UTF-8", "an older version"])
def test_a_damaged_run_is_refused_with_the_way_out(
    what: str, stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, logits = tmp_path / "names.jsonl.part.json", tmp_path / "names.top-logits"
    if what == "no shards":
        shutil.rmtree(logits)
        message = f"{logits / '000000.safetensors'}, which belongs to the unfinished"
    elif what == "not UTF-8":
        state.write_bytes(b"\xff\xfe{")
        message = "cannot be resumed (UnicodeDecodeError)"
    else:
        state.write_text(state.read_text("utf-8").replace('"settings": {', '"settings": {"dropped": 1, '), "utf-8")
        message = "has other settings (dropped): use those"
    capsys.readouterr()
    assert main(stopped) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert f"remove {tmp_path / 'names.jsonl.part'}, {state.name} and {logits.name} to start again" in error


def test_a_model_without_a_new_name_is_an_error(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampled_names._Sampler, "text", lambda *_: "")
    (tmp_path / "new").mkdir()
    out = ["--top-logits", "2", "--out", str(tmp_path / "new/names.jsonl")]
    assert main([*command, "--count", "2", *out]) == 1
    assert "no text of the model is a new name: train it for longer" in capsys.readouterr().err
    assert not [path for path in tmp_path.glob("new/**/*") if path.is_file()], "nothing to resume"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "names.csv"], "writes a .jsonl file"),
        (["--out", "names.jsonl", "--type", "Goblin"], "leave out --type"),
        (["--out", "names.jsonl", "--rank"], "leave out --rank"),
        (["--out", "names.jsonl", "--cards", "set.csv"], "takes the cards of a split: leave out --cards"),
        (["--out", "names.jsonl", "--raw-cells"], "writes no CSV: leave out --raw-cells"),
    ],
)
def test_what_does_not_go_together_is_refused(
    command: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_held_out_name_is_not_trained_on(tmp_path: Path) -> None:
    data = _write_data(tmp_path / "data")
    names = tmp_path / "names.jsonl"
    names.write_bytes((data / "train.jsonl").read_bytes() + (data / "test_iid.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"name 10, 'Grave Thief', is held out"):
        extra_cards(names, data)


def test_the_teachers_likely_tokens_are_kept_and_resumed(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "names.jsonl"
    command = [*command, "--top-logits", "5", "--out", str(out)]
    real, calls = sampled_names.write_shard, list[int]()

    def stop_at_the_second(folder: Path, number: int, *rest: object) -> None:
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(folder, number, *rest)

    monkeypatch.setattr(sampled_names, "write_shard", stop_at_the_second)
    assert main(command) == 130
    monkeypatch.setattr(sampled_names, "write_shard", real)
    assert main(command) == 0
    tokenizer, model = load_tokenizer(tmp_path / "model"), load_model(tmp_path / "model", "cpu")
    logits = TopLogits(tmp_path / "names.top-logits", tokenizer)
    kept = matched = 0
    for name in encode_cards(cards := load_cards(out), tokenizer):
        card = cards[kept]
        kept += 1
        row = logits.first_row(card.source_id, labels := name.ids[name.prompt_length :])
        assert card.source_id in logits
        if row < 0:  # drawn as other tokens than the tokenizer's
            continue
        with torch.no_grad():
            log_probs = model(torch.tensor([name.ids[:-1]])).logits[0, name.prompt_length - 1 :].log_softmax(-1)
        top = log_probs.topk(5)
        found = logits.log_probs[row : row + len(labels)].float()
        torch.testing.assert_close(found, top.values, atol=1e-2, rtol=1e-2)
        matched += 1
    assert kept > 20 and matched >= 2 and len(logits.ids) == len(logits.log_probs)
    assert main(command) == 1, "it exists"


def test_extra_names_may_be_compressed(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "names.jsonl"
    assert main([*command, "--out", str(out)]) == 0
    packed = tmp_path / "names.jsonl.xz"
    packed.write_bytes(lzma.compress(out.read_bytes()))
    assert extra_cards(packed, tmp_path / "data") == extra_cards(out, tmp_path / "data")
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a whole xz file"):
        extra_cards(packed, tmp_path / "data")
