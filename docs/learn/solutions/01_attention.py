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
# # Solutions of chapter 1, attention

# %%
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_models import queries_keys_values
from chapter_tools import cards, load_base, table

from flash_experts.data.packing import encode_cards
from flash_experts.models.flash_attn import flash_attn_func

torch.set_grad_enabled(False)
model, tokenizer = load_base()
D, H, L = model.config.n_embd, model.config.n_head, model.config.n_layer
C = D // H
names = encode_cards(cards("train")[:100], tokenizer)
of_names = [queries_keys_values(model, torch.tensor([name.ids[:-1]])) for name in names]

# %% [markdown]
# ## 1. Sharper and softer
#
# Towards scale 0 all scores become equal: the output is the plain mean of the values that a query sees. Towards a very
# large scale the softmax becomes a maximum: the output is the value of the one key that scores best.

# %%


def moved(out: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
    """Length of the difference over the usual length, mean over tokens, by head: (H,)."""
    return ((out - usual).norm(dim=-1) / usual.norm(dim=-1)).mean((0, 1))


rows = []
for factor in (1e-6, 0.5, 1.0, 2.0, 8.0, 1000.0):
    cells = []
    for block in range(L):
        q, k, v = of_names[0][block]
        usual = flash_attn_func(q, k, v, causal=True)
        out = flash_attn_func(q, k, v, causal=True, softmax_scale=factor / C**0.5)
        cells.append(f"{moved(out, usual).mean():.2f}")
    rows.append([f"{factor:g}", *cells])
table(["factor of the scale", *(f"block {block}" for block in range(L))], rows)

q, k, v = of_names[0][0]
S = q.shape[1]
means = v.cumsum(1) / torch.arange(1, S + 1)[None, :, None, None]
at_zero = flash_attn_func(q, k, v, causal=True, softmax_scale=1e-6)
print(f"scale 1e-6 against the running mean of the values: {(at_zero - means).abs().max():.1e}")
holds("towards scale 0 the output is the running mean of the values", (at_zero - means).abs().max() < 1e-3)
scores = torch.einsum("bihc,bjhc->bhij", q, k).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf)
best = scores.argmax(-1)  # (1, H, S)
best_values = v.transpose(1, 2).gather(2, best[..., None].expand(-1, -1, -1, C)).transpose(1, 2)
at_infinity = flash_attn_func(q, k, v, causal=True, softmax_scale=1000.0)
print(f"scale 1000 against the best key's value:           {(at_infinity - best_values).abs().max():.1e}")
holds("at a large scale it is the best key's value, up to near ties", (at_infinity - best_values).abs().mean() < 1e-2)

# %% [markdown]
# ## 2. How far back?
#
# Measured on the names' own tokens, with their prompts before them.

# %%


def needed_window(block: int, head: int) -> int:
    """Smallest number of earlier keys at which the head's output moves by less than a fifth, over 20 names."""
    for window in range(32):
        differences = []
        for name, qkv in zip(names[:20], of_names[:20], strict=True):
            q, k, v = (x[:, :, head : head + 1] for x in qkv[block])
            usual = flash_attn_func(q, k, v, causal=True)
            out = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
            own = slice(name.prompt_length, None)
            differences.append(moved(out[:, own], usual[:, own]))
        if torch.stack(differences).mean() < 0.2:
            return window
    return 32


windows = [[needed_window(block, head) for head in range(H)] for block in range(L)]
table(
    ["", *(f"head {head}" for head in range(H))],
    [[f"block {block}", *of_heads] for block, of_heads in enumerate(windows)],
)
all_windows = sorted(window for of_heads in windows for window in of_heads)
own_tokens = sum(name.num_inputs - name.prompt_length for name in names[:20]) / 20
print(
    f"a name has {own_tokens:.1f} tokens of its own on average; heads with a smaller window: {sum(window < own_tokens for window in all_windows)} of {H * L}"
)
holds("most heads need a window that reaches into the prompt", all_windows[len(all_windows) // 2] > own_tokens)

# %% [markdown]
# A head that is local would need a small number. Even a head that looks one back at many tokens takes a little from the
# attributes, and a window cuts that off.
#
# ## 3. Find the head that looks one back

# %%
before, prompt = torch.zeros(L, H), torch.zeros(L, H)
for name, qkv in zip(names, of_names, strict=True):
    for block, (q, k, _) in enumerate(qkv):
        S = q.shape[1]
        scores_HSS = torch.einsum("ihc,jhc->hij", q[0], k[0]) / C**0.5
        weights_HSS = scores_HSS.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        place = torch.arange(name.prompt_length, S)  # the name's own tokens
        before[block] += weights_HSS[:, place, place - 1].mean(-1) / len(names)
        prompt[block] += weights_HSS[:, place, 1 : name.prompt_length].sum(-1).mean(-1) / len(names)
for title, weights in (("the token before", before), ("the prompt, without the BOS token", prompt)):
    print(f"mean weight on {title}:")
    table(
        ["", *(f"head {head}" for head in range(H))],
        [[f"block {block}", *(f"{weights[block, head]:.2f}" for head in range(H))] for block in range(L)],
    )
    block, head = divmod(int(weights.argmax()), H)
    print(f"most: block {block}, head {head}\n")

holds("no head of this model is a pure previous-token head: none has half of its weight there", before.max() < 0.5)
holds("some head reads the prompt with most of its weight", prompt.max() > 0.5)

# %% [markdown]
# As the chapter's picture shows, a head looks one back at some tokens and elsewhere at others.
#
# ## 4. The cache of a large model

# %%
texts, length, blocks, heads, width, bytes_each = 64, 1024, 12, 12, 64, 2


def cache_bytes(kv_heads: int) -> int:
    return 2 * texts * length * blocks * kv_heads * width * bytes_each  # k and v


for kv_heads in (12, 2):
    print(f"{kv_heads:2} key/value heads: {cache_bytes(kv_heads) / 2**30:.2f} GiB")

q, k, v = torch.randn(1, 50, 12, 64), torch.randn(1, 50, 2, 64), torch.randn(1, 50, 2, 64)
grouped = flash_attn_func(q, k, v, causal=True)
repeated = flash_attn_func(q, k.repeat_interleave(6, dim=2), v.repeat_interleave(6, dim=2), causal=True)
print(f"query head h uses key/value head h // 6: difference {(grouped - repeated).abs().max():.1e}")
holds(
    "query head h uses key/value head h // 6, and the cache is a sixth",
    torch.allclose(grouped, repeated, atol=1e-6) and cache_bytes(12) == 6 * cache_bytes(2),
)
