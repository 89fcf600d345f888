"""Writes the tables of README.md and docs/results.md from the files in benchmarks/results.

    python scripts/result_tables.py            replaces what is between the markers of the pages
    python scripts/result_tables.py --check    changes nothing; exits with 1 where a page is not as it would be written

A marker names its table: `<!-- results: bits -->`, then the table, then `<!-- end of results -->`. `WRITTEN_BY` has the
command that measures each file again. A table whose file is missing stays as it is, and the command is named.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", ROOT / "docs/results.md"]
_BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(\n<!-- end of results -->)", re.DOTALL)
WRITTEN_BY = {
    "bits_2cores": "flash-experts compare models/mtg-{names,base,names+ngram} ngram --samples 0 --json > FILE",
    "teacher_bits": "flash-experts evaluate models/teacher --max-names 500 --samples 0 --json > FILE",
    "released_2cores": "python benchmarks/train_released.py",
    "student_capacity": "python benchmarks/student_capacity.py --names data/teacher-names.jsonl --out FILE",
    "train_speed_2cores": "flash-experts benchmark train --steps 4 --experts 8 --out FILE",
    "train_speed_256_names_2cores": "flash-experts benchmark train --names-per-step 256 --steps 2 --out FILE",
    "trainer_overhead_2cores": "python benchmarks/trainer_overhead.py",
    "moe_2cores": "flash-experts benchmark moe --out FILE",
    "generate_2cores": "flash-experts benchmark generate --count 1024 --out FILE",
    "generate_experts_2cores": "flash-experts benchmark generate --model models/mtg-names --count 1024 --out FILE",
    "generate_experts_256_rows_2cores": (
        "flash-experts benchmark generate --model models/mtg-names --count 1024 --batch-size 256 --out FILE"
    ),
    "lists_mtg-names_2cores": "flash-experts evaluate models/mtg-names --lists --json > FILE",
    "lists_mtg-base_2cores": "flash-experts evaluate models/mtg-base --lists --json > FILE",
}
UNCONDITIONAL, CONDITIONAL = "unconditional", "given type, colors, mana value"
SPLITS = ("test_iid", "test")


class MissingResults(Exception):
    """A file of results is not there; the message has the command that writes it."""


def load(name: str) -> Any:
    """Reads a file of results.

    Raises:
        MissingResults: it is not there.
    """
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        raise MissingResults(f"{file.name} is missing in benchmarks/results: {WRITTEN_BY[name]}")
    return json.loads(file.read_text("utf-8"))


def table(*rows: list[str]) -> str:
    """Formats a Markdown table; the first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ bits


def _bits_of(label: str) -> dict[str, Any]:
    """The splits of one model of the comparison."""
    found = {model["label"].removeprefix("models/"): model for model in load("bits_2cores")["models"]}
    splits: dict[str, Any] = found[label]["splits"]
    return splits


def _bracket(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _half_width(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} ± {(estimate['high'] - estimate['low']) / 2:.3f}"


def bits() -> str:
    """Bits per character of the released models, the models before them, the teacher and the n-grams."""
    names, base, mixed, ngram = (_bits_of(label) for label in ("mtg-names", "mtg-base", "mtg-names+ngram", "ngram"))
    mixture = "`models/mtg-names+ngram`: its probabilities mixed with the n-grams'"
    rows = [
        (f"`models/mtg-names`, {UNCONDITIONAL}", names, "unconditional"),
        (f"`models/mtg-names`, {CONDITIONAL}", names, "conditional"),
        ("the same with the attributes of other cards", names, "shuffled"),
        (f"{mixture}, {CONDITIONAL}", mixed, "conditional"),
        (f"`models/mtg-base`, {UNCONDITIONAL}", base, "unconditional"),
        (f"`models/mtg-base`, {CONDITIONAL}", base, "conditional"),
    ]
    if (RESULTS / "teacher_bits.json").is_file():
        teacher = load("teacher_bits")["splits"]
        rows += [(f"the teacher (135M), 500 names of each test, {UNCONDITIONAL}", teacher, "unconditional")]
        rows += [(f"the teacher, {CONDITIONAL}", teacher, "conditional")]
    before = load("released_2cores")["runs"]["shared"][0]["bits"]
    rows += [
        (f"the models before them, which had read dictionaries, {UNCONDITIONAL}", before, "unconditional"),
        (f"the same, {CONDITIONAL}", before, "conditional"),
        (f"modified Kneser-Ney character n-grams, {UNCONDITIONAL}", ngram, "unconditional"),
    ]
    lines = [[label, *(_bracket(splits[split][prompt]) for split in SPLITS)] for label, splits, prompt in rows]
    return table(["bits per character of unseen names (less is better)", "test_iid", "test, unseen families"], *lines)


def experts_and_base() -> str:
    """The sentence on the MoE model and its base."""
    names, base = _bits_of("mtg-names"), _bits_of("mtg-base")
    of = {split: [f"{model[split]['unconditional']['value']:.3f}" for model in (names, base)] for split in SPLITS}
    given = [f"{model[split]['conditional']['value']:.3f}" for split in SPLITS for model in (names, base)]
    return (
        f"Unconditional, the MoE model needs {of['test_iid'][0]} bits against the base's {of['test_iid'][1]} on "
        f"test_iid, {of['test'][0]} against {of['test'][1]} on unseen families;\n"
        f"given attributes {given[0]} against {given[1]} and {given[2]} against {given[3]} (one seed)."
    )


def mixed_with_ngrams() -> str:
    """The sentence on the mixture with the n-grams."""
    mixed, alone = _bits_of("mtg-names+ngram"), _bits_of("mtg-names")
    places = [(split, prompt) for prompt in ("unconditional", "conditional") for split in SPLITS]
    values, others = ([model[split][prompt]["value"] for split, prompt in places] for model in (mixed, alone))
    gains = [1 - value / other for value, other in zip(values, others, strict=True)]
    return (
        f"With the n-grams it needs {values[0]:.3f} bits on test_iid and {values[1]:.3f} on test unconditional, "
        f"{values[2]:.3f} and {values[3]:.3f} given\nattributes: {min(gains):.1%} to {max(gains):.1%} less "
        "than the model alone."
    )


def by_year() -> str:
    """Bits given attributes of cards before and since 2025, which the teacher cannot have read."""
    labels = {"mtg-base": "`models/mtg-base`", "mtg-names": "`models/mtg-names`"}
    labels |= {"mtg-names+ngram": "`models/mtg-names+ngram`", "ngram": "n-grams"}
    header, lines = ["bits given attributes"], []
    for label, shown in labels.items():
        cells = [shown]
        for split in SPLITS:
            earlier, later = (_bits_of(label)[split]["by_year"][years] for years in ("until 2024", "since 2025"))
            if len(header) < 7:
                header += [
                    f"{split} until 2024 ({earlier['names']:,} names)",
                    f"since 2025 ({later['names']:,})",
                    "apart",
                ]
            values = [group["conditional"] for group in (earlier, later)]
            cells += [_half_width(value) for value in values]
            cells.append(f"{values[1]['value'] - values[0]['value']:.3f}")
        lines.append(cells)
    return table(header, *lines)


# ----------------------------------------------------------------------------------------------------------- speed


def _training(name: str) -> dict[str, dict[str, Any]]:
    short = {"transformers Trainer, padded": "trainer", "ours, dense": "ours", "ours, dense, vocabulary": "trimmed"}
    short |= {"ours, 8 experts in every second block": "experts", "the same, the prompt computed once a step": "shared"}
    return {short[row["name"].split(" trimmed")[0]]: row for row in load(name)["rows"]}


def _layer(section: str, tokens: int) -> dict[str, dict[str, Any]]:
    rows = load("moe_2cores")["rows"]
    return {row["implementation"]: row for row in rows if (row["section"], row["tokens"]) == (section, tokens)}


def _ms(row: dict[str, Any], digits: int = 0) -> str:
    return f"{1e3 * row['seconds']:.{digits}f}"


def _generating(name: str) -> tuple[str, dict[str, float]]:
    """What was measured, and names a second: theirs, ours, filtered (all of ours), theirs16 and ours16 (bfloat16)."""
    found, kind = load(name), "the MoE model" if "experts" in name else "the dense model"
    rates = (row["names_per_second"] for row in found["rows"])
    what = f"names/s of {kind} `{found['settings']['model']}`, batch {found['settings']['batch_size']}"
    return what, dict(zip(("theirs", "ours", "filtered", "theirs16", "ours16"), rates, strict=True))


HEADER = ["what", "ours", "the baseline", "ratio"]


def speed() -> str:
    """The short table of README."""
    rows, layer = _training("train_speed_2cores"), _layer("training", 2048)
    lines = [
        [
            "fine-tuning GPT-2 small on names, vocabulary trimmed, the prompt computed once, real tokens/s",
            f"{rows['shared']['tokens_per_second']:.0f}",
            f"{rows['trainer']['tokens_per_second']:.0f}, transformers' Trainer with padding",
            f"{rows['shared']['times_peer']:.1f} x",
        ]
    ]
    for name in ("generate_2cores", "generate_experts_2cores"):
        what, rate = _generating(name)
        baseline = f"{rate['theirs']:.0f}, transformers' `generate`"
        lines.append([what, f"{rate['ours']:.0f}", baseline, f"{rate['ours'] / rate['theirs']:.1f} x"])
    lines.append(
        [
            "MoE layer, forward and backward, 2,048 tokens, ms",
            _ms(layer["fe_experts"]),
            f"{_ms(layer['dense'])}, a dense MLP of equal FLOPs",
            f"{layer['fe_experts']['times_dense']:.2f} x",
        ]
    )
    return table(HEADER, *lines)


def _training_rows() -> list[list[str]]:
    few, many = _training("train_speed_2cores"), _training("train_speed_256_names_2cores")
    base = f"{few['trainer']['tokens_per_second']:.0f}"

    def rate(row: dict[str, Any]) -> str:
        return f"{row['tokens_per_second']:.0f}"

    def times(row: dict[str, Any]) -> str:
        return f"{row['times_peer']:.1f} x"

    step = load("trainer_overhead_2cores")
    return [
        [
            "fine-tuning GPT-2 small on names, 64 names a step, real tokens/s",
            rate(few["ours"]),
            f"{base}, transformers' Trainer with padding",
            times(few["ours"]),
        ],
        ["the same with the vocabulary trimmed to what cards need", rate(few["trimmed"]), base, times(few["trimmed"])],
        ["and the prompt of a step's names computed once", rate(few["shared"]), base, times(few["shared"])],
        [
            "the same with 256 names a step, and with the vocabulary trimmed besides",
            f"{rate(many['ours'])}; {rate(many['trimmed'])}",
            rate(many["trainer"]),
            f"{times(many['ours'])}; {times(many['trimmed'])}",
        ],
        [
            "64 names a step with 8 experts in every second block, 2 per token, whole vocabulary",
            rate(few["experts"]),
            f"{base}, the dense model as above",
            times(few["experts"]),
        ],
        [
            "a step of training, 8 experts, 2,048 tokens, s",
            f"{step['trainer_seconds_per_step']:.3f}",
            f"{step['bare_seconds_per_step']:.3f}, a bare loop of the same model",
            f"{step['ratio_of_sums']:.2f} x",
        ],
    ]


def _generating_rows() -> list[list[str]]:
    lines = []
    for name in ("generate_2cores", "generate_experts_2cores", "generate_experts_256_rows_2cores"):
        what, rate = _generating(name)
        theirs, theirs16 = f"{rate['theirs']:.0f}", f"{rate['theirs16']:.0f}"
        times = {key: f"{rate[key] / rate['theirs']:.1f} x" for key in ("ours", "filtered", "ours16")}
        lines += [
            [f"{what}, the same sampling", f"{rate['ours']:.0f}", f"{theirs}, transformers' `generate`", times["ours"]],
            [
                "the same with all filters and the nearest card of each",
                f"{rate['filtered']:.0f}",
                theirs,
                times["filtered"],
            ],
            [
                "the same sampling, `--dtype bfloat16`",
                f"{rate['ours16']:.0f}",
                f"{theirs}; {theirs16} in bfloat16",
                f"{times['ours16']}; {rate['ours16'] / rate['theirs16']:.1f} x",
            ],
        ]
    return lines


def _layer_rows() -> list[list[str]]:
    many, few = _layer("training", 2048), _layer("training", 16)
    decoding = [(_layer("decoding", tokens), digits) for tokens, digits in ((1, 1), (16, 0), (64, 0))]
    others = f"{_ms(many['grouped_mm'])} grouped_mm; {_ms(many['eager'])} eager"
    of_few = "; ".join(_ms(few[name]) for name in ("dense", "grouped_mm", "eager"))
    dense = " / ".join(_ms(rows["dense"], digits) for rows, digits in decoding)
    times = " / ".join(f"{rows['fe_experts']['times_dense']:.2f}" for rows, _ in decoding)
    return [
        [
            "MoE layer, forward and backward, 2,048 tokens, ms",
            _ms(many["fe_experts"]),
            f"{_ms(many['dense'])} dense MLP of equal FLOPs; {others}",
            f"{many['fe_experts']['times_dense']:.2f} x dense",
        ],
        ["the same for 16 tokens", _ms(few["fe_experts"]), of_few, f"{few['fe_experts']['times_dense']:.1f} x dense"],
        [
            "MoE layer decoding 1 / 16 / 64 tokens, ms",
            " / ".join(_ms(rows["fe_experts"], digits) for rows, digits in decoding),
            f"{dense}, a dense MLP that reads the same weights",
            f"{times} x",
        ],
    ]


def speed_of_all() -> str:
    """The long table of docs/results.md."""
    return table(HEADER, *_training_rows(), *_generating_rows(), *_layer_rows())


# ------------------------------------------------------------------------------------------------- lists of names


def lists() -> str:
    """Lists of names at each quality, next to real ones."""
    header = ["lists", "type", "color", "legendary", "subtype", "AUC", "distinct words", "last words"]
    header += ["names with an unknown word", "near a card"]
    rows: dict[str, list[str]] = {}
    for model in ("mtg-names", "mtg-base"):
        for measured in load(f"lists_{model}_2cores"):
            separation = measured["separation"]
            label = measured["label"] if measured["per_second"] is None else f"`{model}`, {measured['label']}"
            shares = [
                measured["recognized"][task]["value"] for task in ("type", "color", "legendary creature", "subtype")
            ]
            others = [measured["distinct_words"], measured["distinct_heads"], measured["unknown_words"]["value"]]
            others.append(measured["near_known"]["value"])
            rows[label] = [
                label,
                *(f"{share:.0%}" for share in shares),
                "-" if separation is None else f"{separation['strong']['value']:.2f}",
                *(f"{share:.0%}" for share in others),
            ]
    return table(header, *rows.values())


def acceptable() -> str:
    """What the reader of the blind sheet accepted."""
    judged = csv.DictReader((RESULTS / "lists_sheet.csv").open(encoding="utf-8"))
    key = csv.DictReader((RESULTS / "lists_sheet_key.csv").open(encoding="utf-8"))
    source = {row["number"]: row["source"] for row in key}
    marks: dict[str, list[int]] = {}
    for row in judged:
        marks.setdefault(source[row["number"]], []).append(int(row["acceptable"]))
    share = {label: f"{sum(given) / len(given):.0%}" for label, given in marks.items()}
    return (
        f"On a blind sheet a language model, the one reader, accepted {share['good']} of such names,\n"
        f"{share['best']} with `--quality best` (32 drawn), {share['raw']} as they come (`--raw`), {share['ngram']} of "
        f"the n-gram's and {share['real']} of real ones\n([docs/results.md](docs/results.md#lists-of-names))."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "bits": bits,
    "experts-and-base": experts_and_base,
    "mixed-with-ngrams": mixed_with_ngrams,
    "by-year": by_year,
    "speed": speed,
    "speed-of-all": speed_of_all,
    "lists": lists,
    "acceptable": acceptable,
}


def rendered(text: str) -> tuple[str, set[str]]:
    """Returns a page with the blocks between its markers written again, and what was missing for some of them.

    Raises:
        KeyError: a marker names a block that is not there.
    """
    missing: set[str] = set()

    def write(found: re.Match[str]) -> str:
        try:
            return f"{found[1]}\n{BLOCKS[found[2]]()}\n{found[3]}"
        except MissingResults as error:
            missing.add(str(error))
            return found[0]

    return _BLOCK.sub(write, text), missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a page differs")
    check, differs, missing = parser.parse_args().check, False, set[str]()
    for page in PAGES:
        old = page.read_text("utf-8")
        new, missing_here = rendered(old)
        missing |= missing_here
        if old != new:
            differs = True
            print(f"{page.relative_to(ROOT)}: {'differs from benchmarks/results' if check else 'written'}")
            if not check:
                page.write_text(new, encoding="utf-8")
    for line in sorted(missing):
        print(f"tables left as they are: {line}")
    return int(check and differs)


if __name__ == "__main__":
    sys.exit(main())
