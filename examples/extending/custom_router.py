"""A custom MoE router: cosine similarity instead of the dot product.

python examples/extending/custom_router.py

A dot product grows with the norm of the hidden state, so tokens with large norms are routed with confidence and others
by chance. The cosine does not (Chi et al. 2022 use it against representation collapse). A router is a module that
returns logits, gates and chosen experts for tokens. `TopKRouter` does everything after the logits, so the class below
computes only these.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.nn import functional as F

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.cleaning import clean
from flash_experts.data.packing import encode_cards, pack
from flash_experts.data.sources import load_source
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.loading import load_dense
from flash_experts.models.moe_layer import MoELayer, TopKRouter
from flash_experts.models.router_metrics import router_metrics

BASE = Path(__file__).resolve().parents[2] / "models/mtg-base"
TEMPERATURE = 0.1


class CosineRouter(TopKRouter):
    """Logits between -1 and 1, over a temperature."""

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, E) float32 logits of tokens (T, D)."""
        return F.normalize(x_TD.float(), dim=-1) @ F.normalize(self.weight.float(), dim=-1).T / TEMPERATURE


def with_cosine_routers(model: GPT2MoEForCausalLM) -> GPT2MoEForCausalLM:
    """A copy of the model with such a router in each layer of experts. Load it back the same way: the routers' weights
    are saved under their usual names, the class is not."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            router = CosineRouter(model.config)
            router.load_state_dict(layer.router.state_dict())
            layer.router = router
    return model


def main() -> None:
    dense, tokenizer = load_dense(BASE), load_tokenizer(BASE)
    names = clean(load_source("embedded").rows).cards[:288]
    torch.manual_seed(0)
    plain = GPT2MoEForCausalLM.from_dense(dense, num_experts=8, num_experts_per_tok=2)
    cosine = with_cosine_routers(plain)

    # Gates that sum to one keep upcycling exact, whatever the router.
    batch = pack(encode_cards(names[:32], tokenizer))
    with torch.no_grad():
        off = (cosine(**batch.inputs).logits - dense(**batch.inputs).logits).abs().max().item()
    print(f"logits off by: {off:.1e}")

    for label, model in (("dot product", plain), ("cosine", cosine)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        model.train()
        for start in range(0, 288, 48):
            batch = pack(encode_cards(names[start : start + 48], tokenizer))
            model(**batch.inputs_with_loss(batch.labels.numel())).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        read = router_metrics(model)
        last = f"router/{model.config.n_layer // 2 * 2 - 1}"  # every second block has experts
        metrics = {name: read[f"{last}/{name}"] for name in ("load_cv", "max_load", "entropy")}
        print(f"{label}:", ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
