"""User-defined presets."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_experts.generation import PRESETS, NameRequest, Sampling, load_presets
from flash_experts.generation.request import sampling_of
from flash_experts.options import options_of


def test_a_file_of_presets_adds_to_ours_and_may_replace_them(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("wild: {temperature: 1.5, min_p: 0.05}\nbalanced:\n  top_k: 9\n")
    assert load_presets(file) == {"wild": Sampling(1.5, min_p=0.05), "balanced": Sampling(top_k=9)}
    assert sampling_of("wild", file, top_k=3) == Sampling(1.5, 3, min_p=0.05)
    assert sampling_of("balanced", file) == Sampling(top_k=9)
    assert sampling_of("creative", file) == PRESETS["creative"]
    assert sampling_of("balanced") == PRESETS["balanced"] == Sampling(0.8, top_p=0.9, guidance=1.25)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("wild: {temprature: 1}", "did you mean 'temperature'"),
        ("wild: {temperature: hot}", "must be a number"),
        ("wild: {top_k: 2.5}", "top_k must be a whole number, not 2.5"),
        ("wild: {temperature: 0}", "preset 'wild': temperature"),
        ("wild: 3", "presets are written"),
        ("- wild", "holds no settings"),
        ("", "holds no settings"),
        ("wild: {", "is not valid YAML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (None, "there is no file"),
    ],
)
def test_bad_files_are_reported_in_one_line(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as error:
        load_presets(file)
    assert "\n" not in str(error.value) and "mine.yaml" in str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_slider_of_the_playground_can_show_a_presets_value(preset: str) -> None:
    for name, known in options_of(Sampling).items():
        assert known.slider is not None
        low, high, step = known.slider
        value = getattr(PRESETS[preset], name)
        assert low <= value <= high
        assert (value - low) / step == pytest.approx(round((value - low) / step), abs=1e-9), f"{name}: {value}"


def test_more_names_are_drawn_where_text_follows_a_gap() -> None:
    patterns = ("Serra ___", "___ Axe", "A ___, B ___", None)
    assert [NameRequest(pattern=pattern).num_candidates for pattern in patterns] == [8, 32, 32, 8]
    assert NameRequest(pattern="___ Axe", quality="fast").num_candidates == 1
    assert NameRequest(pattern="___ Axe", best_of=3).num_candidates == 3
