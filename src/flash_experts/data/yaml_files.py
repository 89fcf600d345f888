"""YAML files of settings, read with bounds: a file from a stranger costs neither memory nor time, and runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**17  # the longest of ours has four thousand
MAX_DEPTH = 20
MAX_VALUES = 10_000  # once aliases are written out: nine lines of them can stand for a thousand million


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice, of which YAML's own loader would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ValueError: there is no such file, it is too large or too deep, no UTF-8, no YAML (with the line), or no
            mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: name a YAML file" if path.exists() else f"there is no file {path}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes: that is no file of settings")
        text = data.decode("utf-8-sig")
        _check_depth(path, text)
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line} is no YAML of settings: {error.problem}") from error
    except yaml.YAMLError as error:  # a character that YAML has not
        raise ValueError(f"{path} is no YAML of settings: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings: write `name: value`, one a line")
    _count(path, content, {})
    return content


def _check_depth(path: Path, text: str) -> None:
    """Before anything is built: the loaders call themselves for each level."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ValueError(f"{path}:{line}: more than {MAX_DEPTH} levels are no settings")


def _count(path: Path, value: Any, counted: dict[int, int | None]) -> int:
    """How many values are in this one, aliases written out."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{path}: {value.split(chr(0))[0]!r} has a null character after it, which no value may")
    if not isinstance(value, dict | list):
        return 1
    if id(value) in counted:
        if (known := counted[id(value)]) is None:
            raise ValueError(f"{path}: a value has itself in it")
        return known
    counted[id(value)] = None
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    total = 1 + sum(_count(path, part, counted) for part in parts)
    if total > MAX_VALUES:
        raise ValueError(f"{path}: more than {MAX_VALUES:,} values, aliases written out, are no settings")
    counted[id(value)] = total
    return total
