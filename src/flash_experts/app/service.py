"""Requests to the models of a playground, independent of Gradio and HTTP: names, comparisons, and inspections.

Threads share a model through its lock, one batch at a time. The time limit is a token filter, so it also holds while no
name is found.

Shape suffixes: T tokens that the model reads (BOS token, prompt, name), V tokens of the vocabulary, H heads, S tokens
of the name and its EOS token.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from flash_experts.app.settings import LARGEST_SEED, Settings
from flash_experts.data.names import normal_form, shown_form
from flash_experts.data.packing import encode_name
from flash_experts.data.prompts import OPTIONAL_ATTRIBUTES, Conditions, check_known, read_conditions
from flash_experts.evaluation.routing.maps import NameMap, name_maps, route
from flash_experts.evaluation.routing.specialization import Tokens, shown_text
from flash_experts.evaluation.scorers import check_lengths
from flash_experts.generation import GeneratedName, NameFilter, NameGenerator, NameRequest, NameVocabulary, Sampling
from flash_experts.generation.generator import completed_attributes
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.scoring import evaluating
from flash_experts.options import options_of
from flash_experts.released import model_folder

TIME_LIMIT = 20.0  # seconds per request
ALTERNATIVES = 5
LONGEST_NAME = 60  # characters of a name to inspect
EOS_TEXT = "[EOS]"
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
    """The progress of a request."""

    rows: tuple[Row, ...]  # all names so far
    wanted: int
    seconds: float
    settings: Settings  # with the seed
    is_over: bool = False
    note: str = ""  # at the end, why there are fewer names than requested

    @property
    def seed(self) -> int:
        assert self.settings.seed is not None
        return self.settings.seed


class Playground:
    """The models of one server, and requests to them."""

    def __init__(self, models: Mapping[str, NameGenerator], time_limit: float = TIME_LIMIT) -> None:
        """Serves models by the name that clients see, the first by default, for ``time_limit`` seconds a request."""
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
                with loaded.lock:
                    found = next(stream, None)
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
    """Yields the progress of each side, None where it has no name yet, for the same seed."""
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
    """The settings with the side's own preset, if any, instead of all sampling settings."""
    if not side.preset:
        return settings
    own: dict[str, Any] = dict.fromkeys(options_of(Sampling))
    return replace(settings, preset=side.preset, **own)


# ------------------------------------------------------------------------------------------------------ inspection


@dataclass(frozen=True, slots=True)
class Step:
    """The model's prediction of one token of the name, or of its EOS token."""

    token: str
    probability: float  # at temperature 1, before filters
    rank: int  # from 1
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect_name` found."""

    name: str  # in Unicode normal form, as the model read it
    prompt: str
    tokens: tuple[str, ...]
    prompt_length: int  # tokens before the name, with the BOS token
    steps: tuple[Step, ...]  # of the name's tokens and its EOS token
    attention: tuple[npt.NDArray[np.float32], ...]  # per block (H, T, T); the first t + 1 weights of row t sum to 1
    experts: NameMap | None  # of each token; None for a dense model
    num_experts: int


def inspect_name(loaded: LoadedModel, name: str, settings: Settings) -> Inspection:
    """Inspects how a model reads a name after the prompt that the settings make.

    The tokens are those of the tokenizer; a generated name may, rarely, have been made from others.

    Raises:
        ValueError: the name is blank or too long, the model does not return attention weights, or has not learned the
            set, year or rarity.
    """
    name = shown_form(name)
    if not normal_form(name):
        raise ValueError("no name to inspect: give one with letters")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"the name has {len(name)} characters: the most is {LONGEST_NAME}")
    generator = loaded.generator
    model = generator.model
    attributes = completed_attributes(settings)
    check_known(attributes, read_conditions(model.config.to_dict()))
    encoded = encode_name(name, attributes, generator.tokenizer)
    check_lengths(model, [name], [encoded])
    texts = generator.vocabulary.prompt_texts
    tokens = Tokens.of([encoded], texts)
    with loaded.lock:
        logits_TV, attention = _logits_and_attention(model, encoded.ids[:-1])
        routing = route(model, [encoded]) if isinstance(model, GPT2MoEForCausalLM) else None
    steps = _steps(logits_TV[encoded.prompt_length - 1 :], encoded.ids[encoded.prompt_length :], texts)
    return Inspection(
        name=name,
        prompt=attributes.prompt(),
        tokens=tokens.texts,
        prompt_length=encoded.prompt_length,
        steps=steps,
        attention=attention,
        experts=None if routing is None else name_maps([name], tokens, routing)[0],
        num_experts=0 if routing is None else model.config.num_experts,
    )


def _logits_and_attention(
    model: PreTrainedModel, ids: tuple[int, ...]
) -> tuple[torch.Tensor, tuple[npt.NDArray[np.float32], ...]]:
    """(T, V) float32 logits, and (H, T, T) attention weights of each block."""
    with evaluating(model), torch.inference_mode(), _eager_attention(model):
        ids_1T = torch.tensor([ids], device=model.device)
        mask_1T = torch.ones_like(ids_1T)  # the BOS token is also the padding token
        out = model(ids_1T, attention_mask=mask_1T, output_attentions=True, use_cache=False)
    if not out.attentions or any(block is None for block in out.attentions):
        raise ValueError("this model does not return attention weights")
    return out.logits[0].float().cpu(), tuple(block[0].float().cpu().numpy() for block in out.attentions)


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switches to eager attention, since fused kernels never materialize the attention weights."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _steps(logits_SV: torch.Tensor, ids: tuple[int, ...], texts: tuple[str, ...]) -> tuple[Step, ...]:
    """The predictions of S tokens, the EOS token last, with alternatives."""

    def shown(token: int) -> str:
        return EOS_TEXT if token == ids[-1] else shown_text(texts[token]) or f"[{token}]"

    steps = []
    for probs_V, token in zip(logits_SV.softmax(-1), ids, strict=True):
        top, top_ids = probs_V.topk(ALTERNATIVES)
        alternatives = tuple((shown(other), p) for other, p in zip(top_ids.tolist(), top.tolist(), strict=True))
        rank = int((probs_V > probs_V[token]).sum()) + 1
        steps.append(Step(shown(token), float(probs_V[token]), rank, alternatives))
    return tuple(steps)
