"""Requests to the models of a playground, independent of Gradio and HTTP.

Threads share a model through its lock, one batch at a time. The time limit is a token filter, so it also holds while no
name is found.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from flash_experts.app.settings import LARGEST_SEED, Settings
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import OPTIONAL_ATTRIBUTES, Conditions, read_conditions
from flash_experts.generation import GeneratedName, NameFilter, NameGenerator, NameRequest, NameVocabulary, Sampling
from flash_experts.options import options_of
from flash_experts.released import model_folder

TIME_LIMIT = 20.0  # seconds per request
_BATCH = 16  # names computed at once; larger batches are hardly faster, and names would appear less steadily


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A served model; clients refer to it by its name."""

    name: str
    generator: NameGenerator
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Row:
    """A name on the table, with the model and settings (seed included) that made it; a locked row is kept."""

    name: GeneratedName
    settings: Settings
    model: str
    locked: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a request: all names so far, and the settings with the seed.

    At the end (``is_over``) it has why there are fewer names than requested, or "".
    """

    rows: tuple[Row, ...]
    wanted: int
    seconds: float
    settings: Settings
    is_over: bool = False
    note: str = ""

    @property
    def seed(self) -> int:
        assert self.settings.seed is not None
        return self.settings.seed


class Playground:
    """The models of one server, and requests to them."""

    def __init__(self, models: Mapping[str, NameGenerator], time_limit: float = TIME_LIMIT) -> None:
        """Wraps models by the name that clients see; the first is the default. The time limit is in seconds."""
        if not models:
            raise ValueError("no model to serve: give at least one")
        if not 0 < time_limit < float("inf"):
            raise ValueError(f"the time limit is {time_limit} s: it must be more than 0")
        self.models = {name: LoadedModel(name, generator) for name, generator in models.items()}
        self.time_limit = time_limit

    @classmethod
    def load(cls, sources: Sequence[str], device: str | None = None, time_limit: float = TIME_LIMIT) -> Playground:
        """Loads models and warms each up with one name."""
        loaded: dict[str, NameGenerator] = {}
        for source in sources:
            folder = model_folder(source)
            stem = name = source if folder is None else folder.resolve().name
            number = 1
            while name in loaded:
                number += 1
                name = f"{stem} ({number})"
            loaded[name] = NameGenerator.from_pretrained(source, device)
        playground = cls(loaded, time_limit)
        for name in loaded:
            list(playground.names(Settings(count=1, seed=0, like=("Goblin Guide",)), name))
        return playground

    def conditions(self) -> Conditions:
        """The rarities, sets and years that at least one model has learned."""
        each = [read_conditions(one.generator.model.config.to_dict()) for one in self.models.values()]
        found = {
            name: sorted({value for known in each for value in known.get(name, [])}) for name in OPTIONAL_ATTRIBUTES
        }
        return {name: values for name, values in found.items() if values}

    def model(self, name: str | None = None) -> LoadedModel:
        """A model by its name; the first if None or blank. Raises a ValueError if no model has that name."""
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ValueError(f"no model {name[:60]!r} here: use one of {', '.join(self.models)}")
        return self.models[name]

    def names(
        self,
        settings: Settings,
        model: str | None = None,
        without: Sequence[str] = (),
        seconds: float | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Iterator[Progress]:
        """Yields the progress after each name but those of ``without``, and once more at the end.

        Args:
            seconds: time limit (default: the playground's).
            is_wanted: asked before each decoding step; if false, the request ends.

        Raises:
            ValueError: the model is unknown, or no name satisfies the constraints.
        """
        loaded = self.model(model)
        start = time.monotonic()
        seed = secrets.randbelow(LARGEST_SEED + 1) if settings.seed is None else settings.seed
        settings = replace(settings, seed=seed)
        excluded = {normal_form(name) for name in without}
        rows: list[Row] = []
        note = ""
        deadline = start + (self.time_limit if seconds is None else seconds)
        watch = partial(Watch, deadline=deadline, is_wanted=is_wanted)
        request = NameRequest.of(**settings.options() | {"count": settings.count + len(excluded), "batch_size": _BATCH})
        stream = loaded.generator.answer(request, filters=[watch])
        while len(rows) < settings.count:
            try:
                found = self._next(loaded, stream)
            except UnwantedError:
                return
            except TimeUpError:
                note = f"stopped after {self.time_limit:g} s, the time limit of a request"
                break
            if found is None:
                note = "no more names found: loosen the rules, or raise the temperature"
                break
            if normal_form(found.text) not in excluded:
                rows.append(Row(found, settings, loaded.name))
                yield Progress(tuple(rows), settings.count, time.monotonic() - start, settings)
        yield Progress(tuple(rows), settings.count, time.monotonic() - start, settings, is_over=True, note=note)

    def _next(self, loaded: LoadedModel, stream: Iterator[GeneratedName]) -> GeneratedName | None:
        with loaded.lock:
            return next(stream, None)


class TimeUpError(Exception):
    """A request has reached its time limit."""


class UnwantedError(Exception):
    """Nobody waits for the names of a request any more."""


class Watch(NameFilter):
    """Ends a request at the next decoding step, by `TimeUpError` or `UnwantedError`; forbids no token."""

    def __init__(
        self, vocabulary: NameVocabulary, prompt_length: int, deadline: float, is_wanted: Callable[[], bool]
    ) -> None:
        super().__init__(vocabulary, prompt_length)
        self.deadline = deadline
        self.is_wanted = is_wanted

    def rule(self, name: str) -> Hashable | None:
        return None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return torch.zeros(self.vocabulary.size, dtype=torch.bool)

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        if not self.is_wanted():
            raise UnwantedError
        if time.monotonic() > self.deadline:
            raise TimeUpError
        return scores


@dataclass(frozen=True, slots=True)
class Side:
    """Model and preset of one side; None for the first model or the preset of the settings."""

    model: str | None = None
    preset: str | None = None


def compare(
    playground: Playground, settings: Settings, sides: Sequence[Side], is_wanted: Callable[[], bool] = lambda: True
) -> Iterator[list[Progress | None]]:
    """Yields the progress of each side, None where it has no name yet, for the same seed.

    A side's own preset replaces all sampling settings.
    """
    seed = secrets.randbelow(LARGEST_SEED + 1) if settings.seed is None else settings.seed
    settings = replace(settings, seed=seed)
    streams = [playground.names(_of_side(settings, side), side.model, is_wanted=is_wanted) for side in sides]
    progress: list[Progress | None] = [None] * len(sides)
    running = set(range(len(sides)))
    while running:
        for place in sorted(running):
            found = next(streams[place], None)
            if found is None:
                running.discard(place)
            else:
                progress[place] = found
                yield list(progress)


def _of_side(settings: Settings, side: Side) -> Settings:
    if not side.preset:
        return settings
    own: dict[str, Any] = dict.fromkeys(options_of(Sampling))
    return replace(settings, preset=side.preset, **own)
