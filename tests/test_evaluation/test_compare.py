"""Comparison of models, and its report."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from flash_experts.evaluation import compare, format_comparison, write_report
from flash_experts.evaluation.compare import (
    REAL,
    BlindName,
    ComparisonResult,
    PromptNames,
    differences,
    make_blind_test,
    unique_labels,
)
from flash_experts.evaluation.curves import CurvePoint, read_curve
from flash_experts.evaluation.evaluate import NameNats
from flash_experts.evaluation.report import render_report, write_plots
from flash_experts.evaluation.tables import Table, bits_table


@pytest.fixture(scope="module")
def result(model_dirs: list[Path], data_dir: Path) -> ComparisonResult:
    return compare([*model_dirs, "ngram"], data_dir, samples=10, seed=1)


def test_each_pair_is_compared_on_each_set(result: ComparisonResult) -> None:
    pairs = {(d.first, d.second, d.split, d.conditional) for d in result.differences}
    assert len(pairs) == len(result.differences) == 2 * 3 * 2  # three pairs, unconditional and conditional
    assert ("one", "two", "test", True) in pairs
    assert ("one", "ngram", "test_iid", False) in pairs
    for difference in result.differences:
        if difference.second == "ngram":  # random weights against character statistics
            assert difference.significant and difference.bits.low > 0


def test_difference_is_that_of_the_bits(result: ComparisonResult) -> None:
    """The first model's minus the second's, on the same set and with the same kind of prompts."""
    splits = {model.label: model.splits for model in result.models}
    for found in result.differences:
        first, second = (splits[label][found.split] for label in (found.first, found.second))
        bits = [one.conditional.value if found.conditional else one.unconditional.value for one in (first, second)]
        assert found.bits.value == pytest.approx(bits[0] - bits[1])


def test_names_side_by_side(result: ComparisonResult) -> None:
    unconditional = result.prompts[0]
    assert unconditional.prompt == "unconditional"
    assert all(unconditional.names[label] for label in ("one", "two", "ngram"))
    assert any(prompt.names["ngram"] for prompt in result.prompts[1:])
    assert any(prompt.names["one"] != prompt.names["two"] for prompt in result.prompts)


def test_curves_skip_a_line_cut_short(result: ComparisonResult) -> None:
    assert list(result.curves) == ["one"]
    assert [(point.step, point.seconds, point.train_loss) for point in result.curves["one"]] == [
        (1, 0.5, 4.0),
        (2, 1.0, 3.0),
        (3, 1.5, 2.0),
    ]


def test_a_step_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.9}, {"step": 2, "loss": 2.5}, [1], {"note": "x"}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [(point.step, point.train_loss) for point in read_curve(path)] == [(1, 3.0), (2, 2.5)]
    assert read_curve(tmp_path / "absent.jsonl") == []


def test_invalid_values_of_an_untrusted_metrics_file_count_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    nested = "[" * 10**5
    path.write_text(f'{{"step": 1, "loss": "x", "tokens": [2], "seconds": "3"}}\n{nested}\n', encoding="utf-8")
    assert read_curve(path) == [CurvePoint(1, None, None, None, None)]


def test_training_and_validation_of_a_step_are_one_point(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"event": "validation", "step": 5, "seconds": 2.5, "validation/bits_per_char": 3.5},
        {"event": "train", "step": 10, "seconds": 5.0, "loss": 3.0},
        {"event": "validation", "step": 10, "seconds": 5.0, "validation/bits_per_char": 2.5},
        {"event": "samples", "step": 12},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    points = [(point.step, point.seconds, point.train_loss, point.validation_bits) for point in read_curve(path)]
    assert points == [(5, 2.5, None, 3.5), (10, 5.0, 3.0, 2.5), (12, None, None, None)]


def test_json_is_plain(result: ComparisonResult) -> None:
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [model["label"] for model in plain["models"]] == ["one", "two", "ngram"]
    assert len(plain["differences"]) == len(result.differences)


def test_table_for_the_terminal(result: ComparisonResult) -> None:
    text = format_comparison(result, width=160)
    for label in ("one", "two", "ngram", "real names"):
        assert label in text
    for model in result.models:
        assert f"{model.splits['test_iid'].unconditional.value:.3f}" in text


def test_text_of_a_table_is_not_taken_for_markup() -> None:
    table = Table("t [bold]", ("a", "b"), (("[red]x[/red]", "1"),))
    assert "[red]x[/red]" in table.to_text()


def test_a_table_is_plain_text_even_where_colors_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in Table("t", ("a", "b"), (("x", "1"),)).to_text()


@pytest.mark.parametrize(("count", "is_significant"), [(1, False), (5, False), (6, True)])
def test_few_names_show_no_difference(result: ComparisonResult, count: int, is_significant: bool) -> None:
    """One model is better on each name: with 5 names, that happens by chance in one of 16 comparisons."""
    worse, better = (
        replace(model, nats={"test": NameNats(np.full(count, 10.0), nats, nats)})
        for model, nats in zip(result.models, (np.full(count, 9.0), np.full(count, 8.0)), strict=False)
    )
    assert {found.significant for found in differences([worse, better])} == {is_significant}


def test_labels_are_unique() -> None:
    assert unique_labels(["runs/a", "runs/b", "ngram"]) == ["a", "b", "ngram"]
    assert unique_labels(["x/best", "y/best", "z"]) == ["x/best", "y/best", "z"]
    assert unique_labels(["best", "y/best"]) == ["best", "y/best"]
    with pytest.raises(ValueError, match="given twice"):
        unique_labels(["a", "a/"])


def test_nothing_to_compare(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([], data_dir)


class Page(HTMLParser):
    """Collects the tags, their addresses and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_escapes_text_of_models(result: ComparisonResult) -> None:
    pytest.importorskip("matplotlib")
    evil = '<script>alert(1)</script> & "$x$" <img src=http://a.b/c>'
    models = tuple(replace(model, label=f"{evil}{index}") for index, model in enumerate(result.models))
    labels = [model.label for model in models]
    hostile = replace(
        result,
        models=models,
        prompts=(PromptNames(evil, {label: [evil] for label in labels}),),
        curves={labels[0]: result.curves["one"]},
        blind_test=(BlindName(evil, labels[0]), BlindName(evil, REAL)),
    )
    page = Page(render_report(hostile))
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.text.count("<script>alert(1)</script>") > 5


def test_report_stands_alone(result: ComparisonResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_report(result, tmp_path / "out" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(address.startswith("#") for address in page.addresses)
    assert page.tags.count("svg") == 3  # bits, speed and quality, training; no model has experts
    assert "unconditional" in page.text
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]  # no temporary file stays
    for name in result.prompts[0].names["two"]:
        assert name in page.text
    # The page allows its own script and no other.
    script = text[text.index("<script>") + len("<script>") : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_the_same_seed_gives_the_same_page_but_for_date_and_speeds(
    result: ComparisonResult, model_dirs: list[Path], data_dir: Path
) -> None:
    pytest.importorskip("matplotlib")
    again = compare([*model_dirs, "ngram"], data_dir, samples=10, seed=1)

    def page(found: ComparisonResult, day: int) -> str:
        models = (replace(model, scored_per_second=1.0, sampled_per_second=1.0) for model in found.models)
        return render_report(replace(found, models=tuple(models)), day=date(2020, 1, day))

    assert page(result, 1).replace("2020-01-01", "2020-01-02") == page(again, 2)


def test_plots_are_written_as_pictures(result: ComparisonResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with_experts = replace(result.models[0], expert_loads={"1": (0.5, 1.5), "3": (1.0, 1.0)})
    paths = write_plots(replace(result, models=(with_experts, *result.models[1:])), tmp_path / "png")
    assert [path.stem for path in paths] == ["bits", "speed_quality", "training", "experts"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the plots"):
        write_plots(result, tmp_path / "file")


def test_blind_test_is_half_real_and_hides_which() -> None:
    samples = {"one": [f"a{index}" for index in range(30)], "two": [f"b{index}" for index in range(30)]}
    real = [f"r{index}" for index in range(50)]
    test = make_blind_test(samples, real, {"a0", "b1"}.__contains__, seed=0)
    sources = [name.source for name in test]
    assert (sources.count(REAL), sources.count("one"), sources.count("two")) == (12, 6, 6)
    assert not {"a0", "b1"} & {name.text for name in test}  # real after all
    assert sources != sorted(sources)
    assert test == make_blind_test(samples, real, {"a0", "b1"}.__contains__, seed=0)
    other = make_blind_test(samples, real, {"a0", "b1"}.__contains__, seed=1)
    chosen, others = ({name.text for name in one if name.source == REAL} for one in (test, other))
    assert chosen != others, "the real names are drawn, too"
    assert make_blind_test({"one": ["a0"]}, real, {"a0"}.__contains__, seed=0) == ()
    assert make_blind_test({}, real, bool, seed=0) == ()


def test_blind_test_of_few_real_names_or_repeated_ones_has_as_many_of_each() -> None:
    samples = {"one": [f"a{index // 3}" for index in range(30)], "two": [f"b{index}" for index in range(30)]}
    for num_real, each in ((50, 6), (4, 2)):
        real = [f"r{index}" for index in range(num_real)]
        sources = [name.source for name in make_blind_test(samples, real, {""}.__contains__, seed=0)]
        assert (sources.count(REAL), sources.count("one"), sources.count("two")) == (2 * each, each, each)


def test_a_star_marks_what_nothing_beats(result: ComparisonResult) -> None:
    rows = bits_table(result.models, result.differences).rows
    starred = {(row[0], row[1]) for row in rows if row[2].endswith("*")}
    assert {label for label, _ in starred} == {"ngram"}  # the others have random weights


def test_report_that_cannot_be_written(result: ComparisonResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the report"):
        write_report(result, tmp_path / "file" / "report.html")
