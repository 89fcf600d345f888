"""The prepared files that a run is about to read: are they as `prepare` wrote them?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from flash_experts.data.prepare import load_meta


def check_prepared(folder: str | Path, splits: Sequence[str] = ("train", "validation")) -> None:
    """Compares each split's file with its SHA-256 in meta.json; a file without one there is not checked.

    Raises:
        ValueError: a file is missing, or not the one that was prepared.
    """
    recorded = load_meta(folder).get("sha256", {})
    for split in splits:
        path = Path(folder) / f"{split}.jsonl"
        if path.name not in recorded or not path.is_file():  # `load_split` tells of a missing file
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != recorded[path.name]:
            raise ValueError(
                f"{path} is not the file that was prepared (its SHA-256 is not the one in meta.json): run "
                f"`flash-experts prepare --out {folder}` again, or, if you changed it on purpose, remove its line from "
                "sha256 in meta.json"
            )
