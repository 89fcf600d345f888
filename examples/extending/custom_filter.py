"""A custom token filter (logits processor) with two methods.

python examples/extending/custom_filter.py [MODEL]

`rule(name)` returns the state of a name, None if any token may follow. It is called once per row and step, so keep it
fast. `forbidden(rule)` returns the tokens that must not follow in that state; its result is cached.
A filter sees text, not token ids, because one text has many tokenizations.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from flash_experts import NameGenerator
from flash_experts.generation import NameFilter, NameVocabulary

BASE = Path(__file__).resolve().parents[2] / "models/mtg-base"


class NoLetterE(NameFilter):
    """A lipogram: names without an "e". One state is enough."""

    def rule(self, name: str) -> str:
        return "no e"

    def forbidden(self, rule: object) -> torch.Tensor:
        return self.vocabulary.where(lambda text: "e" in text.lower())


class FewConsonants(NameFilter):
    """At most ``most`` consonants in a row. The state is the number of consonants at the end of the name."""

    CONSONANTS = re.compile(r"[b-df-hj-np-tv-xz]*", re.IGNORECASE)

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, most: int = 2) -> None:
        super().__init__(vocabulary, prompt_length)
        self.most = most

    def rule(self, name: str) -> int:
        return len(self.CONSONANTS.match(name[::-1])[0])

    def forbidden(self, rule: int) -> torch.Tensor:
        # The trailing consonants of the name count, too: prepend as many to the token.
        return self.vocabulary.where(lambda text: max(map(len, self.CONSONANTS.findall("b" * rule + text))) > self.most)


def main() -> None:
    generator = NameGenerator.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else BASE)
    card = {"type_line": "Creature — Elf", "colors": "G", "seed": 7}
    for own in (NoLetterE, FewConsonants):
        # The class itself is the factory: it is called with the vocabulary and the length of the prompt.
        names = generator.generate(8, **card, filters=[own])
        print(f"{own.__name__}: " + "; ".join(name.text for name in names))

    # A filter is a transformers LogitsProcessor, so it works in plain `model.generate` too.
    prompt = torch.tensor([[generator.tokenizer.bos_token_id, *generator.vocabulary.encode("Creature Elf, green:")]])
    torch.manual_seed(7)
    rows = generator.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=[NoLetterE(generator.vocabulary, prompt.shape[1])],
        do_sample=True,
        max_new_tokens=12,
        num_return_sequences=3,
    )
    # Bytes that are not a whole character become a replacement character: no filter forbids them here.
    texts = generator.tokenizer.batch_decode(rows[:, prompt.shape[1] :], skip_special_tokens=True)
    print("model.generate: " + "; ".join(name.strip() for name in texts))


if __name__ == "__main__":
    main()
