"""Coverage-guided fuzzing of what reads strangers' files, by hand (pip install atheris; Linux, CPython 3.11 or 3.12):

    python tests/fuzz/fuzz_files.py cards -max_total_time=120
    python tests/fuzz/fuzz_files.py model -max_total_time=120

`cards` feeds bytes to the readers of txt, csv, json, jsonl and YAML; `model` to the checks of config.json, of the index
and of the header of a safetensors file. A ValueError that names the file is an answer; anything else ends the run with
the input that caused it. Seeds are the test data. What was found is in `test_properties_of_files`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["flash_experts", "json", "csv", "yaml"]):
    from flash_experts.data.card_files import read_file
    from flash_experts.data.cleaning import clean
    from flash_experts.data.yaml_files import read_yaml

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
SUFFIXES = (".txt", ".csv", ".json", ".jsonl", ".yaml")


def cards(data: bytes) -> None:
    if not data:
        return
    suffix = SUFFIXES[data[0] % len(SUFFIXES)]
    path = FOLDER / f"cards{suffix}"
    path.write_bytes(data[1:])
    try:
        if suffix == ".yaml":
            read_yaml(path)
        else:
            clean(read_file(path).rows)
    except ValueError as error:
        assert path.name in str(error), repr(error)


def model(data: bytes) -> None:
    """The first byte says which file the rest is; the others are empty settings and an empty header."""
    from flash_experts.models import folder_checks

    if not data:
        return
    files = {
        "config.json": b"{}",
        folder_checks.WEIGHTS: (2).to_bytes(8, "little") + b"{}",
        folder_checks.INDEX: b"{}",
    }
    chosen = list(files)[data[0] % 3]
    files[chosen] = data[1:]
    if chosen == folder_checks.INDEX:
        files.pop(folder_checks.WEIGHTS)
        (FOLDER / folder_checks.WEIGHTS).unlink(missing_ok=True)
    else:
        files.pop(folder_checks.INDEX)
    for name, content in files.items():
        (FOLDER / name).write_bytes(content)
    try:
        folder_checks.check_folder(FOLDER)
        for path in folder_checks.weight_files(FOLDER):
            folder_checks.tensor_sizes(path)
    except ValueError as error:
        assert str(FOLDER) in str(error), repr(error)


def main() -> None:
    target = {"cards": cards, "model": model}[sys.argv[1]]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for index, suffix in enumerate(SUFFIXES):
        for path in sorted((Path(__file__).parents[1] / "test_data").glob(f"own*{suffix}")):
            (corpus / path.name).write_bytes(bytes([index]) + path.read_bytes()[:2000])
    atheris.Setup([sys.argv[0], str(corpus), "-max_len=4096", *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
