"""Models for a hub: model cards, and folders that transformers loads without flash-experts.

A card is a README.md with the metadata that a hub reads, written by huggingface_hub. An exported folder has code of its
own (``trust_remote_code=True``): this package's, reduced to every top-level statement that the model classes reach.
Attention and experts are transformers' own (``sdpa`` and the plain loop), so logits agree up to rounding.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flash_experts.model_files import CONFIG, WEIGHTS, check_files, local_folder, read_object
from flash_experts.models.loading import check_folder, read_config, weight_files
from flash_experts.models.saving import write_folder
from flash_experts.released import model_folder

CARD = "README.md"
# Where a source of cards has its names from.
_DATASETS = {"embedded": "mtgjson", "mtgjson": "mtgjson", "mtgjson-printings": "mtgjson", "scryfall": "scryfall"}
_NAMES = "names of Magic: The Gathering cards"

_PACKAGE = "flash_experts"
_CONFIGURATION, _MODELING = f"{_PACKAGE}.models.moe_config", f"{_PACKAGE}.models.moe"
_FILES = {_CONFIGURATION: "configuration_gpt2_moe", _MODELING: "modeling_gpt2_moe"}  # others keep their name
_ROOTS = {_CONFIGURATION: ("GPT2MoEConfig",), _MODELING: ("GPT2MoEModel", "GPT2MoEForCausalLM")}
_AUTO_MAP = {
    "AutoConfig": "configuration_gpt2_moe.GPT2MoEConfig",
    "AutoModel": "modeling_gpt2_moe.GPT2MoEModel",
    "AutoModelForCausalLM": "modeling_gpt2_moe.GPT2MoEForCausalLM",
}
# What is another thing there: the kernels are transformers' own.
_REPLACED = {
    (f"{_PACKAGE}.models.flash_attention", "ATTENTION_IMPLEMENTATION"): 'ATTENTION_IMPLEMENTATION = "sdpa"',
    (f"{_PACKAGE}.models.moe_layer", "EXPERTS_IMPLEMENTATION"): 'EXPERTS_IMPLEMENTATION = "eager"',
    (f"{_PACKAGE}.models.attention_backends", "check_name"): (
        'def check_name(name: str, where: str) -> None:\n    """Any name: transformers computes the attention here."""'
    ),
}
_DOCSTRINGS = {
    f"{_PACKAGE}.models.flash_attention": "The attention that blocks call, and the sequences that tokens belong to.",
    f"{_PACKAGE}.models.attention_backends": "The check of config.attention_backend, which has no effect here.",
}
_LEFT_OUT = {"GPT2MoEForCausalLM": ("from_dense", "save_pretrained")}  # methods
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_HEADER = "# Part of flash-experts (MIT), written by `flash-experts export hub`: reduced to what this model uses.\n"
_LOADING = """
## Load it with transformers

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # this folder, or the id of its repository
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

The Python files of the folder are those of flash-experts, which need not be installed.
"""


def card_data(
    name: str,
    model_type: str,
    source: str | None = None,
    base_model: str | None = None,
    license: str = "unknown",
    results: Iterable[EvalResult] = (),
) -> ModelCardData:
    """The metadata of a model's card; ``source`` is that of its names, as in meta.json."""
    is_moe = model_type == "gpt2_moe"
    found = list(results)
    return ModelCardData(
        language="en",
        license=license,
        library_name="flash-experts" if is_moe else "transformers",
        base_model=base_model,
        datasets=[_DATASETS[source]] if source in _DATASETS else None,
        pipeline_tag="text-generation",
        tags=["gpt2" if is_moe else model_type, *(["mixture-of-experts"] if is_moe else []), "names"],
        model_name=name,
        eval_results=found or None,
    )


def bits_per_character(source: str | None, split: str, values: Mapping[str, float]) -> list[EvalResult]:
    """Results for the ``model-index``; ``values`` by condition, as "unconditional" or "given type"."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_DATASETS.get(str(source), "names"),
            dataset_name=_NAMES if source in _DATASETS else "names",
            dataset_split=split,
            metric_type="bits_per_character",
            metric_name=f"bits per character, {given}",
            metric_value=round(value, 4),
        )
        for given, value in values.items()
    ]


def write_card(path: Path, data: ModelCardData, text: str) -> None:
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def read_card(folder: Path) -> tuple[ModelCardData, str]:
    """Metadata and text of a folder's card; its name alone without a card, or with a damaged one."""
    try:
        card = ModelCard((folder / CARD).read_text("utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return ModelCardData(), f"# {folder.name}\n"
    return cast(ModelCardData, card.data), card.text


def origin_of(base: str | None) -> tuple[str | None, str]:
    """Hub id and license of a run's base."""
    if base is None:
        return None, "unknown"
    folder = model_folder(base)
    if folder is None:
        return base, "unknown"
    data, _ = read_card(folder)
    first = data.base_model[0] if isinstance(data.base_model, list) and data.base_model else data.base_model
    return (first if isinstance(first, str) else None), str(data.license or "unknown")


def export_for_hub(source: str | Path, out: Path, overwrite: bool = False) -> list[str]:
    """Writes weights, tokenizer, card and code of an MoE model (else ValueError); returns the names of its code."""
    folder = local_folder(source)
    check_folder(folder)
    model_type = read_config(folder).model_type
    if model_type != "gpt2_moe":
        raise ValueError(f"{source} is a {model_type}, which transformers loads as it is: export hub is for MoE models")
    check_files(folder)
    code: list[str] = []

    def write(target: Path) -> None:
        shutil.copyfile(folder / CONFIG, target / CONFIG)
        code.extend(add_code(target))
        weights = {WEIGHTS + ".index.json", *(path.name for path in weight_files(folder))}
        for name in (*sorted(weights), *_TOKENIZER_FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        data, text = read_card(folder)
        data.library_name, data.language = "transformers", data.language or "en"
        write_card(target / CARD, data, text.strip() + "\n" + _LOADING)

    write_folder(out, write, overwrite)
    return code


def add_code(folder: Path) -> list[str]:
    """Adds the Python files to a saved folder, and to its configuration."""
    config = {**read_object(folder / CONFIG), "auto_map": _AUTO_MAP}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    code = sources()
    for name, text in code.items():
        (folder / name).write_text(text, "utf-8")
    return list(code)


@dataclass
class _Module:
    """A module, and which of its statements the model uses."""

    name: str
    used: set[int] = field(default_factory=set)

    @cached_property
    def text(self) -> str:
        spec = find_spec(self.name)
        assert spec is not None and spec.origin is not None
        return Path(spec.origin).read_text("utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def defined(self) -> dict[str, int]:
        return {name: place for place, node in enumerate(self.tree.body) for name in _defined_by(node)}

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """Name to module and name there, for imports from this package."""
        return {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and _is_ours(node.module)
            for alias in node.names
        }

    @property
    def file(self) -> str:
        return _FILES.get(self.name, self.name.rpartition(".")[2])

    def code_of(self, place: int) -> str:
        """A statement with the comments above it, without methods of `_LEFT_OUT`, or what replaces it."""
        node = self.tree.body[place]
        for name in _defined_by(node):
            if (self.name, name) in _REPLACED:
                return _REPLACED[self.name, name]
        lines = self.text.splitlines()
        kept = _lines_of(node)
        while lines[kept.start - 1].startswith("# "):
            kept = range(kept.start - 1, kept.stop)
        gone: list[range] = []
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            gone = [_lines_of(each) for each in methods if each.name in _LEFT_OUT.get(node.name, ())]
        return "\n".join(lines[line] for line in kept if not any(line in each for each in gone)).rstrip()


def sources() -> dict[str, str]:
    """The Python files of an exported model, by name."""
    modules: dict[str, _Module] = {}
    waiting = [(module, name) for module, names in _ROOTS.items() for name in names]
    while waiting:
        module_name, name = waiting.pop()
        module = modules.setdefault(module_name, _Module(module_name))
        if name in module.imported:
            waiting.append(module.imported[name])
            continue
        place = module.defined.get(name)
        if place is None or place in module.used:
            continue
        module.used.add(place)
        waiting += [(module_name, used) for used in _names_in(ast.parse(module.code_of(place)))]
    files = {f"{module.file}.py": _written(module, modules) for module in modules.values() if module.used}
    assert len(files) == sum(1 for module in modules.values() if module.used), "two modules of one name"
    return dict(sorted(files.items()))


def _written(module: _Module, modules: dict[str, _Module]) -> str:
    code = [module.code_of(place) for place in sorted(module.used)]
    needed = set(_names_in(ast.parse("\n".join(code))))
    found: dict[str, list[str]] = {}  # from which module, which names; "" for imports of modules
    for node in module.tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for source, name in _imports(node, needed, modules):
                found.setdefault(source, []).append(name)
    lines = {"__future__": "", "other": "".join(f"import {name}\n" for name in found.pop("", [])), "ours": ""}
    for source, names in found.items():
        group = source if source == "__future__" else "ours" if source.startswith(".") else "other"
        lines[group] += f"from {source} import {', '.join(dict.fromkeys(names))}\n"
    groups = [group.rstrip() for group in lines.values() if group]
    docstring = _DOCSTRINGS.get(module.name) or ast.get_docstring(module.tree) or ""
    end = "\n" if "\n" in docstring else ""
    head = f'{_HEADER}"""{docstring}{end}"""'
    return "\n\n".join([head, *groups]) + "\n\n\n" + "\n\n\n".join(code) + "\n"


def _imports(
    node: ast.Import | ast.ImportFrom, needed: set[str], modules: dict[str, _Module]
) -> Iterator[tuple[str, str]]:
    source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        if source != "__future__" and (alias.asname or alias.name).partition(".")[0] not in needed:
            continue
        module, name, shown = source, alias.name, alias.asname or alias.name
        if _is_ours(source):
            while name in modules[module].imported:  # imported there too: from where it is defined
                module, name = modules[module].imported[name]
            module = f".{modules[module].file}"
        yield module, name if name == shown else f"{name} as {shown}"


def _lines_of(node: ast.stmt) -> range:
    """From 0, with its decorators."""
    first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))])
    return range(first - 1, node.end_lineno or first)


def _defined_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _names_in(tree: ast.AST) -> Iterator[str]:
    """The names that code reads; ValueError if it imports from this package inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            raise ValueError(f"the exported code imports {node.module} inside a function: import it at the top")
        if isinstance(node, ast.Name):
            yield node.id


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == _PACKAGE
