"""A custom attention function: sliding-window attention, where each token sees itself and the few before it.

python examples/extending/custom_attention.py

transformers calls the function that is registered under the model's attention name, for every block. It must support
three kinds of input: a packed sequence (`cu_seq_lens_q` has the starts of names), a batch without padding, and one new
token with a KV cache. `flash_attn_func` and `flash_attn_varlen_func` do the work here. To add a *kernel* that the
package's own attention may choose, see `BACKENDS` in `flash_experts.models.attention_backends`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from flash_experts.data.cleaning import clean
from flash_experts.data.packing import encode_cards, name_nats, pack
from flash_experts.data.sources import load_source
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.flash_attention import fe_attention_mask
from flash_experts.models.flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_experts.models.loading import load_dense

BASE = Path(__file__).resolve().parents[2] / "models/mtg-base"
BEFORE = 3  # tokens that a token sees before itself


def near_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """(B, H, S, C) queries, keys and values to (B, S, H, C); no weights are returned."""
    if attention_mask is not None:
        raise ValueError("near_attention takes no padding: pack the names, or give texts of one length")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, S, H, C)
    options = {"dropout_p": dropout, "softmax_scale": scaling, "causal": True, "window_size": (BEFORE, 0)}
    if cu_seq_lens_q is None:
        return flash_attn_func(q, k, v, **options), None
    starts, longest = cu_seq_lens_q, max_length_q
    return flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, longest, longest, **options)[None], None


AttentionInterface.register("near_attention", near_attention)
AttentionMaskInterface.register("near_attention", fe_attention_mask)  # no mask for packed rows


@torch.no_grad()
def main() -> None:
    model, tokenizer = load_dense(BASE), load_tokenizer(BASE)
    names = encode_cards(clean(load_source("embedded").rows).cards[:200], tokenizer)
    for attention in ("fe_attention", "near_attention"):
        model.set_attn_implementation(attention)
        nats = name_nats(model, pack(names)).mean()
        print(f"{attention}: {nats:.2f} nats a name")

    # A token moves the logits of those that see it: through L blocks, of the L * BEFORE after it and of no other.
    ids = torch.tensor([names[0].ids + names[1].ids])
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % model.config.vocab_size
    moved = (model(ids).logits - model(other).logits)[0].abs().amax(-1) > 1e-4
    print(f"reach: {int(moved.nonzero().max())} tokens, {model.config.n_layer * BEFORE} expected at most")
    text = model.generate(ids[:, :8], attention_mask=torch.ones(1, 8).long(), max_new_tokens=8, do_sample=False)
    again = ids[:, :8]
    for _ in range(text.shape[1] - 8):
        again = torch.cat([again, model(again).logits[:, -1:].argmax(-1)], dim=1)
    print(f"with a cache and without the same text: {torch.equal(text, again)}")


if __name__ == "__main__":
    main()
