"""GPT-2 with a Mixture of Experts and Flash Attention, fine-tuned to name Magic: The Gathering cards.

The public names are imported on first use, so that ``import flash_experts`` is fast. It also registers the model type
``gpt2_moe`` with transformers' AutoConfig, AutoModel, AutoModelForCausalLM and pipelines.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_experts.generation.generator import NameGenerator
    from flash_experts.models.moe import GPT2MoEForCausalLM
    from flash_experts.models.moe_config import GPT2MoEConfig

__version__ = "0.1.0"
__all__ = ["GPT2MoEConfig", "GPT2MoEForCausalLM", "NameGenerator"]

_HOMES = {
    "GPT2MoEConfig": "flash_experts.models.moe_config",
    "GPT2MoEModel": "flash_experts.models.moe",
    "GPT2MoEForCausalLM": "flash_experts.models.moe",
    "NameGenerator": "flash_experts.generation.generator",
}
_MODEL_TYPE = "gpt2_moe"
# transformers' modules with the Auto classes, their mappings, and our class in each.
_AUTO_CLASSES = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING": "GPT2MoEConfig"},
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING": "GPT2MoEModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING": "GPT2MoEForCausalLM",
    },
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register(auto: ModuleType) -> None:
    """Registers our classes in transformers' mappings by name, so that they are imported on first use.

    The public ``AutoModel.register`` needs the class itself, which takes seconds to import.
    """
    for mapping_name, class_name in _AUTO_CLASSES[auto.__name__].items():
        mapping = getattr(auto, mapping_name)
        mapping._modules[_MODEL_TYPE] = sys.modules[__name__]
        if mapping_name == "CONFIG_MAPPING":
            mapping._mapping[_MODEL_TYPE] = class_name
        else:
            mapping._model_mapping[_MODEL_TYPE] = class_name
            mapping._reverse_config_mapping["GPT2MoEConfig"] = _MODEL_TYPE


class _RegisterWhenImported(MetaPathFinder):
    """An import hook: registers our classes right after transformers' Auto classes are imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _AUTO_CLASSES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _RegisterWhenImported())
for _name in _AUTO_CLASSES.keys() & sys.modules.keys():
    _register(sys.modules[_name])
