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
# # Solutions of chapter 6b, KV cache and continuous batching

# %%
import copy
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_decoding import names_by_hand, refilled, static
from chapter_models import bits_per_character, mean_and_error, nats_of_names
from chapter_tools import cards, load_base, load_released, table

from flash_experts.data.prompts import Attributes
from flash_experts.generation import Sampling
from flash_experts.generation.decoding import Prompts
from flash_experts.generation.filters.base import NameVocabulary

torch.set_grad_enabled(False)
model, tokenizer = load_released()
base, _ = load_base()
vocabulary = NameVocabulary(tokenizer, model.config.vocab_size)
prompt_text = Attributes.parse("Legendary Creature — Goblin", "R", 3).prompt()
prompt_ids = [tokenizer.bos_token_id, *vocabulary.encode(prompt_text)]
EOS, SEED, prompts = vocabulary.eos_id, 5, Prompts(model, [prompt_ids])
names = names_by_hand(prompts, 192, 64, Sampling(), EOS, SEED)
draws = [len(ids) + 1 for ids in names]

# %% [markdown]
# ## 1. Sorted lengths

# %%
rows, steps = [], {}
for slots in (8, 64):
    ways = {"static": static(draws, slots), "refilled": refilled(draws, slots)}
    ways["static, sorted by length"] = static(sorted(draws), slots)
    steps[slots] = {way: len(schedule) for way, schedule in ways.items()}
    least = -(-sum(draws) // slots)
    rows.append([slots, *steps[slots].values(), least])
table(["slots", *steps[8], "tokens over slots"], rows)
fewer = all(each["static, sorted by length"] < each["static"] for each in steps.values())
holds("sorted batches need fewer steps than unsorted ones", fewer)
most = max(steps[8]["refilled"], steps[8]["static, sorted by length"])
holds("with 8 slots refilling and sorting are within a tenth of the least", most < 1.1 * sum(draws) / 8)
apart = abs(steps[64]["refilled"] - steps[64]["static, sorted by length"])
holds("with 64 slots refilling and sorting are at most three steps apart", apart <= 3)

# %% [markdown]
# Sorting comes near the least possible number. But a name's length is known when its EOS token is drawn, that is at its end. Training
# knows its lengths, and packs by them (chapter 5). Prompts have known lengths, too: `Prompts.of` computes those of equal length
# together. With 64 slots and three names for each, both are further from the least: for refilling that is the end, where a few
# long names keep a nearly empty batch alive.
#
# ## 2. One head of keys and values


# %%
def with_one_head(layers: list[int]) -> torch.nn.Module:
    """The released model with the mean head of keys and of values in place of each, in these layers."""
    changed = copy.deepcopy(model)
    D, H = changed.config.n_embd, changed.config.n_head
    for layer in layers:
        projection = changed.transformer.h[layer].attn.c_attn
        for part in (projection.weight[:, D:], projection.bias[None, D:]):  # keys, then values
            heads = part.view(len(part), 2, H, D // H)
            heads.copy_(heads.mean(2, keepdim=True).expand_as(heads))
    return changed


L, H = model.config.n_layer, model.config.n_head
some = cards("validation")[:300]
before = nats_of_names(model, some, tokenizer)
rows, more = [["none", "1.00", f"{bits_per_character(before, some):.3f}", ""]], {}
for layers in (*([layer] for layer in range(L)), list(range(L))):
    title = f"layer {layers[0]}" if len(layers) == 1 else "all layers"
    after = nats_of_names(with_one_head(layers), some, tokenizer)
    more[title], error = mean_and_error(after - before)
    cache = 1 - (1 - 1 / H) * len(layers) / L
    bits = f"{bits_per_character(after, some):.3f}"
    rows.append([title, f"{cache:.2f}", bits, f"{more[title]:+.2f} ± {error:.2f}"])
table(["one head in", "cache", "bits per character", "nats a name more"], rows)
all_layers = more.pop("all layers")
holds("every layer alone costs something", min(more.values()) > 0)
holds("all layers together cost more than twice what the worst one does", all_layers > 2 * max(more.values()))

# %% [markdown]
# Heads of a trained model are different, and their mean is none of them. [Ainslie et al. 2023](https://arxiv.org/abs/2305.13245) start from such means as
# well, and train on for 5% of the original steps. A model that is meant to have few heads of keys is best trained with them.
#
# ## 3. A ring that is too short

# %%
short = names_by_hand(prompts, 96, 64, Sampling(), EOS, SEED, columns=4)
same = [a == b for a, b in zip(short, names, strict=False)]
counts = {}
for good, ids in zip(same, names, strict=False):
    counts.setdefault(len(ids), []).append(good)
table(["tokens", "names", "unchanged with 4 columns"], [[n, len(counts[n]), sum(counts[n])] for n in sorted(counts)])
fits = [good for good, ids in zip(same, names, strict=False) if len(ids) <= 4]
holds("names of up to 4 tokens are the same", all(fits))
begins = all(a[:5] == b[:5] for a, b in zip(short, names, strict=False))
holds("and so are the first 5 tokens of all names: the fifth still sees all four before it", begins)
holds("some longer ones change", not all(same))
for ids, other in [(a, b) for a, b in zip(names, short, strict=False) if a != b][:3]:
    print(f"  {vocabulary.decode(ids).strip()} | {vocabulary.decode(other).strip()}")

# %% [markdown]
# That is sliding window attention: each row sees its prompt and its own last 4 tokens. The prompt's columns are never overwritten, as the
# attention sinks of [Xiao et al. 2023](https://arxiv.org/abs/2309.17453). Positions still count all tokens.
#
# ## 4. Several tokens in one step


# %%
def likeliest(of: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    """The likeliest next tokens, one after the other, up to the EOS token."""
    found: list[int] = []
    while len(found) < count and found[-1:] != [EOS]:
        found.append(int(of(torch.tensor([[*ids, *found]]), logits_to_keep=1).logits[0, -1].argmax()))
    return found


def checked(ids: list[int], guess: int) -> tuple[list[int], int, int]:
    """The released model's likeliest name with guesses of the base model, and the passes of both."""
    found: list[int] = []
    passes = drafted = 0
    while found[-1:] != [EOS]:
        draft = likeliest(base, [*ids, *found], guess)
        logits = model(torch.tensor([[*ids, *found, *draft]]), logits_to_keep=len(draft) + 1).logits[0]
        best, passes, drafted = logits.argmax(-1).tolist(), passes + 1, drafted + len(draft)
        right = next((n for n, token in enumerate(draft) if token != best[n]), len(draft))
        found += best[: right + 1]  # what was guessed right, and the model's own next token
        if EOS in found:
            found = found[: found.index(EOS) + 1]
    return found, passes, drafted


tokens = passes = drafted = 0
equal = True
for card in some[::15]:
    ids = [tokenizer.bos_token_id, *vocabulary.encode(Attributes.of(card).prompt())]
    name, passes_of_name, drafted_of_name = checked(ids, 4)
    equal &= name == likeliest(model, ids, 40)
    tokens, passes, drafted = tokens + len(name), passes + passes_of_name, drafted + drafted_of_name
print(
    f"{tokens} tokens in {passes} passes of the released model, {tokens / passes:.2f} a pass, and {drafted} of the base"
)
size, size_of_base = (sum(p.numel() for p in each.parameters()) for each in (model, base))
read, alone = passes * size + drafted * size_of_base, tokens * size
print(f"weights read: {read / alone:.2f} times those of the released model alone")
holds("the names are those of the released model alone", equal)
holds("more than two tokens a pass, fewer than five", 2 < tokens / passes < 5)
holds(
    "but with the base's passes most of the saving is gone: over three quarters of the weights are read",
    read > 0.75 * alone,
)

# %% [markdown]
# A checking pass reads the weights once for up to five tokens, as prefill does, so the released model needs far fewer passes. The names stay its
# own, whatever the base guesses. For draws instead of the likeliest token the paper has a rule of acceptance that keeps the
# distribution. A draft model has to be much smaller than the model, and the base is nearly as large. And the
# other tokens of a pass cost little only while it is memory-bound: 64 slots of five tokens are 320 rows.
