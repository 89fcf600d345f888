"""The tables of README.md and docs/ agree with benchmarks/results, wherever a result file has the number."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from flash_experts.generation.request import CANDIDATES

ROOT = Path(__file__).parent.parent
README, RESULTS, EXPERIMENTS = ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/experiments.md"


def load(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))


def table_rows(page: Path) -> list[list[str]]:
    """The cells of all rows of a page's tables, without bold marks."""
    lines = page.read_text("utf-8").replace("**", "").splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]


def row_of(page: Path, start: str) -> list[str]:
    found = [row for row in table_rows(page) if row[0].startswith(start)]
    assert len(found) == 1, f"{page.name} has {len(found)} rows that begin with {start!r}"
    return found[0]


def training(name: str) -> dict[str, dict[str, Any]]:
    return {row["name"].split(" trimmed")[0]: row for row in load(name)["rows"]}


def layer(section: str, tokens: int) -> dict[str, dict[str, Any]]:
    rows = load("moe_2cores")["rows"]
    return {row["implementation"]: row for row in rows if (row["section"], row["tokens"]) == (section, tokens)}


TRAINER, OURS, TRIMMED = "transformers Trainer, padded", "ours, dense", "ours, dense, vocabulary"
EXPERTS = "ours, 8 experts in every second block"


def rate(rows: dict[str, dict[str, Any]], name: str) -> str:
    return f"{rows[name]['tokens_per_second']:.0f}"


def ratio(rows: dict[str, dict[str, Any]], name: str) -> str:
    return f"{rows[name]['times_peer']:.1f} x"


def ms(rows: dict[str, dict[str, Any]], name: str, digits: int = 0) -> str:
    return f"{1e3 * rows[name]['seconds']:.{digits}f}"


def test_fine_tuning_speed() -> None:
    rows, many = training("train_speed_2cores"), training("train_speed_256_names_2cores")
    base = rate(rows, TRAINER)
    _, ours, peer, times = row_of(RESULTS, "fine-tuning GPT-2 small on names, 64 names a step")
    assert (ours, peer.split(",")[0], times) == (rate(rows, OURS), base, ratio(rows, OURS))
    trimmed = [rate(rows, TRIMMED), base, ratio(rows, TRIMMED)]
    assert row_of(RESULTS, "the same with the vocabulary trimmed to what cards need")[1:] == trimmed
    _, ours, peer, times = row_of(README, "fine-tuning GPT-2 small on names, vocabulary trimmed")
    assert [ours, peer.split(",")[0], times] == trimmed
    assert row_of(RESULTS, "the same with 256 names a step")[1:] == [
        f"{rate(many, OURS)}; {rate(many, TRIMMED)}",
        rate(many, TRAINER),
        f"{ratio(many, OURS)}; {ratio(many, TRIMMED)}",
    ]
    _, ours, peer, times = row_of(RESULTS, "64 names a step with 8 experts")
    assert (ours, peer.split(",")[0], times) == (rate(rows, EXPERTS), base, ratio(rows, EXPERTS))


def test_a_trainers_step() -> None:
    found = load("trainer_overhead_2cores")
    _, ours, bare, times = row_of(RESULTS, "a step of training, 8 experts")
    assert ours == f"{found['trainer_seconds_per_step']:.3f}"
    assert bare.split(",")[0] == f"{found['bare_seconds_per_step']:.3f}"
    assert times == f"{found['ratio_of_sums']:.2f} x"


@pytest.mark.parametrize("page", [README, RESULTS], ids=lambda page: page.name)
def test_the_layer_with_many_tokens(page: Path) -> None:
    rows = layer("training", 2048)
    _, ours, others, times = row_of(page, "MoE layer, forward and backward, 2,048 tokens")
    assert ours == ms(rows, "fe_experts") and others.startswith(f"{ms(rows, 'dense')}")
    if page == RESULTS:
        assert others.endswith(f"; {ms(rows, 'grouped_mm')} grouped_mm; {ms(rows, 'eager')} eager")
    assert times.startswith(f"{rows['fe_experts']['times_dense']:.2f} x")


def test_the_layer_with_few_tokens() -> None:
    rows = layer("training", 16)
    expected = [ms(rows, "fe_experts"), "; ".join(ms(rows, name) for name in ("dense", "grouped_mm", "eager"))]
    assert row_of(RESULTS, "the same for 16 tokens")[1:] == [
        *expected,
        f"{rows['fe_experts']['times_dense']:.1f} x dense",
    ]
    decoding = [layer("decoding", tokens) for tokens in (1, 16, 64)]
    _, ours, dense, times = row_of(RESULTS, "MoE layer decoding 1 / 16 / 64 tokens, ms")
    digits = (1, 0, 0)
    pairs = list(zip(decoding, digits, strict=True))
    assert ours == " / ".join(ms(rows, "fe_experts", digit) for rows, digit in pairs)
    assert dense.startswith(" / ".join(ms(rows, "dense", digit) for rows, digit in pairs))
    assert times.startswith(" / ".join(f"{rows['fe_experts']['times_dense']:.2f}" for rows in decoding))


def test_bits_of_the_models_before() -> None:
    """The former released model is the late upcycled one of seed 0."""
    runs = load("released_2cores")["runs"]
    run = runs["shared"][0]["bits"]
    for start, prompt in (
        ("the models before them, which had read dictionaries, unconditional", "unconditional"),
        ("the same, given type, colors, mana value", "conditional"),
    ):
        cells = row_of(README, start)[1:]
        for cell, split in zip(cells, ("test_iid", "test"), strict=True):
            of = run[split][prompt]
            assert cell == f"{of['value']:.3f} ± {(of['high'] - of['low']) / 2:.3f}", (start, split)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("dense of equal active parameters", "dense-active-early"),
        ("mixture, upcycled before the names", "shared"),
        ("mixture, upcycled before the phrases", "shared-early"),
    ],
)
def test_bits_of_the_contenders(start: str, name: str) -> None:
    """The table of 24 November in the log: means of three seeds, and of their differences from the dense model."""
    found = load("released_2cores")
    rows = [row for row in table_rows(EXPERIMENTS) if row[0] == start and len(row) == 5]
    assert len(rows) == 1
    for place, split in ((1, "test_iid"), (3, "test")):
        values = [run["bits"][split]["unconditional"]["value"] for run in found["runs"][name]]
        assert rows[0][place] == f"{sum(values) / len(values):.4f}"
        assert rows[0][place + 1].startswith(f"{found['less_dense'][name][split]['mean']:+.4f}")


def test_names_per_second_say_that_they_have_no_file() -> None:
    """benchmarks/results/generate_*.json are of the former models: the page must not claim otherwise."""
    written = row_of(RESULTS, "names/s of the dense `models/mtg-base`")[1]
    measured = {row["name"]: row["names_per_second"] for row in load("generate_2cores")["rows"]}
    if written != f"{measured['ours, the same sampling']:.0f}":
        assert "names/s have no file" in RESULTS.read_text("utf-8")


# ----------------------------------------------------------------------------------------------------- lists of names

LISTS = ("type", "color", "legendary creature", "subtype")


def test_lists_of_names() -> None:
    for model in ("mtg-names", "mtg-base"):
        for measured in load(f"lists_{model}_2cores"):
            of_model = measured["label"] in CANDIDATES
            label = f"`{model}`, {measured['label']}" if of_model else measured["label"]
            row = row_of(RESULTS, label)
            assert row[1:5] == [f"{measured['recognized'][task]['value']:.0%}" for task in LISTS], label
            separation = measured["separation"]
            assert row[5] == ("-" if separation is None else f"{separation['strong']['value']:.2f}"), label
            words = (measured["distinct_words"], measured["distinct_heads"], measured["unknown_words"]["value"])
            assert row[6:9] == [f"{value:.0%}" for value in words], label
            assert row[9] == f"{measured['near_known']['value']:.0%}", label
            speed = measured["per_second"]
            assert row[10] == ("-" if speed is None else f"{speed:.0f}"), label


def test_shares_of_acceptable_names() -> None:
    """README and results repeat what the judged sheet and its key say."""
    judged = csv.DictReader((ROOT / "benchmarks/results/lists_sheet.csv").open(encoding="utf-8"))
    key = csv.DictReader((ROOT / "benchmarks/results/lists_sheet_key.csv").open(encoding="utf-8"))
    source = {row["number"]: row["source"] for row in key}
    marks: dict[str, list[int]] = {}
    for row in judged:
        marks.setdefault(source[row["number"]], []).append(int(row["acceptable"]))
    shares = {label: f"{sum(given) / len(given):.0%}" for label, given in marks.items()}
    text = " ".join(README.read_text("utf-8").split())
    assert f"one reader accepted {shares['good']} of such names, {shares['best']} with `--quality best`" in text
    assert f"{shares['raw']} as they come (`--raw`), {shares['ngram']} of the n-gram's" in text
    assert f"and {shares['real']} of real ones" in text


def test_exports() -> None:
    page, found = ROOT / "docs/change_this.md", load("exports")
    kinds = {"onnx": "ONNX Runtime", "gguf": "GGUF", "dense": "dense, experts averaged by equal weight"}
    for row in found["rows"]:
        shown = [f"{row['largest_difference']:.2g}", f"{row['bytes'] / 1e6:.0f}"]
        assert row_of(page, f"`{row['model']}`: {kinds[row['format']]}")[1:] == shown
    text, llama = " ".join(page.read_text("utf-8").split()), found["llama.cpp"]
    assert f"on {found['rows'][0]['names']} names of real cards" in text
    assert f"logits up to {max(row['largest_logit'] for row in found['rows']):.0f})" in text
    assert f"version {llama['version']} of the package xllamacpp" in text and f"names of {llama['names']} cards" in text
    assert f"differ by at most {llama['largest_log_probability_difference']:.4f}" in text
