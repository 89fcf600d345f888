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
# # 1. Attention
#
# **The question: when a model writes the next piece of a card's name, what does it look at, and what must it not see?**
#
# GPT-2 reads tokens, pieces of text ([chapter 0](00_data_and_tokens.py)). Its blocks do two things with them: an MLP works
# on each token by itself (chapter 3), and attention carries information from token to token. Nothing else does. So everything
# that the end of a name knows about its beginning, and about the card's type and color, came through attention.
#
# We use the small GPT-2 of this repository (`models/mtg-base`) and a real card. The [glossary](../glossary.md#attention)
# has the terms of the field. Lines that begin with `[holds]` are sentences of this text that the run has checked.

# %%
import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_models import queries_keys_values
from chapter_tools import cards, load_base, quote, show, table, token_texts
from matplotlib.colors import PowerNorm

from flash_experts.data.packing import encode_cards, pack
from flash_experts.models.attention_backends import attention_backend
from flash_experts.models.flash_attention import fe_attention_forward
from flash_experts.models.flash_attn import flash_attn_func, flash_attn_with_kvcache

torch.set_grad_enabled(False)
model, tokenizer = load_base()
train_cards = cards("train")
krenko = next(card for card in train_cards if card.name == "Krenko, Mob Boss")
encoded = encode_cards([krenko], tokenizer)[0]
texts = token_texts(encoded, tokenizer)
size = model.config
print(f"{size.n_layer} blocks, {size.n_head} heads, width {size.n_embd}, {size.vocab_size:,} tokens in the vocabulary")
print(krenko.type_line, krenko.colors, krenko.mana_value)
print(texts)

# %% [markdown]
# The card's attributes come first, as a prompt. The name follows. The first token is the BOS token: it only marks the beginning.
#
# ## The picture first
#
# Each row is a token that looks, each column a token that it looks at. A dark cell is a large weight. Each row sums to 1.

# %%
D, H = model.config.n_embd, model.config.n_head
C = D // H
ids = torch.tensor([encoded.ids[:-1]])
S = ids.shape[1]
of_blocks = queries_keys_values(model, ids)  # caught by a hook on the model's own projection


def weights_of(block: int) -> torch.Tensor:
    """(H, S, S): how much each token (row) takes from each token (column). The next section explains each step."""
    q_SHC, k_SHC, _ = (x[0] for x in of_blocks[block])
    scores_HSS = torch.einsum("ihc,jhc->hij", q_SHC, k_SHC) / C**0.5
    later_SS = torch.ones(S, S, dtype=torch.bool).triu(1)
    return scores_HSS.masked_fill(later_SS, -torch.inf).softmax(-1)


P = encoded.prompt_length
all_KHSS = torch.stack([weights_of(block) for block in range(size.n_layer)])
of_name_KHSS = all_KHSS[:, :, P:]  # rows of the name
habits = {
    "itself": all_KHSS.diagonal(0, 2, 3)[:, :, P:].mean(-1),
    "the piece before": all_KHSS.diagonal(-1, 2, 3)[:, :, P - 1 :].mean(-1),
    "the attributes": of_name_KHSS[..., 1:P].sum(-1).mean(-1),
}
figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True)
for axis, (title, share_KH) in zip(axes, habits.items(), strict=True):
    block, head = divmod(int(share_KH.argmax()), H)
    title = f"{title} ({share_KH.max():.0%} on average)"
    drawn = axis.imshow(weights_of(block)[head], cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # shows small weights too
    axis.set_xticks(range(S), texts, rotation=90)
    axis.set_yticks(range(S), texts)
    axis.axhline(encoded.prompt_length - 0.5, color="tab:red", linewidth=0.8)
    axis.set_title(f"block {block}, head {head}: {title}", size=8.5)
    axis.set_xlabel("key: the token that is looked at")
axes[0].set_ylabel("query: the token that looks\n(under the line: the name)")
figure.colorbar(drawn, ax=axes, label="weight (colors by its square root)", fraction=0.02)
show(figure, "01_weights")
holds("in the upper right there is nothing: no token looks at a later one", (all_KHSS.triu(1) == 0).all())
heads = {title: int(share_KH.argmax()) for title, share_KH in habits.items()}
holds(
    "three different heads look most at the token itself, the piece before, the attributes", len({*heads.values()}) == 3
)
of_bos = of_name_KHSS[..., 0].mean(-1).max()
equal_share = (1 / torch.arange(P + 1, S + 1)).mean()
print(f"the head that looks most at the BOS token gives it {of_bos:.0%}; an equal share would be {equal_share:.0%}")
holds("some head gives the BOS token twice an equal share and more", of_bos > 2 * equal_share)

# %% [markdown]
# Of all heads we show those that, in the rows of the name, look most at the token itself, at the piece before, and at the
# card's attributes. Others put much weight on the BOS token, an attention sink: a softmax has to put its weight somewhere
# ([Xiao et al. 2023](https://arxiv.org/abs/2309.17453)). No loss made heads differ; they became different in training.
#
# ## The formula, with shapes
#
# For one head, S tokens, width C of a head:
#
# $$ \text{out} = \text{softmax}\left(\frac{q\,k^\top}{\sqrt{C}} + \text{mask}\right) v $$
#
# | | shape | meaning |
# | --- | --- | --- |
# | q | (S, C) | what each token asks for |
# | k | (S, C) | what each token offers to be found by |
# | v | (S, C) | what each token contributes to those that look at it |
# | scores | (S, S) | how well each query matches each key |
# | mask | (S, S) | 0 where a token may look, minus infinity where not |
# | weights | (S, S) | the scores as shares: each row sums to 1 |
# | out | (S, C) | for each token the weighted mean of the values |
#
# The H heads do this in parallel. One matmul makes q, k and v of all heads from the block's input.

# %%
block, head = divmod(heads["the piece before"], H)  # the head in the middle of the picture
q, k, v = of_blocks[block]
print("q, k, v:", tuple(q.shape), "= (batch, tokens S, heads H, width C)")

# %% [markdown]
# **Step 1: scores.** A score is a dot product of C terms, so its standard deviation grows with the root of C. Dividing by that
# root takes the growth out. Without it the softmax puts far more of its weight on one token.

# %%
q_SC, k_SC, v_SC = (x[0, :, head] for x in (q, k, v))
raw_SS = q_SC @ k_SC.T
scores_SS = raw_SS / C**0.5
visible_SS = torch.ones(S, S, dtype=torch.bool).tril()
raw_HSS, largest = torch.einsum("ihc,jhc->hij", q[0], k[0]), []
for label, each_HSS in (("q k^T", raw_HSS), ("q k^T / sqrt(C)", raw_HSS / C**0.5)):
    weights_HSS = each_HSS.masked_fill(~visible_SS, -torch.inf).softmax(-1)
    largest.append(weights_HSS[:, encoded.prompt_length :].amax(-1).mean())  # over the rows of the name, in all heads
    spread = each_HSS[:, visible_SS].std()
    print(f"{label:16} standard deviation of the scores {spread:5.2f}, largest weight of a row {largest[-1]:.2f}")
holds("without the root of C the largest weight of a row is much larger", largest[0] > 1.2 * largest[1])

# %% [markdown]
# **Step 2: the mask.** Training asks for the next token at every place at once. A token that saw the next one would
# only have to copy it. So a query sees no later key: their scores become minus infinity, and exp(-inf) is 0.
#
# **Step 3: softmax.** `weight = exp(score) / sum of exp(score)` over the row.

# %%
weights_SS = scores_SS.masked_fill(~visible_SS, -torch.inf).softmax(-1)
print("rows sum to", weights_SS.sum(-1).unique().tolist())
print("largest weight on a later token:", weights_SS[~visible_SS].max().item())
sum_to_1 = torch.allclose(weights_SS.sum(-1), torch.ones(S), atol=1e-5)
holds("rows sum to 1, and later tokens get exactly 0", sum_to_1 and not weights_SS[~visible_SS].any())
row = S - 2
print(f"{texts[row]!r} looks at:")
best = weights_SS[row].topk(4)
table(
    ["token", "score", "weight"], [[texts[j], f"{scores_SS[row, j]:.2f}", f"{weights_SS[row, j]:.3f}"] for j in best[1]]
)

# %% [markdown]
# **Step 4: the weighted mean of the values.** That completes the formula. The package's `flash_attn_func` computes the same for all
# heads, and picks a kernel for the machine. Here is the result by hand against three of its backends:

# %%
by_hand_SC = weights_SS @ v_SC
rows, differences = [], []
for backend in ("sdpa", "reference", "auto"):
    with attention_backend(backend):
        out = flash_attn_func(q, k, v, causal=True)
    differences.append((out[0, :, head] - by_hand_SC).abs().max().item())
    rows.append([backend, str(tuple(out.shape)), f"{differences[-1]:.1e}"])
table(["backend", "output", "largest difference from by hand"], rows)
holds("all backends compute what we did by hand, up to rounding", max(differences) < 1e-5)

# %% [markdown]
# **Step 5: the output projection.** The outputs of all heads are put next to each other, (S, H C), and one more matmul mixes
# them. That is what attention adds to the block's input (the residual connection).

# %%
attention, caught = model.transformer.h[block].attn, []
hook = attention.register_forward_hook(lambda module, inputs, output: caught.append(output[0]))
model(ids)
hook.remove()
off = (attention.c_proj(out[0].flatten(1)) - caught[0][0]).abs().max()
print(f"heads next to each other, times the output projection, against the block's attention: {off:.1e}")
holds("that is all that the attention of a block does", off < 1e-4)

# %% [markdown]
# GPT-2's blocks do not call `flash_attn_func` themselves. They call the function below, which transformers knows under
# the name `fe_attention`. Read it top to bottom: a packed row, then a mask (padding), then plain causal attention.

# %%
quote(fe_attention_forward)

# %% [markdown]
# ## Many names in one row
#
# A name with its prompt has some 10 to 20 tokens. To use a machine well we want thousands at once. The usual way is a
# rectangle with one name per line, filled up with padding to the longest. The model computes the padding for nothing.
#
# We put names one after the other in a single row instead: a packed row. `position_ids` begin at 0 in each name: they choose the
# learned vector that GPT-2 adds to a token's own for its place in the text. `cu_seq_lens` ("cumulative sequence lengths") has the
# places where names begin in the row.

# %%
some = train_cards[100:164]
packed = pack(encode_cards(some, tokenizer))
padded_tokens = packed.num_names * packed.max_length
print("position_ids begin", packed.position_ids[0, :30].tolist())
print("cu_seq_lens begin ", packed.cu_seq_lens[:6].tolist())
print(f"{packed.num_names} names: {packed.num_tokens} tokens packed, {padded_tokens} with padding to the longest")
mean_tokens = packed.num_tokens / packed.num_names
print(f"{mean_tokens:.1f} tokens a name, {1 - packed.num_tokens / padded_tokens:.0%} of the rectangle is padding")
holds("a name with its prompt has some 10 to 20 tokens", 10 <= mean_tokens <= 20)
holds("over a fifth of the rectangle is padding", packed.num_tokens < 0.8 * padded_tokens)

# %% [markdown]
# But now a causal mask is not enough: the second name comes after the first and would look at it. The attention must
# keep them apart. `flash_attn_varlen_func` takes the boundaries and does so without any mask of size T x T.
# The picture: what 4 packed names may see.

# %%
four = pack(encode_cards(some[:4], tokenizer))
T = four.num_tokens
document_T = torch.repeat_interleave(torch.arange(4), four.cu_seq_lens.diff())
causal_TT = torch.ones(T, T).tril()
figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.6))
axes[0].imshow(causal_TT, cmap="Blues", vmax=1.6)
axes[0].set_title("causal only: names see the names before them")
axes[1].imshow(causal_TT * (document_T[:, None] == document_T), cmap="Blues", vmax=1.6)
axes[1].set_title("with boundaries: each name sees itself")
for axis in axes:
    axis.set(xlabel="key: place in the packed row", ylabel="query: place in the packed row")
show(figure, "01_packed")

# %% [markdown]
# **Are names kept apart?** Two tests answer that with numbers. First: the logits of the packed row must equal those of the names one
# by one. Second: we change a token of the first name. If the logits of the *other* names move, information leaks.

# %%
together_LV = model(**packed.inputs).logits[0]
alone_LV = torch.cat([model(**pack([name]).inputs).logits[0] for name in encode_cards(some, tokenizer)])
print(f"packed against one by one: largest difference of logits {(together_LV - alone_LV).abs().max():.1e}")
holds("the packed row equals the names one by one, up to rounding", (together_LV - alone_LV).abs().max() < 1e-3)


def leak(cu_seq_lens: torch.Tensor) -> float:
    """How far the logits of all names but the first move when a token of the first is changed."""
    inputs = packed.inputs | {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
    inputs |= {"max_length_q": int(cu_seq_lens.diff().max()), "max_length_k": int(cu_seq_lens.diff().max())}
    changed = packed.input_ids.clone()
    changed[0, 3] = (changed[0, 3] + 100) % model.config.vocab_size
    moved_LV = model(**(inputs | {"input_ids": changed})).logits[0] - model(**inputs).logits[0]
    return moved_LV[packed.name_index > 0].abs().max().item()


one_document = torch.tensor([0, packed.num_tokens], dtype=torch.int32)
apart, together = leak(packed.cu_seq_lens), leak(one_document)
print(f"with boundaries:    other names' logits move by {apart:g}")
print(f"without boundaries: other names' logits move by {together:.3g}")
holds("with boundaries other names' logits do not move at all; without them they do", apart == 0 < together)

# %% [markdown]
# ## An experiment that changes one thing
#
# What does the leak cost? We take the same trained model, the same names and the same positions, and remove only the boundaries.

# %%


def nats_per_token(cu_seq_lens: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each name's tokens, (N,)."""
    longest = int(cu_seq_lens.diff().max())
    logits_LV = model(
        **(packed.inputs | {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens, "max_length_q": longest})
    ).logits[0]
    nats_L = torch.nn.functional.cross_entropy(logits_LV, packed.labels, reduction="none")
    sums_N = torch.zeros(packed.num_names).index_add_(0, packed.name_index, nats_L)
    return sums_N / torch.bincount(packed.name_index)


apart_N, leaking_N = nats_per_token(packed.cu_seq_lens), nats_per_token(one_document)
print(f"each name sees itself alone: {apart_N.mean():.2f} nats per token")
print(f"names see those before them: {leaking_N.mean():.2f} nats per token")
print(f"names that got harder to predict: {(leaking_N > apart_N).float().mean():.0%}")
holds(
    "tokens of other names are noise to this model: most names get harder", (leaking_N > apart_N).float().mean() > 0.6
)

# %% [markdown]
# The model was trained with boundaries, so tokens of other names are noise to it. A model that is *trained* with the leak could
# learn to use them, and would then lack them when it writes a single name. (This chapter does not measure that.)
#
# ## Writing token by token: the KV cache
#
# To write, the model predicts one token, appends it, and predicts the next. Old keys and values never change, because
# no token looks at a later one. So they are kept (the KV cache), and each step computes q, k, v of one token only.

# %%
cache = None
for step in range(S):
    out = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
    cache = out.past_key_values
full_SV = model(ids).logits[0]
print(f"last logits, with cache against all at once: {(out.logits[0, -1] - full_SV[-1]).abs().max():.1e}")
holds("the cache changes nothing but rounding", (out.logits[0, -1] - full_SV[-1]).abs().max() < 1e-3)
print(f"tokens computed to write {S}: {S} with the cache, {S * (S + 1) // 2} without")
held = 2 * model.config.n_layer * S * D * 4
print(f"the cache holds k and v of {model.config.n_layer} blocks: {held:,} bytes for one name (float32)")

# %% [markdown]
# The functional form of the same: `flash_attn_with_kvcache` writes the new key and value into the cache, in place, and
# lets the new query look at all of it. One query against S keys needs no mask: it is the last one.

# %%
k_cache, v_cache = torch.zeros(2, 1, 64, H, C)  # room for 64 tokens
k_cache[:, : S - 1], v_cache[:, : S - 1] = k[:, :-1], v[:, :-1]
last = flash_attn_with_kvcache(q[:, -1:], k_cache, v_cache, k[:, -1:], v[:, -1:], cache_seqlens=S - 1, causal=True)
full = flash_attn_func(q, k, v, causal=True)
print(f"last token's attention, cache against full: {(last[:, 0] - full[:, -1]).abs().max():.1e}")
holds(
    "one query against the cache is the last row of the full attention",
    torch.allclose(last[:, 0], full[:, -1], atol=1e-5),
)

# %% [markdown]
# ## What to remember
#
# - A weight is a share: softmax over the keys that a query may see. The output is a mean of values.
# - The mask is what makes one forward train all places at once, and what makes a cache possible.
# - Packed names need boundaries. The test is a number: change one name, the others' logits must not move at all.
# - The weights are an S x S matrix. Chapter 2 is about never storing it.
#
# ## Exercises
#
# 1. **Sharper and softer.** Multiply the scale of the scores by 0.5, 2 and 8 (`softmax_scale`), and see by how much the
#    output of each block's attention moves. Predict first: where does the output go as the scale goes to 0? And when it
#    grows without end?
# 2. **How far back?** With `window_size=(w, 0)` a query sees itself and w keys before it. For each head, find the
#    smallest w at which its output at the name's own tokens moves by less than 20%. Which heads are local?
# 3. **Find the head that looks one back** by a number, not by eye: the mean weight on the token before, over 100 names,
#    for every block and head. Then find the heads that read the prompt.
# 4. **The cache of a large model.** GPT-2 small has 12 blocks of width 768 with 12 heads. How many bytes does its cache
#    have for 64 texts of 1,024 tokens in bfloat16? How many if the 12 query heads share 2 key/value heads? Check with
#    `flash_attn_func` that it takes q with 12 heads and k, v with 2, and find out which head uses which.
#
# Solutions: [solutions/01_attention.py](solutions/01_attention.py).
#
# ## Reading
#
# - [Vaswani et al. 2017, Attention Is All You Need](https://arxiv.org/abs/1706.03762): section 3.2 is this chapter's formula.
# - [Krell et al. 2021](https://arxiv.org/abs/2107.02027): packing without leaks, and what it saves.
# - [Ainslie et al. 2023, GQA](https://arxiv.org/abs/2305.13245): fewer heads for keys and values (exercise 4).
# - [Xiao et al. 2023](https://arxiv.org/abs/2309.17453): why heads rest on the first token.
# - Next: [chapter 2](02_flash_attention.py) computes the same without ever storing the matrix.
