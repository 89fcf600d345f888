"""The built wheels are enough: from an empty folder, without a checkout, every command line of the README works."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PIP = "-m", "pip", "--quiet", "--disable-pip-version-check"
# A few steps and a few names instead of minutes; the options that a line has already come first, so these win.
SHORT = {
    "generate": "--count=5",
    "train": "--training.max-steps=3 --training.max-epochs=null --training.tokens-per-batch=512 "
    "--training.eval-every=3 --training.validation-names=20 --training.tracker=none --training.sample-every=null",
    "evaluate": "--samples=20 --max-names=20",
    "compare": "--samples=20 --max-names=20",
}
SCRIPT = """
import json, sys
import flash_experts
from flash_experts.cli import main

print(flash_experts.__file__)
for argv in json.loads(sys.argv[1]):
    status = main(argv)
    assert status == 0, (status, argv)
"""


def commands() -> list[list[str]]:
    """The README's command lines, shortened, without the server and what needs a hub or a GPU."""
    text = (ROOT / "README.md").read_text("utf-8")
    lines = re.findall(r"^flash-experts (.*?)(?: {2,}#.*)?$", text, re.MULTILINE)
    found = [shlex.split(line) for line in lines]
    return [
        [*argv, *SHORT.get(argv[0], "").split()]
        for argv in found
        if argv[0] not in ("serve", "completion") and not any("gpt2-8x" in each for each in argv)
    ]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both wheels, built as `make wheels` does, once for all processes of a test run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp().parent / f"wheels-{run}" if run else tmp_path_factory.mktemp("wheels")
    with FileLock(f"{folder}.lock"):
        if not list(folder.glob("flash_experts_models-*.whl")):  # the last one
            build_wheels(folder)
    return folder


def build_wheels(folder: Path) -> None:
    build = [sys.executable, *PIP, "wheel", "--no-deps", "-w", str(folder), ".", "distributions/models"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode and re.search("No matching distribution found for hatchling|NewConnectionError", done.stderr):
        pytest.skip("a wheel is built with hatchling from a package index, and none can be reached")
    assert done.returncode == 0, done.stderr


def names_in(wheels: Path, distribution: str) -> set[str]:
    [wheel] = wheels.glob(f"{distribution}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def record_of(wheels: Path, distribution: str) -> list[str]:
    """Each file of the wheel with its hash."""
    [wheel] = wheels.glob(f"{distribution}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [record] = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
        return archive.read(record).decode().splitlines()


def test_a_wheel_has_what_the_commands_read_and_no_more(wheels: Path) -> None:
    ours, models = names_in(wheels, "flash_experts"), names_in(wheels, "flash_experts_models")
    assert "flash_experts/data/embedded/cards.csv.xz" in ours
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"flash_experts/configs/{path.name}" in ours
    for path in (ROOT / "src/flash_experts").rglob("*.*"):
        if path.suffix not in (".pyc", ".so"):
            assert path.relative_to(ROOT / "src").as_posix() in ours
    assert not [name for name in ours if not name.startswith(("flash_experts/", "flash_experts-"))]
    for path in (ROOT / "models").glob("mtg-*/*.*"):
        assert f"flash_experts_models/{path.parent.name}/{path.name}" in models
    sizes = [wheel.stat().st_size for wheel in wheels.iterdir()]
    assert max(sizes) < 100e6, "the package index takes no larger file"


@pytest.mark.install
def test_wheels_from_the_sdists_are_the_same(wheels: Path, tmp_path: Path) -> None:
    """`python -m build` makes an sdist, and the wheel from that."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([python, *PIP, "install", "build"], check=True, timeout=600)
    for project in (".", "distributions/models"):
        build = [python, "-m", "build", "--outdir", str(tmp_path / "dist"), project]
        subprocess.run(build, check=True, cwd=ROOT, capture_output=True, timeout=900)
    for distribution in ("flash_experts", "flash_experts_models"):
        assert len(list((tmp_path / "dist").glob(f"{distribution}-*.tar.gz"))) == 1
        direct, from_sdist = (sorted(record_of(folder, distribution)) for folder in (wheels, tmp_path / "dist"))
        assert direct == from_sdist


@pytest.fixture(scope="module", params=["unpacked", pytest.param("installed", marks=pytest.mark.install)])
def python(request: pytest.FixtureRequest, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that runs Python with the wheels: unpacked next to this environment's packages, or in a clean one."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "unpacked":
        for wheel in wheels.iterdir():
            zipfile.ZipFile(wheel).extractall(folder)
        return ["env", f"PYTHONPATH={folder}", sys.executable]
    venv.create(folder, with_pip=True)
    command = [str(folder / "bin/python"), *PIP, "install", "-c", str(ROOT / "constraints.txt")]
    subprocess.run(
        [*command, "--find-links", str(wheels), "flash-experts[all,models]"], check=True, timeout=1800, cwd=folder
    )
    return ["env", "-u", "PYTHONPATH", str(folder / "bin/python")]


@pytest.fixture(scope="module")
def empty(python: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    (folder / "my_set.csv").write_text("type_line,colors,mana_value\nCreature — Goblin,R,2\nInstant,U,1\n", "utf-8")
    return folder


def call(python: list[str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*python, *arguments], cwd=cwd, env=settings, capture_output=True, text=True, timeout=600)


def test_every_command_of_the_readme_works(python: list[str], empty: Path) -> None:
    lines = commands()
    assert {"prepare", "generate", "train", "upcycle", "evaluate", "compare", "configs"} <= {line[0] for line in lines}
    # Data first: a reader of the README starts with names.
    lines.sort(key=lambda line: line[0] != "prepare")
    done = call(python, empty, "-c", SCRIPT, json.dumps(lines))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not Path(done.stdout.splitlines()[0]).is_relative_to(ROOT), "the wheel's package, not the checkout's"
    assert (empty / "models/quickstart/model.safetensors").is_file() and (empty / "report.html").is_file()
    written = {"data", "models", "names.csv", "report.html", "report.json", "my_set.csv", "named.csv"}
    assert {path.name for path in empty.iterdir()} <= written


def test_the_playground_shows_its_page(python: list[str], empty: Path) -> None:
    command = [*python, "-m", "flash_experts", "serve", "--port", "0"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=empty, env=settings, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+:\d+", server.stdout.readline())
            assert found is not None
            with urllib.request.urlopen(found[0], timeout=60) as page:
                assert "flash-experts" in page.read().decode("utf-8")
        finally:
            server.terminate()


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "flash_experts", "generate"),
        ("-m", "flash_experts", "upcycle", "models/mtg-base", "--out", "new"),
        ("-c", "from flash_experts import NameGenerator\nNameGenerator.from_pretrained()"),
    ],
)
def test_without_the_models_one_command_brings_them(arguments: tuple[str, ...], wheels: Path, tmp_path: Path) -> None:
    for wheel in wheels.glob("flash_experts-*.whl"):
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = call(["env", f"PYTHONPATH={tmp_path / 'site'}", sys.executable], tmp_path, *arguments)
    assert done.returncode == 1
    assert 'pip install "flash-experts[models]"' in done.stderr.splitlines()[-1]
