"""Models that score names: eval mode, context length, and a teacher's top-K logits for knowledge distillation.

For each label of a sampled name (its tokens and the EOS token) a shard holds the K most likely tokens.

Shape suffixes: L labels of all names, K tokens kept per label.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, PretrainedConfig, PreTrainedTokenizerBase

from flash_experts.files import sha256_of, whole_file

INDEX = "index.json"
SUFFIX = ".top-logits"  # NAMES.jsonl has its logits in the folder NAMES.top-logits


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode within the context; afterwards each module's former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def context_length(config: PretrainedConfig) -> int | None:
    """Maximum number of tokens; None where the configuration has no limit."""
    limit = config.to_dict().get("max_position_embeddings")
    return config.n_positions if isinstance(config, GPT2Config) else limit


@dataclass(frozen=True, slots=True)
class NameLogits:
    """The teacher's top-K logits of one name."""

    labels: tuple[int, ...]  # its token ids and EOS
    ids: torch.Tensor  # (labels, K) int32
    log_probs: torch.Tensor  # (labels, K) float16, in nats


def write_shard(folder: Path, number: int, names: dict[int, NameLogits]) -> None:
    """Writes or replaces one shard; ``names`` is keyed by NUMBER in the source id ``sampled:NUMBER``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "names": torch.tensor(list(names), dtype=torch.int64),
        "lengths": torch.tensor([len(name.labels) for name in names.values()], dtype=torch.int64),
        "labels": torch.tensor([label for name in names.values() for label in name.labels], dtype=torch.int32),
    }
    if names:
        tensors["ids"] = torch.cat([name.ids for name in names.values()]).contiguous()
        tensors["log_probs"] = torch.cat([name.log_probs for name in names.values()]).contiguous()
    with whole_file(shard_file(folder, number)) as temporary:
        save_file(tensors, temporary)


def write_index(folder: Path, shards: int, tokenizer: PreTrainedTokenizerBase, source: dict[str, Any]) -> None:
    """Completes the folder, after all its shards."""
    files = [shard_file(folder, number) for number in range(shards)]
    hashes = {file.name: sha256_of(file) for file in files}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    index = {"tokens": tokens, "source": source, "sha256": hashes}
    with whole_file(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")


def holds_top_logits(folder: str | Path) -> bool:
    """Whether the folder was completed by `write_index`."""
    return (Path(folder) / INDEX).is_file()


class TopLogits:
    """The folder's top-K logits in memory, for a student whose vocabulary is a subset of the teacher's."""

    def __init__(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """ValueError if a shard is missing or changed, or the tokenizer has tokens that the teacher's lacks."""
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            tokens, hashes = list(index["tokens"]), dict(index["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is not an index of top logits: write them again") from error
        student = tokenizer.get_vocab()
        if not student.keys() <= set(tokens):
            raise ValueError(
                f"{folder} has logits of another tokenizer than the model's. For a new model, set model.tokenizer to "
                "the teacher's folder"
            )
        shards = [self._shard(folder / Path(name).name, found) for name, found in sorted(hashes.items())]
        shards = [shard for shard in shards if len(shard["names"])]
        if not shards:
            raise ValueError(f"{folder} has no logits: write them again")
        student_id_of_V = torch.tensor([student.get(token, -1) for token in tokens], dtype=torch.int32)
        # (L, K) int32, -1 for tokens that the student does not have; (L, K) float16, in nats.
        self.ids = student_id_of_V[torch.cat([shard["ids"] for shard in shards])]
        self.log_probs = torch.cat([shard["log_probs"] for shard in shards])
        labels = student_id_of_V[torch.cat([shard["labels"] for shard in shards])].tolist()
        self._rows: dict[int, tuple[int, tuple[int, ...]]] = {}
        start = 0
        for shard in shards:
            for name, length in zip(shard["names"].tolist(), shard["lengths"].tolist(), strict=True):
                self._rows[name] = start, tuple(labels[start : start + length])
                start += length

    @staticmethod
    def _shard(path: Path, sha256: str) -> dict[str, torch.Tensor]:
        if not path.is_file() or sha256_of(path) != sha256:
            raise ValueError(f"{path} is missing or was changed: write the top logits again")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: write the top logits again") from error

    def __contains__(self, source_id: str) -> bool:
        return _number(source_id) in self._rows

    def first_row(self, source_id: str, labels: Sequence[int]) -> int:
        """Index in ``ids`` of a name's first label; -1 if it is missing or has other tokens."""
        row, known = self._rows.get(_number(source_id), (-1, ()))
        return row if known == tuple(labels) else -1


def _number(source_id: str) -> int:
    kind, _, number = source_id.partition(":")
    return int(number) if kind == "sampled" and number.isdecimal() else -1


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"
