"""What the chapters share, so that each of them is about its own idea: places, figures, tables, quotes, names.

Nothing of what is explained happens here. The code that is explained is the package's own, imported by the chapters.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from flash_experts.data.cards import Card, load_source
from flash_experts.data.cleaning import clean
from flash_experts.data.packing import EncodedName, encode_cards, pack, pack_all
from flash_experts.data.prepare import load_split, prepare
from flash_experts.data.splits import split_by_family
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.loading import load_dense, load_model
from flash_experts.models.router_metrics import update_router_biases
from flash_experts.models.scoring import name_nats
from flash_experts.training.batches import NameBatches
from flash_experts.training.optimizer import freeze_parts, make_optimizers, set_rates
from flash_experts.training.schedule import Schedule
from flash_experts.training.training_config import LearningRateScale, TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "models/mtg-base"  # dense, to be taken apart and upcycled
RELEASED = ROOT / "models/mtg-names"  # what `generate` and `serve` use
DATA = ROOT / "data/mtg"
ALL_PARTS = LearningRateScale()

IN_NOTEBOOK = "ipykernel" in sys.modules

if not IN_NOTEBOOK and "MPLBACKEND" not in os.environ:
    plt.switch_backend("agg")  # a script prints its numbers and opens no window
logging.set_verbosity_error()
logging.disable_progress_bar()
plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "image.interpolation": "nearest",
    }
)


def load_base() -> tuple[Any, PreTrainedTokenizerBase]:
    """The released dense GPT-2 (float32, eval mode) and its tokenizer."""
    return load_dense(BASE), load_tokenizer(BASE)


def load_released() -> tuple[Any, PreTrainedTokenizerBase]:
    """The released model that makes names (float32, eval mode) and its tokenizer."""
    return load_model(RELEASED, "cpu"), load_tokenizer(RELEASED)


def cards(split: str) -> list[Card]:
    """The cards of ``train`` or ``validation``; the embedded table is prepared first where that was not done."""
    if not (DATA / "meta.json").is_file():
        prepare(out=DATA)
    return load_split(DATA, split)


def franchise_cards() -> tuple[list[Card], list[Card]]:
    """Cards that the base has never seen, to learn and held out by family: those of franchises, which cleaning leaves
    out. The base knows its own training names too well to show what a training does."""
    rows = [row for row in load_source("embedded").rows if row.flag == "franchises"]
    parts = split_by_family(clean(rows, include=["franchises"]).cards).parts
    return parts["train"], [*parts["validation"], *parts["test"]]


def token_texts(name: EncodedName, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token that the model reads, a space shown as "·"."""
    texts = [tokenizer.decode([token]).replace(" ", "·") for token in name.ids[:-1]]
    return ["[begin]", *texts[1:]]


@torch.no_grad()
def queries_keys_values(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k and v of each block for tokens (1, S), each (1, S, H, C): what GPT-2's own projections give."""
    caught: list[torch.Tensor] = []
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda module, inputs, output: caught.append(output))
        for block in model.transformer.h
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    D, H = model.config.n_embd, model.config.n_head
    split = [qkv.split(D, dim=-1) for qkv in caught]
    return [(q.unflatten(-1, (H, -1)), k.unflatten(-1, (H, -1)), v.unflatten(-1, (H, -1))) for q, k, v in split]


# ------------------------------------------------------------------------------------------------- showing


def show(figure: Figure, name: str) -> None:
    """Shows a figure in a notebook. A script names it, or saves it where the environment's LEARN_FIGURES says."""
    folder = os.environ.get("LEARN_FIGURES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(folder) / f"{name}.png")
    if plt.get_backend().lower() == "agg":
        print(f"[figure: {name}]")
    else:
        plt.show()
    plt.close(figure)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows in columns: the first to the left, numbers to the right. Floats should come as texts."""
    texts = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    for row in texts:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *rest)).rstrip())


def quote(code: Callable[..., Any] | type | str, docstring: bool = False) -> None:
    """Prints the source of a function or class of the package, with its place, and by default without docstrings.

    Args:
        code: the object, or "module:name" of one whose module is better not imported here (Triton's).
        docstring: keep them.
    """
    if isinstance(code, str):
        module, _, wanted = code.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, module
        path, text = Path(spec.origin), Path(spec.origin).read_text(encoding="utf-8")
        node = next(node for node in ast.parse(text).body if getattr(node, "name", None) == wanted)
        first = min([node.lineno, *(line.lineno for line in getattr(node, "decorator_list", ()))])
        source = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    else:
        code = inspect.unwrap(code) if callable(code) else code  # what a decorator wraps
        path = Path(inspect.getsourcefile(code) or "")
        lines, first = inspect.getsourcelines(code)
        source = textwrap.dedent("".join(lines))
    if not docstring:
        source = _without_docstrings(source)
    print(f"# {path.relative_to(ROOT).as_posix()}, line {first}")
    print(source.rstrip() + "\n")


def _without_docstrings(source: str) -> str:
    lines = source.splitlines()
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]:
        if ast.get_docstring(node) is not None:
            body = node.body[0]
            lines[body.lineno - 1 : body.end_lineno] = [None] * (body.end_lineno - body.lineno + 1)  # type: ignore
    return "\n".join(line for line in lines if line is not None)


# ------------------------------------------------------------------------------------------------ training


def training_steps(
    model: PreTrainedModel,
    names: Sequence[Card],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    learning_rate: float,
    tokens: int = 320,
    lr_scale: LearningRateScale = ALL_PARTS,
    seed: int = 0,
) -> Iterator[float]:
    """A short training loop of the trainer's own parts: its batches, optimizer and schedule.

    Yields, after each optimizer step, the cross-entropy of the step's labels in nats per token (without the router's
    losses, which are trained on as well). Chapter 5 is about the trainer itself.

    Args:
        model: trained in place.
        names: what to learn.
        tokenizer: the model's.
        steps: optimizer steps.
        learning_rate: the highest; a short warm-up leads there, a cosine away from it.
        tokens: of a step, about.
        lr_scale: factors of the rate for router, experts and the rest; 0 freezes a part.
        seed: of the names' order and of dropout.
    """
    config = TrainingConfig(
        max_steps=steps,
        max_epochs=None,
        learning_rate=learning_rate,
        tokens_per_batch=tokens,
        lr_scale=lr_scale,
        seed=seed,
    )
    freeze_parts(model, lr_scale)
    batches, schedule = NameBatches.of(names, tokenizer, config), Schedule.of(config, steps)
    optimizers = make_optimizers(model, config)
    torch.manual_seed(seed)
    for step in range(steps):
        row = pack(batches.names_of_step(step))
        set_rates(optimizers.values(), learning_rate * schedule.factor(step, 0.0))
        model.train()
        output = model(**row.inputs_with_loss(row.labels.numel()))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        update_router_biases(model)
        model.eval()
        yield F.cross_entropy(output.logits[0].detach(), row.labels).item()


@torch.no_grad()
def nats_of_names(model: PreTrainedModel, names: Sequence[Card], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Negative log-likelihood of each name given its attributes, end symbol included: (N,) nats, in eval mode."""
    model.eval()
    rows = pack_all(encode_cards(names, tokenizer), tokens_per_batch=2048)
    return torch.cat([name_nats(model, row) for row in rows])


def bits_per_character(nats_N: torch.Tensor, names: Sequence[Card]) -> float:
    """The figure that does not depend on the tokenizer; the end of a name counts as a character."""
    characters = sum(len(card.name) + 1 for card in names)
    return nats_N.sum().item() / torch.log(torch.tensor(2.0)).item() / characters
