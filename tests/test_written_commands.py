"""Every command line that a page, an example or a configuration shows is one that the programs understand."""

from __future__ import annotations

import re
import shlex
from contextlib import chdir
from pathlib import Path

import pytest

from flash_experts.cli import COMMANDS, _dashes_to_underscores

ROOT = Path(__file__).parent.parent
WRITTEN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "data/README.md", "scripts/demo.sh")),
    *(path for folder in ("docs", "examples", "configs") for path in (ROOT / folder).rglob("*.*")),
    *(ROOT / "models").glob("mtg-*/*.md"),  # the released ones; others are a user's
]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8").replace("\\\n", " ")
    for path in sorted(WRITTEN)
    if path.suffix in (".md", ".py", ".yaml", ".sh")
    and "mtg/" not in path.as_posix()
    and "node_modules" not in path.parts
}
# A command ends with the line or its quotes, at a comment, at the next command, or at an aside in brackets.
_END = r"(?=`|'''|\"\"\"|\s#|\s&&|\s\(|\s{4}\w|$)"
_OURS = re.compile(rf"flash-experts ({'|'.join(COMMANDS)})\b([^`\n]*?){_END}", re.MULTILINE)
_SCRIPT = re.compile(rf"python3? ((?:examples|scripts|benchmarks)/[\w./]+\.py)([^`\n]*?){_END}", re.MULTILINE)


def ours() -> list[str]:
    """Each distinct call of our program that has arguments; "..." says that they are left out."""
    found = [f"{match[1]}{match[2].rstrip('. ;,')}" for text in TEXTS.values() for match in _OURS.finditer(text)]
    return sorted({command for command in found if " " in command and "..." not in command})


def test_they_are_found() -> None:
    assert len(ours()) > 40 and any(command.startswith("prepare --source scryfall") for command in ours())


def test_no_page_names_a_command_that_is_gone() -> None:
    """In its text too; the log of experiments keeps the names of its days."""
    named = {
        (page, word)
        for page, text in TEXTS.items()
        if page != "docs/experiments.md"
        for word in re.findall(r"`flash-experts ([a-z][\w-]*)", text)
    }
    assert len(named) > 20 and [one for one in sorted(named) if one[1] not in {*COMMANDS, "help"}] == []


@pytest.mark.parametrize("command", ours())
def test_our_commands_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = shlex.split(command)
    with chdir(ROOT):
        try:
            COMMANDS[name].make_parser().parse_args([_dashes_to_underscores(argument) for argument in arguments])
        except SystemExit:
            pytest.fail(capsys.readouterr().err)


def test_a_run_has_one_name() -> None:
    """Whoever types the lines of README after the demo starts runs of their own: none resumes another one."""
    runs: dict[str, set[str]] = {}
    for page in ("README.md", "scripts/demo.sh"):
        for name, rest in _OURS.findall(TEXTS[page]):
            config = re.search(r"--config (\S+)", rest)
            if name == "train" and config is not None:
                named = re.search(r"--training.run-name (\S+)", rest)
                runs.setdefault((named or config)[1], set()).add(rest.strip())
    assert {"quickstart", "demo-names"} <= runs.keys()
    assert [lines for lines in runs.values() if len(lines) > 1] == []


@pytest.mark.parametrize("page", TEXTS)
def test_scripts_and_targets_exist_with_their_options(page: str) -> None:
    for script, arguments in _SCRIPT.findall(TEXTS[page]):
        assert (ROOT / script).is_file(), script
        source = (ROOT / script).read_text("utf-8")
        for option in re.findall(r"--([\w-]+)", arguments):
            assert f"--{option}" in source or f"--{option.replace('-', '_')}" in source, f"{script} has no --{option}"
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for target in re.findall(r"(?:`|^    )make (\w+)", TEXTS[page], re.MULTILINE):
        assert target in targets, f"make {target}"
