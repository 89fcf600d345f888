"""Takes the released models from the checkout: they are kept in one place, models/, which is outside of this folder."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODELS = ("mtg-base", "mtg-names")


class ReleasedModels(BuildHookInterface):
    """Puts them into the package, also in the sdist, whose wheel then needs no checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        package = "src/flash_experts_models" if self.target_name == "sdist" else "flash_experts_models"
        for name in MODELS:
            if not (root / "src/flash_experts_models" / name).is_dir():  # else this is an unpacked sdist
                build_data["force_include"][str(root.parents[1] / "models" / name)] = f"{package}/{name}"
