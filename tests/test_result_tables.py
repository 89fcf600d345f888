"""The tables of README.md and docs/results.md are as scripts/result_tables.py writes them from benchmarks/results."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flash_experts.files import sha256_of
from flash_experts.models.hub import read_card
from scripts import result_tables

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", result_tables.PAGES, ids=lambda page: page.name)
def test_a_page_is_as_it_would_be_written(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("<!-- results: ") == text.count("<!-- end of results -->") >= 3
    assert result_tables.rendered(text)[0] == text, "run: python scripts/result_tables.py"


def test_every_table_is_on_a_page_and_every_file_has_its_command() -> None:
    pages = "".join(page.read_text("utf-8") for page in result_tables.PAGES)
    assert [name for name in result_tables.BLOCKS if f"<!-- results: {name} -->" not in pages] == []
    for name in result_tables.WRITTEN_BY:
        assert result_tables.load(name), name


@pytest.mark.parametrize("model", ["mtg-names", "mtg-base"])
def test_the_cards_of_the_models_have_the_same_bits(model: str) -> None:
    card = (ROOT / f"models/{model}/README.md").read_text("utf-8")
    rows = [re.findall(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", line) for line in card.splitlines()]
    unconditional, conditional, _ = zip(*(row for row in rows if row), strict=True)
    text = (ROOT / "README.md").read_text("utf-8")
    for prompt, cells in ((result_tables.UNCONDITIONAL, unconditional), (result_tables.CONDITIONAL, conditional)):
        assert f"| `models/{model}`, {prompt} | {' | '.join(cells)} |" in text
    measured = next(one for one in result_tables.load("bits_2cores")["models"] if one["label"] == model)
    data, _ = read_card(ROOT / f"models/{model}")
    assert [round(one.metric_value, 4) for one in data.eval_results or ()] == [
        round(measured["splits"][split][given]["value"], 4)
        for split in ("test_iid", "test")
        for given in ("unconditional", "conditional")
    ]


def test_the_mixture_with_ngrams_gains_in_all_paired_intervals() -> None:
    labels = ("mtg-names", "mtg-names+ngram")
    pairs = [
        each
        for each in result_tables.load("bits_2cores")["differences"]
        if {each["first"], each["second"]} == {*labels}
    ]
    assert len(pairs) == 4
    assert all(each["bits"]["low"] > 0 if each["first"] == labels[0] else each["bits"]["high"] < 0 for each in pairs)


def test_a_changed_figure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    found = result_tables.load("moe_2cores")
    for row in found["rows"]:
        row["seconds"] *= 2
    read = result_tables.load
    monkeypatch.setattr(result_tables, "load", lambda name: found if name == "moe_2cores" else read(name))
    assert result_tables.rendered(text)[0] != text


def test_a_missing_file_leaves_its_table_and_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for sheet in ("lists_sheet.csv", "lists_sheet_key.csv"):
        shutil.copy(result_tables.RESULTS / sheet, tmp_path)
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    text = (ROOT / "README.md").read_text("utf-8")
    new, missing = result_tables.rendered(text)
    assert new == text
    assert any(
        line.startswith("train_speed_2cores.json is missing in benchmarks/results: flash-experts") for line in missing
    )


def test_check_as_a_command() -> None:
    done = subprocess.run([sys.executable, "scripts/result_tables.py", "--check"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout


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
    found = result_tables.load("released_2cores")
    lines = (ROOT / "docs/experiments.md").read_text("utf-8").replace("**", "").splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [row for row in rows if row[0] == start and len(row) == 5]
    assert len(rows) == 1
    for place, split in ((1, "test_iid"), (3, "test")):
        values = [run["bits"][split]["unconditional"]["value"] for run in found["runs"][name]]
        assert rows[0][place] == f"{sum(values) / len(values):.4f}"
        assert rows[0][place + 1].startswith(f"{found['less_dense'][name][split]['mean']:+.4f}")


def row_of(page: Path, start: str) -> list[str]:
    """The cells of the only row of a page that starts so."""
    lines = [line for line in page.read_text("utf-8").splitlines() if line.startswith(f"| {start}")]
    assert len(lines) == 1, start
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_exports() -> None:
    page, found = ROOT / "docs/change_this.md", result_tables.load("exports")
    kinds = {"onnx": "ONNX Runtime", "gguf": "GGUF", "dense": "dense, experts averaged by equal weight"}
    for row in found["rows"]:
        assert row["sha256"] == sha256_of(ROOT / row["model"] / "model.safetensors"), "measured on other models"
        shown = [f"{row['largest_difference']:.2g}", f"{row['bytes'] / 1e6:.0f}"]
        assert row_of(page, f"`{row['model']}`: {kinds[row['format']]}")[1:] == shown
    text, llama = " ".join(page.read_text("utf-8").split()), found["llama.cpp"]
    assert f"on {found['rows'][0]['names']} names of real cards" in text
    assert f"logits up to {max(row['largest_logit'] for row in found['rows']):.0f})" in text
    assert f"version {llama['version']} of the package xllamacpp" in text and f"names of {llama['names']} cards" in text
    assert f"differ by at most {llama['largest_log_probability_difference']:.4f}" in text


def test_what_experts_from_the_first_step_are_worth() -> None:
    found = result_tables.load("student_capacity")
    share = {}
    for each in found["differences"]:
        if each["first"] == "dense":
            key = "conditional" if each["conditional"] else "unconditional"
            before = found["tests"]["dense"][each["split"]][key]["value"]
            share[each["second"], each["split"], key] = f"{each['bits']['value'] / before:.1%}"
    given, free = (
        [share["experts", split, key] for split in ("test_iid", "test")] for key in ("conditional", "unconditional")
    )
    readme, results, log = (
        " ".join((ROOT / page).read_text("utf-8").split())
        for page in ("README.md", "docs/results.md", "docs/experiments.md")
    )
    assert f"worth {min(given + free).removesuffix('%')} to {max(given + free)} " in readme
    assert f"needs {given[0]} fewer bits than the dense one given attributes on test_iid" in results
    assert f"on test_iid, {given[1]} on unseen families (unconditional" in results
    assert f"(unconditional {free[0]} and {free[1]}; one seed)" in results
    assert f"given attributes {given[0]} on test_iid (1.783 to 1.763) and {given[1]} on unseen families" in log
    for row in found["rows"]:
        last = row["validations"][-1]
        mean = (last["validation/bits_per_char"] + last["validation/bits_per_char_given_attributes"]) / 2
        assert f"| {row['parameters'] / 1e6:.1f} M | {row['tokens_per_second']:,.0f} |" in log and f"{mean:.3f}" in log


def test_the_log_has_the_small_students_as_measured() -> None:
    found = json.loads((ROOT / "benchmarks/results/small_students.json").read_text("utf-8"))
    log = (ROOT / "docs/experiments.md").read_text("utf-8")
    for row in found["rows"]:
        last = row["validations"][-1]
        mean = (last["validation/bits_per_char"] + last["validation/bits_per_char_given_attributes"]) / 2
        line = next(
            line for line in log.splitlines() if line.startswith(f"| {row['kind']} | {row['parameters'] / 1e6:.1f}")
        )
        assert line.endswith(f"| {mean:.3f} |")
    against_dense = [each for each in found["differences"] if each["first"].startswith("dense")]
    assert len(against_dense) == 20 and all(each["bits"]["low"] > 0 for each in against_dense)
    for each in against_dense:
        bits, prompt = each["bits"], "conditional" if each["conditional"] else "unconditional"
        share = bits["value"] / found["tests"][each["first"]][each["split"]][prompt]["value"]
        assert f"{bits['value']:.4f} [{bits['low']:.4f}, {bits['high']:.4f}], {share:.1%}" in log


def test_the_figures_of_ten_thousand_drawn_names_are_those_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks/results/samples_2cores.json").read_text("utf-8"))["models"]
    names, base, text = found["mtg-names"], found["mtg-base"], flat("docs/results.md")
    drawn, auc = names["samples"], [model["detection"]["generated"] for model in (names, base)]
    assert (
        f"Of {drawn['names']:,} names drawn at temperature 1 without filters, {drawn['known']['value']:.1%} are real"
        in text
    )
    near, real_near = (f"{of['near_known']['value']:.1%}" for of in (drawn, names["real"]))
    assert f"{near} are near one (real held-out names: {real_near})" in text
    strong, weak = ([f"{each[kind]['value']:.2f}" for each in auc] for kind in ("strong", "weak"))
    assert (
        f"with an AUC of {strong[0]}, the base's with {strong[1]} (" in text
        and f"with {weak[0]} and {weak[1]}." in text
    )
    model, real = (
        {one["task"]: f"{one[of]['plain']['value']:.0%}" for one in names["control"]} for of in ("model", "real")
    )
    assert f"the requested colors in {model['color']} of its names (chance 20%; real names {real['color']})" in text
    assert f"the card type in {model['type']} ({real['type']})" in text
    assert f"legendary in {model['legendary creature']} ({real['legendary creature']})" in text
    assert f"Of 10,000 names drawn {drawn['memorization']['held_out_hits']} are held-out names" in text


def test_the_log_has_guidance_as_measured() -> None:
    found = json.loads((ROOT / "benchmarks/results/guidance_validation.json").read_text("utf-8"))
    log = (
        (ROOT / "docs/experiments.md").read_text("utf-8").partition("## 2026-12-01: guidance")[2].partition("\n## ")[0]
    )
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in log.splitlines() if line[:1] == "|"]
    columns = ("type", "color", "legendary creature", "subtype", "distinct_words")
    shown = [row for row in cells if len(row) >= 6 and row[-1].endswith("%")]

    def percents(row: dict[str, float]) -> list[str]:
        return [f"{row[column]:.0%}" for column in columns]

    assert shown[0][-5:] == percents(found["real"])
    unselected, preset = {(row["preset"], row["guidance"]): row for row in found["rows"] if row["best_of"] == 1}, ""
    unweighted = [row for row in shown[1:] if len(row) == 7]
    assert len(unweighted) == len(unselected) == 10
    for first, second, *rest in unweighted:
        preset = first or preset
        assert rest == percents(unselected[preset, float(second)])
    chosen = {(row["best_of"], row["match_weight"]): row for row in found["rows"] if row["guidance"] == 1.25}
    weighted = [row for row in shown if len(row) == 6]
    assert len(weighted) == 8
    for first, *rest in weighted:
        drawn, weight = first.split(", ")
        assert rest == percents(chosen[int(drawn), float(weight)])


@pytest.mark.parametrize("sheet", ["guidance_sheet", "match_weight_sheet"])
def test_the_log_has_what_the_readers_accepted(sheet: str) -> None:
    blind = importlib.import_module("benchmarks.blind_sheet")
    log = flat("docs/experiments.md")
    marks = {row["number"]: int(row["acceptable"]) for row in rows_of(f"{sheet}.csv")}
    of: dict[str, list[int]] = {}
    for row in rows_of(f"{sheet}_key.csv"):
        of.setdefault(row["source"], []).append(marks[row["number"]])
    for source, given in of.items():
        if source in ("real", "1, guidance 1.5"):
            assert f"{sum(given) / len(given):.0%}" in log
            continue
        low, high = blind.wilson(sum(given), len(given))
        assert f"{sum(given) / len(given):.0%} [{100 * low:.0f}, {100 * high:.0f}]" in log, source


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks/results" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def flat(page: str) -> str:
    return " ".join((ROOT / page).read_text("utf-8").split())


def test_the_intervals_in_the_text_are_those_of_the_results() -> None:
    found, text = result_tables.load("bits_2cores"), flat("docs/results.md")
    apart = {
        (each["split"], each["conditional"]): each["bits"]
        for each in found["differences"]
        if (each["first"], each["second"]) == ("mtg-names", "mtg-base")
    }
    sentence = " and ".join(
        f"{bits['value']:.4f} [{bits['low']:.4f}, {bits['high']:.4f}] {given}"
        for bits, given in ((apart["test", False], "unconditional"), (apart["test", True], "given attributes"))
    )
    assert f"The paired differences on test are {sentence}; on test_iid the intervals contain 0" in text
    assert all(apart["test_iid", given]["low"] < 0 < apart["test_iid", given]["high"] for given in (False, True))
    model = next(one for one in found["models"] if one["label"] == "mtg-names")
    saved = [model["splits"][split]["association"] for split in ("test_iid", "test")]
    cells = [f"{each['value']:.2f} [{each['low']:.2f}, {each['high']:.2f}]" for each in saved]
    assert f"two-word name {cells[0].replace(' [', ' bits [')} on test_iid and {cells[1]} on test" in text
    assert f"(real held-out names: {model['real']['near_known']['value']:.1%})" in text


def test_the_summary_of_the_log_has_the_figures_of_the_pages() -> None:
    summary = flat("docs/experiments.md").split("## Index")[0]
    good, best, raw = re.findall(r"accepted (\d+%).*?, (\d+%) with .*?, (\d+%) as they come", flat("README.md"))[0]
    assert f"accepts {good} of those, {best} of the best of 32, {raw} unselected and without guidance" in summary
    rows = [line.strip("|").split("|") for line in (ROOT / "docs/results.md").read_text("utf-8").splitlines()]
    ratios: dict[str, list[float]] = {"names": [], "filters": [], "training": []}
    for row in (row for row in rows if len(row) == 4):
        found = [float(each) for each in re.findall(r"([\d.]+) x", row[3])]
        if "names/s of the" in row[0]:
            ratios["names"] += found
        elif "all filters" in row[0]:
            ratios["filters"] += found
        elif any(what in row[0] for what in ("fine-tuning GPT-2", "vocabulary trimmed", "prompt of a step's names")):
            ratios["training"] += found
    low_high = {what: f"{min(found)} to {max(found)} x" for what, found in ratios.items()}
    assert f"Names {low_high['names']} transformers' `generate`, {low_high['filters']} with all filters" in summary
    assert f"fine-tuning {low_high['training']} its Trainer" in summary
