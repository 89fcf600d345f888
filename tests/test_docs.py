"""The pages of docs/: what they name exists, what they say of the code holds, and the site builds without a warning."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from tests.helpers import command_line

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINKING = [*sorted(ROOT.glob("*.md")), ROOT / "data/README.md", *PAGES, DOCS / "learn/README.md"]
LINKING += sorted((DOCS / "learn").rglob("[0-9]*.py"))
_DOTTED = re.compile(r"`(flash_experts(?:\.\w+)+)`")


def named(dotted: str) -> Any:
    """The object of a dotted name."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            continue
        if found:
            thing = importlib.import_module(module)
            for part in parts[end:]:
                thing = getattr(thing, part)
            return thing
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    for dotted in set(_DOTTED.findall(text)):
        named(dotted)
    for path in re.findall(r"`((?:examples|tests|scripts|configs|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def heading_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_and_headings_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    if page.suffix == ".py":  # a chapter: its prose is in comments
        text = "\n".join(line for line in text.splitlines() if line.startswith("# "))
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), link
        if anchor and linked.suffix == ".md":
            assert anchor in heading_anchors(linked), link


def test_the_code_uses_the_terms_of_the_field() -> None:
    """Words that docs/glossary.md translates do not come back."""
    private = "told untold anew stranger strangers fitness fittest contestant contestants".split()
    private += [
        "begin symbol",
        "end symbol",
        "runs of letters",
        "runs of characters",
        "letters in the shapes",
        "by heart",
    ]
    words = re.compile(rf"\b(?:{'|'.join(private)})\b", re.IGNORECASE)
    found = {str(path): words.findall(path.read_text("utf-8")) for path in (ROOT / "src").rglob("*.py")}
    assert {path: list_ for path, list_ in found.items() if list_} == {}


def test_what_a_docstring_names_exists() -> None:
    for path in sorted((ROOT / "src").rglob("*.py")):
        for dotted in sorted(set(_DOTTED.findall(path.read_text("utf-8")))):
            try:
                named(dotted)
            except (AttributeError, ModuleNotFoundError):
                pytest.fail(f"{path.relative_to(ROOT)} names {dotted}, which is not there")


def steps() -> list[str]:
    """The functions of the steps, in their order."""
    rows = re.findall(r"^\| (\d+) \|.*\| `([\w.]+)` \|$", (DOCS / "architecture.md").read_text("utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 12))
    return [dotted for _, dotted in rows]


def code_of(function: Any) -> CodeType:
    return inspect.unwrap(getattr(function, "__func__", function)).__code__


def test_a_name_takes_the_steps_in_their_order(tmp_path: Path) -> None:
    command_line.make_workplace(tmp_path)
    wanted = {code_of(named(dotted)): dotted for dotted in steps()}
    called: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and wanted.get(frame.f_code, "") not in ("", *called):
            called.append(wanted[frame.f_code])

    sys.setprofile(watch)
    try:
        done = command_line.run("generate", "--model", "models/moe", "--count", "1", "--seed", "1", cwd=tmp_path)
    finally:
        sys.setprofile(None)
    assert done.status == 0, done.err
    assert called == steps()


def test_each_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = {"": project["dependencies"], **project["optional-dependencies"]}
    text = (DOCS / "architecture.md").read_text("utf-8").split("## Why each dependency")[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    told = {package.strip() for row in cells for cell in row[:2] for package in cell.split(",")}
    for extra, wanted in requirements.items():
        names = {re.split(r"[^\w-]", requirement)[0] for requirement in wanted} - {"flash-experts"}
        assert names <= told, f"{extra}: {names - told}"
    core = {package.strip() for row in cells if len(row) == 2 for package in row[0].split(",")} - {"package", "---"}
    assert core == {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}


def test_the_map_is_what_import_linter_checks() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = [layer.replace("flash_experts.", "") for layer in contracts[0]["layers"]]
    shown = re.findall(r"```text\n(.*?)```", (DOCS / "architecture.md").read_text("utf-8"), re.DOTALL)[0]
    assert re.findall(r"^\w+(?: \| \w+)?", shown, re.MULTILINE) == layers


@pytest.mark.slow
def test_site_builds_without_a_warning_and_without_the_network(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="zensical is in the docs extra")
    subprocess.run([sys.executable, "scripts/stage_docs.py"], cwd=ROOT, check=True)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((ROOT / "build/site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        html = page.read_text("utf-8")
        fetched = re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"?(https?://[^\"\s>]+)", html)
        assert not fetched, f"{page}: {fetched}"
        assert "@import" not in html
    site = ROOT / "build/site"
    formulas = re.findall("<math[^>]*>", (site / "learn/01_attention/index.html").read_text("utf-8"))
    assert formulas and all('display="block"' in formula for formula in formulas)
    assert 'href="../api/commands/#flash_experts.cli.main"' in (site / "architecture/index.html").read_text("utf-8")
