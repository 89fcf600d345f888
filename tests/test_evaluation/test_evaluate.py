"""Evaluation of whole models on a small prepared folder."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.names import normal_form
from flash_experts.data.packing import encode_names
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation import NamesResult, evaluate, evaluate_names, format_evaluation, format_names, read_names
from flash_experts.evaluation import held_out as held_out_module
from flash_experts.evaluation.evaluate import _association, config_and_tokenizer, is_baseline
from flash_experts.evaluation.held_out import HeldOut, Reference
from flash_experts.evaluation.metrics import Estimate
from flash_experts.evaluation.scorers import LanguageModel, costs_of, parameter_counts
from flash_experts.generation.generator import GeneratedName
from flash_experts.generation.name_files import BY_SUFFIX, write_names
from flash_experts.models.moe import GPT2MoEForCausalLM
from tests.helpers.evaluation import tiny_model, write_data


def test_word_association_swaps_the_second_words_of_pairs(names: dict[str, list[str]]) -> None:
    """A model that gives every name of its list 3 bits more than others, whatever the words."""
    known, scored = [*names["train"], "Three Word Name", "One"], list[str]()

    class Scorer:
        def nats(self, asked: list[str], attributes: list[Attributes]) -> np.ndarray:
            scored.extend(asked)
            assert set(attributes) == {Attributes()}
            return np.array([len(name) + (0.0 if name in known else 3 * math.log(2)) for name in asked])

    scorer = Scorer()
    own = scorer.nats(known, [Attributes()] * len(known))
    scored.clear()
    found = _association(scorer, known, own, seed=0)  # type: ignore[arg-type]
    swapped = [name for name in scored if name not in known]
    assert len(scored) == 120 and found is not None
    assert found.value == pytest.approx(3 * len(swapped) / len(scored))
    count = Counter(word for name in scored for word in name.split())
    assert count == Counter(word for name in names["train"] for word in name.split())
    assert _association(scorer, known[:15], own[:15], seed=0) is None  # type: ignore[arg-type]


def test_only_the_experts_that_a_token_is_sent_to_are_active(dense: GPT2LMHeadModel) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, num_experts=8, num_experts_per_tok=2, moe_layer_freq=2)
    dense_size, size = parameter_counts(dense), parameter_counts(moe)
    assert dense_size.total == dense_size.active
    width, hidden, layers = 32, 4 * 32, 2
    expert = width * hidden + hidden + hidden * width + width
    router = 8 * width
    assert size.total == dense_size.total + layers * (7 * expert + router)
    assert size.active == dense_size.total + layers * (expert + router)


def test_a_copy_of_the_training_set_is_detected(data_dir: Path, names: dict[str, list[str]]) -> None:
    reference = Reference.load(data_dir)
    copied = reference.measure(names["train"])
    assert copied.known is not None and copied.known.value == 1.0
    assert copied.in_train.value == 1.0
    assert copied.memorization is not None and copied.memorization.ratio is not None
    assert copied.memorization.ratio.low > 1.0
    fresh = reference.measure(["Umbral Choir", "Kelp Regent"])
    assert fresh.known is not None and fresh.known.value == 0.0
    assert fresh.memorization is not None and fresh.memorization.ratio is None
    assert fresh.words.unseen_share == 1.0


def test_names_like_real_ones_are_near_as_many_cards_as_real_ones(data_dir: Path, names: dict[str, list[str]]) -> None:
    """A real name is no near-duplicate of itself, only of another card."""
    pytest.importorskip("rapidfuzz")
    reference = Reference.load(data_dir)
    known = {name for some in names.values() for name in some}
    lonely = next(name for name in names["test"] if not any(_is_near(name, other) for other in known - {name}))
    as_real, as_sample = reference.measure([lonely], real=True), reference.measure([lonely])
    assert as_real.near_known is not None and as_real.near_known.value == 0.0
    assert as_sample.near_known is not None and as_sample.near_known.value == 1.0


def _is_near(first: str, second: str) -> bool:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_distance(normal_form(first), normal_form(second)) <= 0.2


def test_spelling_does_not_hide_a_copy(data_dir: Path, names: dict[str, list[str]]) -> None:
    shouted = Reference.load(data_dir).measure([names["train"][0].upper()])
    assert shouted.in_train.value == 1.0


def test_result_is_whole_and_plain(model_dirs: list[Path], data_dir: Path) -> None:
    result = evaluate(model_dirs[0], data_dir, samples=20, seed=1)
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["label"] == "one"
    assert set(plain["splits"]) == {"test_iid", "test"}
    assert plain["splits"]["test"]["names"] == 30
    assert plain["samples"]["names"] == 20
    assert "nats" not in plain
    assert plain["real"]["in_train"]["value"] == 0.0
    assert result.size.total == result.size.active > 0
    assert plain["splits"]["test"]["by_color"]["multicolor"]["names"] == 10
    text = format_evaluation(result)
    for wanted in ("one", "test_iid", "Creature", f"{result.splits['test'].unconditional.value:.3f}"):
        assert wanted in text
    assert "multicolor" not in text  # too few names for a table


def test_the_same_seed_gives_the_same_result(model_dirs: list[Path], data_dir: Path) -> None:
    first, again, other = (evaluate(model_dirs[0], data_dir, ("test",), samples=5, seed=s) for s in (1, 1, 2))
    assert first.examples == again.examples != other.examples
    assert first.splits == again.splits
    assert first.splits["test"].unconditional == other.splits["test"].unconditional


def test_names_longer_than_the_context_are_left_out_for_all_models(
    tmp_path: Path, name_tokenizer: PreTrainedTokenizerFast, names: dict[str, list[str]]
) -> None:
    """One is too long for the smaller of two models, after its prompt: both are measured on the others."""
    folder = write_data(tmp_path / "mtg", {**names, "test": [*names["test"], ("Goblin " * 16).strip()]})
    for name, positions in (("large", 64), ("small", 44)):
        model = tiny_model(name_tokenizer, seed=0)
        model.config.n_positions = positions
        model.transformer.wpe = torch.nn.Embedding(positions, 32)
        model.save_pretrained(tmp_path / name)
        name_tokenizer.save_pretrained(tmp_path / name)
    count, held_out = len(names["test"]), HeldOut.load(folder, ("test",))
    both = [found for name in ("large", "small") for found in config_and_tokenizer(tmp_path / name)]
    with pytest.warns(UserWarning, match=rf"1 of {count + 1} names of test are left out"):
        assert len(held_out.within_context(both, seed=0).splits["test"]) == count
    assert held_out.within_context(both[:1], seed=0).splits == held_out.splits
    with pytest.warns(UserWarning, match=rf"1 of {count + 1} names of test are left out"):
        assert evaluate(tmp_path / "small", folder, ("test",), samples=0).splits["test"].names == count
    with pytest.raises(ValueError, match="the model's context has 44: shorten it"):
        evaluate_names(["Jumping " * 12], tmp_path / "small")


def test_control_is_what_shuffled_attributes_cost(tmp_path: Path, name_tokenizer: PreTrainedTokenizerFast) -> None:
    """A model trained briefly on names determined by their attributes has a control above zero."""
    names = [("Goblin", "Bolt", "Blade")[index % 3] for index in range(60)]
    folder = write_data(tmp_path / "mtg", {split: names for split in ("train", "validation", "test", "test_iid")})
    model = tiny_model(name_tokenizer, seed=0)
    held_out = HeldOut.load(folder, ("test",))
    cards = held_out.splits["test"]
    encoded = encode_names(names, [Attributes.of(card) for card in cards], name_tokenizer)
    longest = max(len(name.ids) for name in encoded)
    pad = name_tokenizer.pad_token_id
    ids = torch.tensor([[*name.ids, *[pad] * (longest - len(name.ids))] for name in encoded])
    labels = torch.full_like(ids, -100)
    for row, name in enumerate(encoded):
        labels[row, name.prompt_length : len(name.ids)] = ids[row, name.prompt_length : len(name.ids)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    figures = evaluate(model, folder, ("test",), samples=0, tokenizer=name_tokenizer).splits["test"]
    assert figures.control is not None and figures.conditional is not None and figures.shuffled is not None
    assert figures.control.low > 0.5
    assert figures.control.value == pytest.approx(figures.shuffled.value - figures.conditional.value)


@pytest.mark.parametrize(("option", "value"), [("max_names", 0), ("max_names", -3), ("samples", -1)])
def test_a_number_out_of_range_is_named(data_dir: Path, option: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be \d .*, not {value}"):
        evaluate("ngram", data_dir, **{option: value})  # type: ignore[arg-type]


def test_the_baseline_is_a_model_like_others(data_dir: Path) -> None:
    result = evaluate("ngram", data_dir, samples=50)
    figures = result.splits["test"]
    assert 0 < figures.unconditional.value < 2.5
    assert figures.control.value == pytest.approx(figures.shuffled.value - figures.conditional.value)
    assert result.samples is not None and result.samples.names == 50
    names = [card.name for card in HeldOut.load(data_dir, ("test",)).splits["test"]]
    assert evaluate_names(names, "ngram", data_dir).bits == figures.unconditional


def test_a_model_whose_name_ends_as_a_baseline_does_is_a_model(model_dirs: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_dirs[0], tmp_path / "my-ngram")
    expected = evaluate_names(["Goblin Guide"], model_dirs[0])
    assert evaluate_names(["Goblin Guide"], folder, tmp_path / "nowhere") == expected
    assert not is_baseline(folder) and is_baseline("swap") and is_baseline(f"{folder}+ngram")


def test_without_scikit_learn_the_rest_is_evaluated(
    model_dirs: list[Path], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out_module, "is_installed", lambda name: False)
    with pytest.warns(UserWarning, match=r'pip install "flash-experts\[eval\]"'):
        result = evaluate(model_dirs[0], data_dir, samples=10)
    assert result.detection is None and result.control == ()
    assert result.samples is not None
    assert "AUC" not in format_evaluation(result)


def test_costs_are_those_of_the_folder(model_dirs: list[Path], model: GPT2LMHeadModel) -> None:
    costs = LanguageModel.load(model_dirs[0]).costs
    assert costs.training_tokens == 30 and costs.training_seconds == 1.5
    assert costs.memory_bytes == 4 * parameter_counts(model).total
    assert costs.disk_bytes == (model_dirs[0] / "model.safetensors").stat().st_size
    # Six operations for each weight of the blocks and of the output layer; embeddings are looked up.
    width, vocabulary = 32, model.config.vocab_size
    block = 12 * width**2 + 13 * width
    assert costs.flops_per_token == 6 * (2 * block + 2 * width + width * vocabulary)
    assert costs.training_flops == 30 * costs.flops_per_token
    assert costs_of(model, None).training_flops is None


def test_max_names_takes_the_same_names_each_time(data_dir: Path) -> None:
    first, again = (HeldOut.load(data_dir, ("test",), max_names=7, seed=3).splits["test"] for _ in range(2))
    assert first == again and len(first) == 7


def test_names_of_a_file(tmp_path: Path, model_dirs: list[Path]) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\ufeffGoblin Guide\r\n\r\n  Jötun Grunt \r\n", encoding="utf-8")
    names = read_names(path)
    assert names == ["Goblin Guide", "Jötun Grunt"]
    result = evaluate_names(names, model_dirs[0])
    characters = np.array([13, 12])
    weighted = float(np.array(result.bits_of_each) @ characters / characters.sum())
    assert result.bits.value == pytest.approx(weighted)
    assert json.loads(json.dumps(result.to_json()))["names"] == names


@pytest.mark.parametrize("suffix", ["txt", "csv", "json", "jsonl"])
def test_names_of_a_file_that_generate_wrote(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"names.{suffix}"
    names = [GeneratedName(text, -9.5, "Goblin Guide", 0.4) for text in ("Mind Flail", "+2 Mace", "Krenko, Boss")]
    with path.open("w", encoding="utf-8") as file:
        write_names(names, Attributes(), file, BY_SUFFIX[path.suffix])
    assert read_names(path) == ["Mind Flail", "+2 Mace", "Krenko, Boss"]


def test_names_of_cards(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("Karte,Type,text\nSol Ring,Artifact,{T}: Add {C}{C}.\n,Land,\n", "utf-8")
    (tmp_path / "test.jsonl").write_text('{"name": "Sol Ring", "text": "T", "log_prob": -1}\n', "utf-8")
    assert read_names(tmp_path / "set.csv") == read_names(tmp_path / "test.jsonl") == ["Sol Ring"]
    (tmp_path / "names.md").write_text("- Sol Ring\n", "utf-8")
    with pytest.raises(ValueError, match=r"names.md is Markdown: save the names as plain text"):
        read_names(tmp_path / "names.md")


def test_one_name_has_no_interval() -> None:
    bits = Estimate(2.5, 2.5, 2.5)
    assert "1 name: 2.500 bits per character" in " ".join(
        format_names(NamesResult(bits, ("Sol Ring",), (2.5,))).split()
    )
    both = NamesResult(Estimate(2.5, 2.0, 3.0), ("Sol Ring", "Mox"), (2.0, 3.0))
    assert "2 names: 2.500 [2.000, 3.000] bits per character" in " ".join(format_names(both).split())


def test_bad_input_is_one_line_with_a_fix(
    tmp_path: Path, model_dirs: list[Path], data_dir: Path, names: dict[str, list[str]]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    torn = write_data(tmp_path / "torn", names)
    (torn / "known_names.txt").unlink()
    hollow = write_data(tmp_path / "hollow", {**names, "test": []})
    cases = [
        (lambda: evaluate(model_dirs[0], tmp_path / "nowhere"), "flash-experts prepare"),
        (lambda: evaluate(tmp_path / "no-model", data_dir), "no-model"),
        (lambda: evaluate(model_dirs[0], hollow), "test.jsonl is empty"),
        (lambda: evaluate(model_dirs[0], data_dir, ()), "no held-out names"),
        (lambda: evaluate(model_dirs[0], torn), "known_names.txt is missing"),
        (lambda: read_names(empty), "has no names"),
        (lambda: read_names(binary), "UTF-8"),
        (lambda: read_names(tmp_path / "absent.txt"), "absent.txt"),
        (lambda: evaluate_names([], model_dirs[0]), "no names"),
        (lambda: evaluate_names(["x" * 500], model_dirs[0]), "context has 64"),
    ]
    for act, wanted in cases:
        with pytest.raises(ValueError, match=wanted) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_a_model_without_its_tokenizer_is_refused(model: GPT2LMHeadModel, data_dir: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer="):
        evaluate(model, data_dir)


def test_cards_since_2025_are_measured_apart(
    name_tokenizer: PreTrainedTokenizerFast, data_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(data_dir, tmp_path / "data")
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text("utf-8").splitlines()]
    for number, line in enumerate(lines):
        line["source_id"] = f"embedded:{11236 if number % 3 else 100}"
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model = tiny_model(name_tokenizer, seed=0)
    result = evaluate(model, folder, ("test",), samples=0, tokenizer=name_tokenizer)
    groups, nats = result.splits["test"].by_year, result.nats["test"]
    new = np.arange(len(lines)) % 3 > 0
    for group, rows in (("since 2025", new), ("until 2024", ~new)):
        assert groups[group].names == rows.sum()
        expected = nats.conditional[rows].sum() / math.log(2) / nats.characters[rows].sum()
        assert groups[group].conditional.value == pytest.approx(expected)
    assert "Contamination" in format_evaluation(result)
    assert "Contamination" not in format_evaluation(
        evaluate(model, data_dir, ("test",), samples=0, tokenizer=name_tokenizer)
    )
