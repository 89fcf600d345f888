"""Names for requests, within limits. Nothing here knows of Gradio or of HTTP.

A model serves one step at a time: threads that make names, or look into one, take turns at its lock, so that twenty
requests of a few names are not held up by one of a hundred. The time limit is a filter among the others, so it is kept
even while no name is found at all.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from flash_experts.app.settings import LARGEST_SEED, Settings
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import SELDOM_TOLD, Conditions, read_conditions
from flash_experts.generation import GeneratedName, NameFilter, NameGenerator, NameVocabulary

TIME_LIMIT = 20.0  # seconds of one request
_BATCH = 16  # names computed at once: they come in such groups. 64 would be 1.1 x as fast, and stutter


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that was named when the playground started; clients know it by its name alone."""

    name: str
    generator: NameGenerator
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Row:
    """A name on the table, and what made it.

    Attributes:
        name: with its nearest card.
        settings: with the seed that was drawn.
        model: the model's name.
        locked: kept while other names come and go.
    """

    name: GeneratedName
    settings: Settings
    model: str
    locked: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request has come.

    Attributes:
        rows: all names so far.
        wanted: how many were asked for.
        seconds: since the request began.
        settings: of the request, with the seed.
        is_over: nothing more comes.
        note: why there are fewer than were wanted, or "".
    """

    rows: tuple[Row, ...]
    wanted: int
    seconds: float
    settings: Settings
    is_over: bool = False
    note: str = ""

    @property
    def seed(self) -> int:
        """Of the names."""
        assert self.settings.seed is not None
        return self.settings.seed


class Playground:
    """The models of one server, and requests to them."""

    def __init__(self, models: Mapping[str, NameGenerator], time_limit: float = TIME_LIMIT) -> None:
        """Takes the models.

        Args:
            models: by the name that clients see; the first is the default.
            time_limit: seconds that one request may take.

        Raises:
            ValueError: there is no model, or no time.
        """
        if not models:
            raise ValueError("no model to serve: name at least one")
        if not 0 < time_limit < float("inf"):
            raise ValueError(f"the time limit is {time_limit} s: it must be over 0")
        self.models = {name: LoadedModel(name, generator) for name, generator in models.items()}
        self.time_limit = time_limit

    @classmethod
    def load(cls, sources: Sequence[str], device: str | None = None, time_limit: float = TIME_LIMIT) -> Playground:
        """Loads models and makes a name with each, so that the first client waits for nothing.

        Raises:
            ValueError: a model cannot be loaded.
        """
        loaded: dict[str, NameGenerator] = {}
        for source in sources:
            stem = name = Path(source).resolve().name if Path(source).exists() else source
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
        """The rarities, sets and years that at least one of the models learned."""
        each = [read_conditions(one.generator.model.config.to_dict()) for one in self.models.values()]
        found = {name: sorted({value for known in each for value in known.get(name, [])}) for name in SELDOM_TOLD}
        return {name: values for name, values in found.items() if values}

    def model(self, name: str | None = None) -> LoadedModel:
        """A model by its name; the first if None or blank.

        Raises:
            ValueError: there is none of that name here.
        """
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ValueError(f"no model {name[:60]!r} here: use one of {', '.join(self.models)}")
        return self.models[name]

    def names(self, settings: Settings, model: str | None = None, without: Sequence[str] = ()) -> Iterator[Progress]:
        """Names as they are found.

        Args:
            settings: what is asked for.
            model: its name.
            without: names that the caller has already; they are passed over.

        Yields:
            After each name, and once more at the end.

        Raises:
            ValueError: no such model, or the constraints leave no name.
        """
        loaded = self.model(model)
        began = time.monotonic()
        seed = secrets.randbelow(LARGEST_SEED + 1) if settings.seed is None else settings.seed
        settings = replace(settings, seed=seed)
        had = {normal_form(name) for name in without}
        rows: list[Row] = []
        note = ""
        time_limit = partial(TimeLimit, deadline=began + self.time_limit)
        options = settings.options() | {
            "count": settings.count + len(had),
            "filters": [time_limit],
            "batch_size": _BATCH,
        }
        stream = loaded.generator.stream(**options)
        while len(rows) < settings.count:
            try:
                found = self._next(loaded, stream)
            except TimeUpError:
                note = f"stopped after {self.time_limit:g} s, the time limit of a request"
                break
            if found is None:
                note = "no more names found: loosen the rules, or raise the temperature"
                break
            if normal_form(found.text) not in had:
                rows.append(Row(found, settings, loaded.name))
                yield Progress(tuple(rows), settings.count, time.monotonic() - began, settings)
        yield Progress(tuple(rows), settings.count, time.monotonic() - began, settings, is_over=True, note=note)

    def _next(self, loaded: LoadedModel, stream: Iterator[GeneratedName]) -> GeneratedName | None:
        with loaded.lock:
            return next(stream, None)


# ----------------------------------------------------------------------------------------------------- the time limit


class TimeUpError(Exception):
    """The time of a request is over."""


class TimeLimit(NameFilter):
    """Forbids nothing, and raises `TimeUpError` when the time is over: it is asked at every step of the decoding."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, deadline: float) -> None:
        super().__init__(vocabulary, prompt_length)
        self.deadline = deadline

    def rule(self, name: str) -> Hashable | None:
        return None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return torch.zeros(self.vocabulary.size, dtype=torch.bool)

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        if time.monotonic() > self.deadline:
            raise TimeUpError
        return scores
