"""A model as an ONNX file, for ONNX Runtime in any language and in a browser: ids in, logits out, no KV cache.

Every expert is computed for every token and weighted by its gate, 0 if not chosen: E / k times the FLOPs of the
experts, but in a few large matmuls.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flash_experts.models.exports import LogitDifference, logit_difference
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.moe_layer import Experts
from flash_experts.models.saving import write_folder

FILE = "model.onnx"
OPSET = 18  # ONNX Runtime 1.14 (2023) and later
_ALL_EXPERTS = "fe_all_experts"
_CARD = """---
library_name: onnx
pipeline_tag: text-generation
---

# {name} as ONNX

`model.onnx`: `input_ids` (batch, length) int64 to `logits` (batch, length, {vocabulary}) float32, for any batch and up
to {positions} tokens. Pad at the right: a token sees those before it. There is no KV cache.

Its {difference}.

```python
import numpy, onnxruntime, tokenizers

session = onnxruntime.InferenceSession("model.onnx")
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")
ids = [{bos}, *tokenizer.encode("legendary creature goblin, red, 3:").ids]
while ids[-1] != {eos} and len(ids) < {positions}:
    logits = session.run(None, {{"input_ids": numpy.array([ids])}})[0][0, -1].astype(float)
    share = numpy.exp(logits - logits.max())
    ids.append(int(numpy.random.choice(len(share), p=share / share.sum())))
print(tokenizer.decode(ids))
```
"""


def all_experts_forward(
    self: Experts, x_TD: torch.Tensor, experts_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """`Experts` by matmuls over all experts, (T, D)."""
    gates_TE = x_TD.new_zeros(x_TD.shape[0], self.num_experts).scatter_add(1, experts_TK, gates_TK)
    hidden_ETF = self.act_fn(x_TD @ self.up_proj + self.up_proj_bias[:, None])
    y_ETD = hidden_ETF @ self.down_proj + self.down_proj_bias[:, None]
    return (y_ETD * gates_TE.T[..., None]).sum(0)


ALL_EXPERTS_FUNCTIONS.register(_ALL_EXPERTS, all_experts_forward)


def export_onnx(
    source: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[Sequence[int]],
    out: Path,
    overwrite: bool = False,
) -> LogitDifference:
    """Writes a folder with the ONNX file of a GPT-2 in eval mode on the CPU, configuration, tokenizer and a README.

    The file is run on ``names``, token ids of real names.

    Raises:
        ValueError: another kind of model, expert choice, or a folder that is not empty without ``overwrite``.
    """
    if not isinstance(model, GPT2LMHeadModel):
        raise ValueError(f"{source} is a {model.config.model_type}: export onnx is for gpt2 and gpt2_moe")
    if isinstance(model, GPT2MoEForCausalLM) and not model.config.has_causal_routing:
        raise ValueError(f"{source} has expert choice, whose experts depend on later tokens: it cannot generate")
    found: list[LogitDifference] = []

    def write(folder: Path) -> None:
        _trace(model, folder / FILE)
        found.append(_difference(model, folder / FILE, names))
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(source, model, tokenizer, found[0]), "utf-8")

    write_folder(out, write, overwrite)
    return found[0]


class _Logits(nn.Module):
    """ids (B, S) to logits (B, S, V): GPT-2's forward without cache, padding and packing."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        body: Any = self.model.transformer
        place_S = torch.arange(input_ids.shape[1])
        hidden = body.wte(input_ids) + body.wpe(place_S)
        mask_SS = torch.where(place_S[:, None] >= place_S, 0.0, torch.finfo(hidden.dtype).min)
        for block in body.h:
            hidden = block(hidden, attention_mask=mask_SS[None, None], use_cache=False)
        logits: torch.Tensor = self.model.lm_head(body.ln_f(hidden))
        return logits


def _trace(model: GPT2LMHeadModel, file: Path) -> None:
    """Writes the graph; puts the attention and experts back afterwards."""
    config: Any = model.config
    attention, experts = config._attn_implementation, config._experts_implementation
    has_experts = isinstance(model, GPT2MoEForCausalLM)
    model.set_attn_implementation("eager")
    if has_experts:
        model.set_experts_implementation(_ALL_EXPERTS)
    axes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "logits")}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Tracing, which PyTorch calls legacy since 2.9: its exporter by torch.export takes ten times as long for
            # the same logits and needs onnxscript. Without constant folding a tied embedding is stored once.
            torch.onnx.export(
                _Logits(model).eval(),
                (torch.zeros(2, 3, dtype=torch.long),),
                str(file),
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
                do_constant_folding=False,
            )
    finally:
        model.set_attn_implementation(attention)
        if has_experts:
            model.set_experts_implementation(experts)


def _difference(model: PreTrainedModel, file: Path, names: Sequence[Sequence[int]]) -> LogitDifference:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return logit_difference(
        model, lambda ids_1S: torch.from_numpy(session.run(None, {"input_ids": ids_1S.numpy()})[0]), names
    )


def _card(
    source: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, difference: LogitDifference
) -> str:
    config: Any = model.config
    return _CARD.format(
        name=Path(source).name,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        difference=difference,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
    )
