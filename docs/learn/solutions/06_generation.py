# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Solutions of chapter 6, generation and token filters

# %%
import sys
import time
from itertools import pairwise
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_tools import load_released, table

from flash_experts import NameGenerator
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Attributes
from flash_experts.generation import PRESETS, NameFilter, Sampling
from flash_experts.generation.sampling import candidates

torch.set_grad_enabled(False)
model, tokenizer = load_released()
generator = NameGenerator(model, tokenizer)
free = NameGenerator(model, tokenizer, known_names=())

# %% [markdown]
# ## 1. Growing words
#
# The state: how long the word before was, and how long the word at the end is so far. A token may finish that word and
# begin others, so its own words count as well. Longer words differ in nothing, so lengths are cut at 12: fewer states.


# %%
class GrowingWords(NameFilter):
    """Each word is longer than the one before."""

    def rule(self, name: str) -> tuple[int, int]:
        _, before, last = ["", "", *name.split(" ")][-3:]
        return min(len(before), 12), min(len(last), 12)

    def forbidden(self, rule: tuple[int, int]) -> torch.Tensor:
        before, last = rule

        def breaks(text: str) -> bool:
            lengths = [len(word) for word in ("x" * last + text).split(" ")]
            finished = [before, *lengths[:-1]]
            return any(second <= first for first, second in pairwise(finished) if first)

        forbidden = self.vocabulary.where(breaks)
        forbidden[self.vocabulary.eos_id] = last <= before
        return forbidden


names = [name.text for name in generator.generate(8, type_line="Dragon", seed=7, min_words=2, filters=[GrowingWords])]
print("; ".join(names))
holds("in each name all words grow", all(len(a) < len(b) for name in names for a, b in pairwise(name.split())))

# %% [markdown]
# ## 2. Tails

# %%
prompt_ids = [tokenizer.bos_token_id, *generator.vocabulary.encode(Attributes.parse("Dragon", None, None).prompt())]
first_1V = model(torch.tensor([prompt_ids])).logits[:, -1]
rows, tokens_left, ratios = [], {"top-p 0.9": [], "min-p 0.1": []}, {"top-p 0.9": [], "min-p 0.1": []}
for temperature in (0.7, 1.0, 1.5):
    for title, sampling in (
        ("top-p 0.9", Sampling(temperature=temperature, top_p=0.9)),
        ("min-p 0.1", Sampling(temperature=temperature, min_p=0.1)),
    ):
        probs_K = candidates(first_1V, sampling)[0][0]
        probs_K = probs_K[probs_K > 0] / probs_K.sum()
        tokens_left[title].append(len(probs_K))
        ratios[title].append((probs_K.min() / probs_K.max()).item())
        cells = len(probs_K), f"{probs_K.min():.1e}", f"{probs_K.min() / probs_K.max():.4f}"
        rows.append([f"{title}, temperature {temperature}", *cells])
table(["", "tokens left", "probability of the least likely", "over the likeliest"], rows)

holds(
    "both let more tokens pass at a higher temperature, min-p fewer than top-p",
    all(counts == sorted(counts) for counts in tokens_left.values())
    and all(a < b for a, b in zip(tokens_left["min-p 0.1"], tokens_left["top-p 0.9"], strict=True)),
)
holds(
    "min-p lets none pass that is more than ten times less likely than the best, top-p does",
    min(ratios["min-p 0.1"]) >= 0.0999 > max(ratios["top-p 0.9"]),
)

# %% [markdown]
# Top-p keeps a fixed mass. A higher temperature moves mass into the tail, and the cut follows it. Min-p keeps a fixed ratio to
# the likeliest token, whatever the temperature. That is the robustness.
#
# ## 3. Best of

# %%
rows, means, different = [], [], []
for best_of in (1, 2, 4, 8):
    started = time.process_time()
    names = generator.generate(24, type_line="Goblin", seed=5, best_of=best_of)
    seconds = time.process_time() - started
    mean = sum(name.score for name in names) / len(names)
    means.append(mean)
    different.append(len({word for name in names for word in name.text.split()}))
    characters = sum(len(name.text) for name in names) / len(names)
    rows.append(
        [
            best_of,
            f"{mean:.2f}",
            f"{seconds:.2f}",
            f"{characters:.1f}",
            different[-1],
            "; ".join(name.text for name in names[:3]),
        ]
    )
table(["best of", "nats a character", "seconds", "characters", "different words", "e.g."], rows)
holds("the more candidates there are, the more varied the words of the list", different[-1] > different[0])

# %% [markdown]
# The time rises with the draws. A word that the list has already costs a candidate score, so the list gains words, and names
# that are less likely on their own are chosen. `Weights` in `flash_experts.generation.reranker` holds the trade.
#
# ## 4. Without the novelty filter

# %%
rows, reals, furthest = [], [], 0.0
for preset in PRESETS:
    texts = [name.text for name in free.generate(300, quality="fast", preset=preset, seed=3)]
    real = sum(normal_form(text) in generator.known.normal_forms for text in texts)
    near = [similarity for _, similarity in generator.known.nearest(texts)]
    close = sum(1 - similarity <= 0.1 for similarity in near) - real
    far = generator.generate(50, quality="fast", preset=preset, seed=3, min_distance=0.3)
    reals.append(real)
    furthest = max(furthest, *(name.similarity for name in far))
    rows.append([preset, real, close, f"{max(name.similarity for name in far):.2f}"])
table(["preset", "real cards of 300", "others within 10%", "highest similarity with min_distance 0.3"], rows)

holds("without the novelty filter some names are real cards", sum(reals) > 0)
holds("with min_distance 0.3 no name is more than 0.7 similar to a card", furthest <= 0.7 + 1e-9)

# %% [markdown]
# The novelty filter forbids what is known and nothing else: one letter more is another name. `min_distance` measures the
# edit distance of finished names to all known ones and drops those that are too near; it cannot be decided token by token,
# so it costs draws.
