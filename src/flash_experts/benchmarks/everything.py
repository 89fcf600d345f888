"""All topics one after another in their usual sizes, recorded by machine and compared with what was recorded."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_experts.benchmarks import TOPICS
from flash_experts.benchmarks.report import Report, find_recorded, machine_facts, say
from flash_experts.files import check_out_file
from flash_experts.models.loading import resolve_device


@dataclass(frozen=True, slots=True)
class Reports:
    """The reports of all topics."""

    reports: tuple[Report, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(report.text for report in self.reports)

    def to_json(self) -> dict[str, Any]:
        return {"topic": "all", "runs": [report.to_json() for report in self.reports]}


def run(args: Any) -> Reports:
    """Time all topics, record them by machine, and compare them with what was recorded."""
    device = resolve_device(args.device)
    files = _files(args.record, machine_facts(device), args.overwrite)
    chosen = {topic: _defaults(topic) for topic in TOPICS}
    recorded = _recorded(args.check, device, chosen)
    reports = []
    for topic, options in chosen.items():
        module = importlib.import_module(f"flash_experts.benchmarks.{topic}")
        options.device, options.out, options.overwrite = args.device, files.get(topic), args.overwrite
        options.check = args.check if topic in recorded else None
        reports.append(module.run(options))
    return Reports(tuple(reports))


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("The run")
    group.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    group.add_argument(
        "--record",
        help="folder for a JSON file of each topic on this machine, such as benchmarks/results (default: none)",
    )
    group.add_argument(
        "--check",
        help="folder of such files: warns of ratios that are worse by more than a tenth on a machine like this one in "
        "two runs (default: none)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _files(folder: str | None, machine: dict[str, Any], is_overwriting: bool) -> dict[str, str]:
    """The file of each topic on this machine; empty without a folder."""
    if folder is None:
        return {}
    if not Path(folder).is_dir():
        raise ValueError(f"--record {folder}: there is no such folder")
    facts = [machine["device"], f"{machine['threads']} threads"]
    if machine["cuda"] is None:
        facts.insert(1, machine["cpu_capability"])
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(facts).lower()).strip("-")
    files = {topic: str(Path(folder) / f"{topic}_{name}.json") for topic in TOPICS}
    for file in files.values():
        check_out_file(file, is_overwriting, option="--record")
    return files


def _defaults(topic: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"flash_experts.benchmarks.{topic}").add_options(parser)
    return parser.parse_args([])


def _recorded(folder: str | None, device: Any, chosen: Mapping[str, argparse.Namespace]) -> set[str]:
    """The topics that were recorded on a machine like this one."""
    found, missing = set(), []
    for topic in TOPICS if folder is not None else ():
        try:
            find_recorded(Path(str(folder)), topic, device, chosen[topic])
            found.add(topic)
        except ValueError as error:
            missing.append(str(error))
    if missing and not found:
        raise ValueError(missing[0])
    for reason in missing:
        say(reason)
    return found
