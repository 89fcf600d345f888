"""A model without the tokens that its data never uses.

Letters in the shapes: V tokens before, W tokens after, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def trim_vocabulary(model: PreTrainedModel, kept_ids: Sequence[int]) -> None:
    """Keeps some tokens of a model, in place: what it says of them stays the same, renormalised over them.

    The logits of the kept tokens do not change, so their probabilities are the former ones divided by the sum of those
    kept. Input and output embeddings shrink from (V, D) to (W, D).

    Args:
        model: a causal language model, its output embedding tied to the input's or of its own.
        kept_ids: the W old ids, in the order of the new ones (`flash_experts.data.trimming.trim_tokenizer`).

    Raises:
        ValueError: an id that the model does not have, or a begin, end or padding symbol that is not kept.
    """
    before_VD, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert isinstance(before_VD, torch.Tensor)
    V, D = before_VD.shape
    beyond = [token for token in kept_ids if not 0 <= token < V]
    if beyond:
        raise ValueError(
            f"token {beyond[0]} is not in the model's vocabulary of {V}: is this the model's own tokenizer?"
        )
    new_id = {old: new for new, old in enumerate(kept_ids)}
    symbols = ("bos_token_id", "eos_token_id", "pad_token_id")
    configs = (model.config, model.generation_config)
    old_symbols = [(config, name, getattr(config, name, None)) for config in configs for name in symbols]
    for _, name, old in old_symbols:
        if old is not None and old not in new_id:
            raise ValueError(f"{name} {old} is not among the kept tokens: keep it")
    for config, name, old in old_symbols:
        setattr(config, name, None if old is None else new_id[old])
    index_W = torch.tensor(kept_ids, device=before_VD.device)
    tied = head.weight is before_VD
    after = nn.Embedding(len(kept_ids), D, device="meta")
    after.weight = nn.Parameter(before_VD[index_W])
    model.set_input_embeddings(after)
    head.weight = after.weight if tied else nn.Parameter(head.weight[index_W])
    head.out_features = len(kept_ids)
    model.config.vocab_size = len(kept_ids)
