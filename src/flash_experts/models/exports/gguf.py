"""A dense GPT-2 as a GGUF file (github.com/ggml-org/ggml, docs/gguf.md) in float32, for llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.files import whole_file
from flash_experts.models.exports import LogitDifference, logit_difference

_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh")  # llama.cpp's only one for GPT-2
# transformers' names of a block's parts to GGUF's.
_PARTS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_ENDS = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def export_gguf(
    source: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[Sequence[int]],
    out: Path,
) -> LogitDifference:
    """Writes a dense GPT-2 in eval mode on the CPU and its tokenizer, and compares what transformers reads back.

    ``names`` are token ids of real names.

    Raises:
        ValueError: a model or tokenizer that llama.cpp's GPT-2 is not.
    """
    if model.config.model_type == "gpt2_moe":
        raise ValueError(
            f"{source} has experts, which llama.cpp's GPT-2 has not: export the dense model that flash-experts "
            f"export dense {source} --out DIR makes of it"
        )
    if not isinstance(model, GPT2LMHeadModel):
        raise ValueError(f"{source} is a {model.config.model_type}: export gguf is for a dense gpt2")
    _check_model(source, model.config)
    _check_tokenizer(source, tokenizer)
    with whole_file(out) as file:
        _write(file, Path(source).name, model, tokenizer)
        read = _read_back(file, model)
        return logit_difference(model, lambda ids_1S: read(ids_1S, use_cache=False).logits, names)


def _check_model(source: str | Path, config: Any) -> None:
    """ValueError for variants of GPT-2 that GGUF's ``gpt2`` cannot express."""
    if config.activation_function not in _TANH_GELUS:
        raise ValueError(f"{source} has the activation {config.activation_function}: llama.cpp's GPT-2 has gelu_new")
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention:
        raise ValueError(f"{source} scales its attention in another way than llama.cpp's GPT-2: export onnx can say it")


def _check_tokenizer(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for any but GPT-2's kind of byte-level BPE."""
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


def _write(file: Path, name: str, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
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
    _add_tokenizer(writer, config.vocab_size, tokenizer)
    for key, tensor in _tensors(model):
        writer.add_tensor(key, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
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
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)  # the text learned starts with it
    writer.add_add_space_prefix(False)


def _tensors(model: GPT2LMHeadModel) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF's names and weights; matrices are (out, in), but (in, out) in GPT-2's Conv1D."""
    weights = model.transformer.state_dict()
    for ours, theirs in _ENDS.items():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in weights:
                yield f"{theirs}.{kind}", weights[f"{ours}.{kind}"]
    for block in range(model.config.n_layer):
        for ours, theirs in _PARTS.items():
            for kind in ("weight", "bias"):
                tensor = weights[f"h.{block}.{ours}.{kind}"]
                yield f"blk.{block}.{theirs}.{kind}", tensor.T if tensor.dim() == 2 else tensor
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight.detach()


def _read_back(file: Path, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The model as transformers reads it, which skips the numbers of positions and hidden units."""
    config = type(model.config)(**model.config.to_dict())
    with redirect_stderr(StringIO()):  # transformers' progress bar
        read: Any = GPT2LMHeadModel.from_pretrained(
            str(file.parent), gguf_file=file.name, config=config, dtype=torch.float32
        )
    return read.eval()
