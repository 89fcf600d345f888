"""`flash-experts plot`: the numbers are those of metrics.jsonl, and a picture is written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flash_experts.cli import main
from flash_experts.evaluation.curves import PANELS, draw, read_curves


def write_run(folder: Path, loss: float, experts: bool) -> Path:
    """Three lines of training and two validations."""
    folder.mkdir()
    lines: list[dict[str, object]] = [
        {"event": "validation", "step": 0, "tokens": 0, "seconds": 0.0, "validation/bits_per_char": 4.0}
    ]
    for step in (10, 20, 30):
        router = {"router/1/load_cv": 0.2 * step, "router/3/load_cv": 0.4 * step} if experts else {}
        lines.append({"event": "train", "step": step, "tokens": 100 * step, "loss": loss / step, "lr": 0.1, **router})
    lines.append({"event": "validation", "step": 30, "tokens": 3000, "seconds": 7.5, "validation/bits_per_char": 2.5})
    lines.append({"event": "samples", "step": 30, "names": {"new": ["Goblin"]}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [str(write_run(tmp_path / "dense", 10, False)), str(write_run(tmp_path / "experts $2", 20, True))]


def test_json_without_out_writes_no_file(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["plot", *runs, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["dense", "experts $2"]
    assert list(Path().iterdir()) == []
    assert main(["plot", *runs]) == 0
    assert list(Path().iterdir()) == [Path("curves.png")]


def test_the_points_are_those_of_the_log(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "below" / "curves.png"
    assert main(["plot", *runs, "--out", str(out), "--json"]) == 0
    curves = json.loads(capsys.readouterr().out)
    assert list(curves) == ["dense", "experts $2"]
    experts = curves["experts $2"]
    assert experts["loss"] == [[10, 2.0], [20, 1.0], [30, pytest.approx(20 / 30)]]
    assert experts["lr"] == [[10, 0.1], [20, 0.1], [30, 0.1]]
    assert experts["load_imbalance"] == [[10, pytest.approx(3.0)], [20, pytest.approx(6)], [30, pytest.approx(9)]]
    assert curves["dense"]["load_imbalance"] == []
    assert experts["bits_per_step"] == [[0, 4.0], [30, 2.5]]
    assert experts["bits_per_token"] == [[0, 4.0], [3000, 2.5]]
    assert experts["bits_per_second"] == [[0.0, 4.0], [7.5, 2.5]]


def test_each_panel_draws_each_run(runs: list[str]) -> None:
    curves = read_curves(runs)
    axes = draw(curves).axes
    assert [one.get_title() for one in axes] == [panel.title for panel in PANELS]
    for panel, one in zip(PANELS, axes, strict=True):
        for line, points in zip(one.lines, curves.values(), strict=True):
            drawn = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            assert drawn == points[panel.name]
    assert len(draw(read_curves(runs[:1])).axes) == 5, "no MoE model: no panel for loads"


def test_each_run_is_in_the_legend(tmp_path: Path) -> None:
    """Also one whose name matplotlib would take for a hidden line, or for mathematics."""
    runs = ["plain", "_old", "$a$"]
    for name in runs:
        write_run(tmp_path / name, 1, False)
    figure = draw(read_curves([tmp_path / name for name in runs]))
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["plain", "_old", r"\$a\$"]


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures_and_pages_repeat_to_the_byte(runs: list[str], tmp_path: Path, ending: str, begins: bytes) -> None:
    out = tmp_path / f"curves.{ending}"
    contents = []
    for _ in range(2):
        assert main(["plot", *runs, "--out", str(out), "--overwrite"]) == 0
        contents.append(out.read_bytes())
    assert contents[0] == contents[1] and contents[0].startswith(begins)
    assert not list(tmp_path.glob("*.tmp"))


def test_runs_of_one_name_are_labelled_by_folder_and_an_unfinished_line_is_left_out(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run", 1, False)
    with (tmp_path / "b/run/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "train", "st')
    curves = read_curves([tmp_path / "a/run", tmp_path / "b/run/metrics.jsonl"])
    assert list(curves) == [str(tmp_path / "a/run"), str(tmp_path / "b/run")]
    first, second = curves.values()
    assert first == second


def test_each_run_has_its_own_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also files within a run folder, and one that has the name of another folder."""
    monkeypatch.chdir(tmp_path)
    for loss, run in enumerate("ab", start=1):
        lines = (write_run(Path(run), loss, False) / "metrics.jsonl").read_text("utf-8")
        for name in ("old", "a"):
            Path(run, f"{name}.jsonl").write_text(lines, "utf-8")
    assert list(read_curves(["a/old.jsonl", "b"])) == ["old", "b"]
    assert list(read_curves(["a/metrics.jsonl", "a/old.jsonl", "b/old.jsonl"])) == ["a", "a/old.jsonl", "b/old.jsonl"]
    curves = read_curves(["a", "b", "b/a.jsonl"])
    assert list(curves) == ["a", "b", "b/a.jsonl"]
    assert [points["loss"][0] for points in curves.values()] == [(10, 0.1), (10, 0.2), (10, 0.2)]


@pytest.mark.parametrize(
    ("text", "out", "message"),
    [
        (None, "x.png", "there is no"),
        ("{}\n{}\n", "x.png", "metrics.jsonl:1 is not a line of metrics"),
        ('{"event": "train", "step": 1}\nnonsense\n{"event": "train", "step": 2}\n', "x.png", "metrics.jsonl:2"),
        ("", "x.gif", "does not end in one of .png, .svg, .pdf"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, out: str, message: str
) -> None:
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run/metrics.jsonl").write_text(text, "utf-8")
    assert main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / out)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / out).exists()
