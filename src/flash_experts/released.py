"""What a release carries besides code: the configurations, and the trained models of flash-experts-models.

Both are found by name from any folder: next to the user's own files, in a source checkout, or in the installed wheels.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from flash_experts.extras import install_command
from flash_experts.terminal import did_you_mean

MODELS = ("models/mtg-names", "models/mtg-base")  # the first one is the default of --model
_MODELS_PACKAGE = "flash_experts_models"
_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]  # of a package in site-packages it is a folder without ours


def model_folder(source: str | Path) -> Path | None:
    """The folder of a model: the path itself, or the released model of that name; None if there is neither."""
    path = Path(source)
    if path.exists() or path.as_posix() not in MODELS:
        return path if path.exists() else None
    places = [_CHECKOUT / path]
    if find_spec(_MODELS_PACKAGE) is not None:
        places.append(Path(str(files(_MODELS_PACKAGE) / path.name)))
    return next((place for place in places if (place / "config.json").is_file()), None)


def is_released(source: str | Path) -> bool:
    """Whether this is the name of a released model, which is never looked for on a hub."""
    return Path(source).as_posix() in MODELS


def default_model() -> str:
    """The newest released model; raises a ValueError if none is in the working folder or installed."""
    for source in MODELS:
        if model_folder(source) is not None:
            return source
    raise ValueError(f"no model: {install_command('models')} brings the released ones, or give --model DIR")


def configurations() -> dict[str, Path]:
    places = (_PACKAGE / "configs", _CHECKOUT / "configs")
    folder = next((place for place in places if (place / "quickstart.yaml").is_file()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def configuration(given: str | Path) -> Path:
    """The file of ``--config``: a path, or one of `configurations`; raises a ValueError if it is neither."""
    path, name, known = Path(given), str(given), configurations()
    if path.is_file() or (path.exists() and name not in known):
        return path
    if name in known:  # also where a folder has this name
        return known[name]
    if path.suffix in (".yaml", ".yml") or path.name != name:
        ours = f": the one that comes with flash-experts is --config {path.stem}" if path.stem in known else ""
        raise ValueError(f"there is no file {given}{ours}")
    hint = did_you_mean(name, known, prefix=": ")
    raise ValueError(f"there is no file {given} and no configuration of that name{hint} ({', '.join(known)})")


def summary_of(path: Path) -> str:
    """The first line of a configuration, which says what it is for."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
