"""Names for particular cards, given their type, colors and mana value; two models compared; cleaning and formatting.

python examples/generate_mtg_names.py                     # your newest run under models/, else models/mtg-names
python examples/generate_mtg_names.py models/my-run --base models/mtg-base --count 5
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from generate_names import MODELS, find_model, make_parser, print_columns

# Arguments of `generate`: any part of a type line, colors as letters of mana costs, and a mana value.
CARDS = (
    {"type_line": "Legendary Creature — Goblin", "colors": "R", "mana_value": 3},
    {"type_line": "Creature — Angel", "colors": "W"},
    {"type_line": "Instant", "colors": "U", "mana_value": 1},
    {"type_line": "Sorcery", "colors": "B"},
    {"type_line": "Enchantment", "colors": "GW"},
    {"type_line": "Artifact — Equipment"},
    {"type_line": "Land"},
)
MESSY = " wrath  Of the reef ,tide-caller "


def base_of(model: str) -> str:
    """The model that a run was fine-tuned from, according to its run.json; else the released base."""
    path, root = Path(model) / "run.json", MODELS.parent
    origin = json.loads(path.read_text("utf-8")).get("origin", {}) if path.is_file() else {}
    base = origin.get("base") or "models/mtg-base"
    if base.startswith("models/") and not (root / base).exists():
        base = "models/mtg-base"  # the released models' own start is not in the repository
    return str(root / base) if (root / base).exists() else base


def raw_sample(generator, type_line: str, colors: str, seed: int) -> str:
    """A sample given the prompt of a card: transformers' `generate`, without our filters."""
    import torch

    from flash_experts.data.prompts import Attributes

    tokenizer, model = generator.tokenizer, generator.model
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(Attributes.parse(type_line, colors, None).prompt())]
    torch.manual_seed(seed)
    inputs = torch.tensor([prompt], device=model.device)
    ids = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=True, max_new_tokens=24)
    return tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def main() -> None:
    parser = make_parser("Names for particular cards, two models compared, cleaning and formatting.")
    parser.add_argument("--base", help="model to compare with (default: the one that was fine-tuned)")
    options = parser.parse_args()
    source = find_model(options.model)
    base_source = options.base or base_of(source)
    from flash_experts import NameGenerator
    from flash_experts.data.names import shown_form
    from flash_experts.generation.text_rules import format_name

    def names(generator: NameGenerator, count: int, **settings: object) -> list[str]:
        return [name.text for name in generator.generate(count, **settings, seed=options.seed)]

    try:
        model, base = NameGenerator.from_pretrained(source), NameGenerator.from_pretrained(base_source)
        print("\n== Names for cards")
        for card in CARDS:
            print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in card.items()))
            print(textwrap.indent(textwrap.fill("; ".join(names(model, options.count, **card)), 105), "    "), "\n")

        print("== Sampling settings: a red Goblin, the same seed")
        temperatures = {
            f"temperature {value}": names(model, 6, **CARDS[0], temperature=value) for value in (0.5, 1, 1.5)
        }
        print_columns(temperatures | {"top-k 5": names(model, 6, **CARDS[0], top_k=5)})

        print(f"== Two models, the same prompts and seed; base: {base_source}")
        for card in CARDS[:3]:
            print(card["type_line"])
            print_columns({"fine-tuned": names(model, 5, **card), "base": names(base, 5, **card)})

        print("== Cleaning (Unicode, spaces) and formatting (capitals, commas): a raw sample, and a messy text")
        raw = [raw_sample(model, "Creature — Angel", "W", options.seed), MESSY]
        cleaned, formatted = [shown_form(text) for text in raw], [format_name(text) for text in raw]
        print_columns({"raw": list(map(repr, raw)), "cleaned": list(map(repr, cleaned)), "formatted": formatted})
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
