"""How often one gets what one asks for: a model's names as they come, and the fittest of several.

    python benchmarks/control.py models/mtg-names [--best-of 1 4 8 16] [--cards 1482] [--out results.json]

The judges of `flash-experts evaluate` (`flash_experts.evaluation.control`) read names for held-out cards, of which all
is told, and names for one attribute alone. Both they and the choice of the fittest (`generate --best-by fit`) have read
the names of the training cards and no others, and are of different kinds: support vector machines there, naive Bayes
here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flash_experts.data.prepare import load_split
from flash_experts.data.prompts import NONE, Attributes
from flash_experts.evaluation.control import ControlJudge
from flash_experts.evaluation.scorers import LanguageModel
from flash_experts.generation.attribute_fit import AttributeJudge


@dataclass(frozen=True, slots=True)
class FittestOf:
    """A model of whose names, ``best_of`` for each that is asked for, the fittest is taken."""

    model: LanguageModel
    judge: AttributeJudge
    best_of: int

    def sample(self, count: int, seed: int, attributes: Attributes = NONE) -> list[str]:
        return self.sample_each([attributes] * count, seed)

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        drawn = zip(
            *(self.model.sample_each(attributes, seed * 1000 + one) for one in range(self.best_of)), strict=True
        )
        evidence = {asked: self.judge.evidence(asked) for asked in set(attributes)}
        return [names[int(evidence[asked](names).argmax())] for names, asked in zip(drawn, attributes, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--data", type=Path, default=Path("data/mtg"))
    parser.add_argument("--best-of", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--cards", type=int, default=1482, help="held-out cards")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    train, held_out = load_split(args.data, "train"), load_split(args.data, "test_iid")
    model, fit, judge = LanguageModel.load(args.model), AttributeJudge(train), ControlJudge(train, held_out)
    results = {}
    for best_of in args.best_of:
        figures = judge.judge(FittestOf(model, fit, best_of), 2 * args.cards, 0)
        results[best_of] = [asdict(one) for one in figures]
        shares = [f"{one.task} {one.model.plain.value:.1%} (real {one.real.plain.value:.1%})" for one in figures]
        print(f"fittest of {best_of}: {', '.join(shares)}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
