"""Models for other runtimes, each compared with its source: ONNX, and GGUF for llama.cpp.

ONNX: ids in, logits out, no KV cache. Every expert is computed for every token and weighted by its gate, 0 if not
chosen: E / k times the FLOPs of the experts, but in a few large matmuls.

GGUF (github.com/ggml-org/ggml, docs/gguf.md): a dense GPT-2 in float32.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flash_experts.files import whole_file
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.moe_layer import TANH_GELUS, Experts
from flash_experts.models.saving import write_folder

ONNX_FILE = "model.onnx"
ONNX_OPSET = 18  # ONNX Runtime 1.14 (2023) and later
_ALL_EXPERTS = "fe_all_experts"
_ONNX_CARD = """---
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


@dataclass(frozen=True)
class LogitDifference:
    """The largest absolute difference of two models' logits, and the source's largest absolute logit."""

    largest: float
    scale: float
    names: int

    def __str__(self) -> str:
        return (
            f"logits differ from the source's by at most {self.largest:.2g} (on {self.names} real names, logits up to "
            f"{self.scale:.0f})"
        )


@torch.no_grad()
def logit_difference(
    source: PreTrainedModel, exported: Callable[[torch.Tensor], torch.Tensor], names: Sequence[Sequence[int]]
) -> LogitDifference:
    """Compares two models in eval mode on the CPU; ``exported`` gives float logits (1, S, V) of ids (1, S) int64."""
    largest = scale = 0.0
    for ids in names:  # one by one, so that none is padded
        ids_1S = torch.tensor([ids[: source.config.max_position_embeddings]])
        wanted = source(ids_1S, use_cache=False).logits
        largest = max(largest, (exported(ids_1S) - wanted).abs().max().item())
        scale = max(scale, wanted.abs().max().item())
    return LogitDifference(largest, scale, len(names))


# ----------------------------------------------------------------------------------------------------------------- ONNX
def all_experts_forward(
    self: Experts, x_TD: torch.Tensor, experts_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """`Experts` by matmuls over all experts."""
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
    """Writes a folder with a GPT-2 in eval mode on the CPU, and compares it on ``names``, token ids of real names.

    Raises:
        ValueError: another kind of model, expert choice, or a folder that is not empty without ``overwrite``.
    """
    if not isinstance(model, GPT2LMHeadModel):
        raise ValueError(f"{source} is a {model.config.model_type}: export onnx is for gpt2 and gpt2_moe")
    if isinstance(model, GPT2MoEForCausalLM) and not model.config.has_causal_routing:
        raise ValueError(f"{source} has expert choice, whose experts depend on later tokens: it cannot generate")
    found: list[LogitDifference] = []

    def write(folder: Path) -> None:
        _write_onnx(model, folder / ONNX_FILE)
        found.append(_onnx_difference(model, folder / ONNX_FILE, names))
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = _ONNX_CARD.format(
            name=Path(source).name,
            vocabulary=model.config.vocab_size,
            positions=model.config.max_position_embeddings,
            difference=found[0],
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
        )
        (folder / "README.md").write_text(card, "utf-8")

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


def _write_onnx(model: GPT2LMHeadModel, file: Path) -> None:
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
                opset_version=ONNX_OPSET,
                dynamo=False,
                do_constant_folding=False,
            )
    finally:
        model.set_attn_implementation(attention)
        if has_experts:
            model.set_experts_implementation(experts)


def _onnx_difference(model: PreTrainedModel, file: Path, names: Sequence[Sequence[int]]) -> LogitDifference:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return logit_difference(
        model, lambda ids_1S: torch.from_numpy(session.run(None, {"input_ids": ids_1S.numpy()})[0]), names
    )


# ----------------------------------------------------------------------------------------------------------------- GGUF
def export_gguf(
    source: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[Sequence[int]],
    out: Path,
) -> LogitDifference:
    """Writes a dense GPT-2 and its tokenizer (ValueError for others), and compares what transformers reads back."""
    if model.config.model_type == "gpt2_moe":
        raise ValueError(
            f"{source} has experts, which llama.cpp's GPT-2 has not: export the dense model that flash-experts "
            f"export dense {source} --out DIR makes of it"
        )
    if not isinstance(model, GPT2LMHeadModel):
        raise ValueError(f"{source} is a {model.config.model_type}: export gguf is for a dense gpt2")
    _check_gguf_model(source, model.config)
    _check_gguf_tokenizer(source, tokenizer)
    with whole_file(out) as file:
        _write_gguf(file, Path(source).name, model, tokenizer)
        read = _read_gguf(file, model)
        return logit_difference(model, lambda ids_1S: read(ids_1S, use_cache=False).logits, names)


def _check_gguf_model(source: str | Path, config: Any) -> None:
    if config.activation_function not in TANH_GELUS:  # llama.cpp's only one for GPT-2
        raise ValueError(f"{source} has the activation {config.activation_function}: llama.cpp's GPT-2 has gelu_new")
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention:
        raise ValueError(f"{source} scales its attention in another way than llama.cpp's GPT-2: export onnx can say it")


def _check_gguf_tokenizer(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    before = content.get("pre_tokenizer") or {}
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before.get("add_prefix_space")
    if not plain or content.get("normalizer"):
        raise ValueError(f"the tokenizer of {source} is not GPT-2's byte-level BPE: export onnx can say it")
    if any(token["single_word"] for token in content["added_tokens"]):
        raise ValueError(
            f"the tokenizer of {source} has tokens for whole words, which GGUF cannot say: export onnx can, or train "
            "with --model.tokenizer models/mtg-base, which has none"
        )


def _write_gguf(file: Path, name: str, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner if config.n_inner is not None else 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    _add_gguf_tokenizer(writer, config.vocab_size, tokenizer)
    for key, tensor in _gguf_tensors(model):
        writer.add_tensor(key, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_gguf_tokenizer(writer: Any, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    import gguf

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[UNUSED{index}]" for index in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, index in content["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    )
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)  # the text learned starts with it
    writer.add_add_space_prefix(False)


def _gguf_tensors(model: GPT2LMHeadModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices are (out, in), but (in, out) in GPT-2's Conv1D."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for key, tensor in model.state_dict().items():
        if key != "lm_head.weight" or not model.config.tie_word_embeddings:
            is_conv1d = ".h." in key and tensor.dim() == 2
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert name is not None, key
            yield name, tensor.T if is_conv1d else tensor


def _read_gguf(file: Path, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The model as transformers reads it, which skips the numbers of positions and hidden units."""
    config = type(model.config)(**model.config.to_dict())
    with redirect_stderr(StringIO()):  # transformers' progress bar
        read: Any = GPT2LMHeadModel.from_pretrained(
            str(file.parent), gguf_file=file.name, config=config, dtype=torch.float32
        )
    return read.eval()
