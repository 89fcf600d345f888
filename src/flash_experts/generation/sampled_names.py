"""Data for sequence-level knowledge distillation (Kim and Rush 2016): a teacher's names for many attribute sets.

The attribute sets are those of real cards, with attribute dropout as in training. Names are sampled without filters;
rejected texts are drawn again, a few times. A killed run loses one piece of the file, and resumes to the same names.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from flash_experts.data.cards import Card, join_type_line
from flash_experts.data.names import normal_form
from flash_experts.data.packing import encode_names
from flash_experts.data.prompts import Attributes, drop_unknown, read_conditions
from flash_experts.files import check_out_folder, check_replaced, whole_file
from flash_experts.generation.constraints import Constraints
from flash_experts.generation.decoding import DecodedName, NameDecoder
from flash_experts.generation.generator import NameGenerator
from flash_experts.generation.request import Sampling
from flash_experts.generation.sampling import stream_seed
from flash_experts.generation.text_rules import BAD_MARKS, CARD_ALPHABET, format_name
from flash_experts.models.scoring import INDEX, SUFFIX, NameLogits, evaluating, shard_file, write_index, write_shard

_PIECE = 2048  # names between two saves
_ATTEMPTS = 4  # for each attribute set
_RUN = 64  # adjacent names of one prompt share its KV cache; common prompts are still spread over the file
_MOST_TOKENS = 48


@dataclass(frozen=True, slots=True)
class SampledNames:
    """The settings of a run.

    Attributes:
        count: slightly fewer names are written if attribute sets run out of new ones.
        attribute_dropout: probability that each part of a card's attributes is left out.
        top_logits: most likely tokens recorded per position.
    """

    count: int
    seed: int
    attribute_dropout: float
    sampling: Sampling
    batch_size: int
    top_logits: int = 0

    def __post_init__(self) -> None:
        bounds = {"count": (1, 10_000_000), "attribute_dropout": (0, 1), "batch_size": (1, 65_536),
                  "top_logits": (0, 1024)}  # fmt: skip
        for name, (low, high) in bounds.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} is {value}: it must be from {low} to {high:,}")
        if self.sampling.repetition_penalty != 1 or self.sampling.guidance != 1:
            raise ValueError(
                "repetition_penalty and guidance need a single prompt, and here each name has its own: leave them out"
            )


@dataclass(slots=True)
class _State:
    """The state from which a run with equal ``settings`` is resumed.

    Attributes:
        planned: attribute sets that had their first attempt.
        again: those whose last name was rejected, with their attempts.
    """

    settings: dict[str, Any]
    planned: int = 0
    again: list[tuple[int, int]] = field(default_factory=list)
    pieces: int = 0
    names: int = 0
    bytes: int = 0


def write_sampled_names(
    generator: NameGenerator,
    cards: Sequence[Card],
    known: Collection[str],
    request: SampledNames,
    out: Path,
    source: dict[str, Any],
    report: Callable[[int], None] = lambda names: None,
    overwrite: bool = False,
) -> int:
    """Writes sampled names as prepared lines with ``log_prob`` (nats, EOS token included); returns their number.

    Args:
        known: normal forms of names that the file must not have, besides those that the generator knows.
        out: a ``.jsonl`` file, written as ``out.part`` until it is complete.
        source: further inputs that decide the names: a run is resumed only with the same ones, and the same ``cards``
            and ``known``.
        report: called with the number of names so far.

    Raises:
        ValueError: the file exists or is being written, an unfinished one is damaged or has other settings, or the
            model gives no new name.
    """
    logits = out.with_suffix(SUFFIX) if request.top_logits else None
    check_replaced(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    part, state_file = (out.with_name(out.name + suffix) for suffix in (".part", ".part.json"))
    if logits is not None and not state_file.exists():
        check_out_folder(str(logits), overwrite)
        (logits / INDEX).unlink(missing_ok=True)
    with _locked(out):
        forbidden = generator.known.normal_forms | set(known)
        settings = json.loads(json.dumps(source | asdict(request) | _hashes(cards, forbidden)))
        state, seen = _resumed(part, state_file, settings, logits)
        if state.names:
            report(state.names)
        plan = _plan(cards, request)
        draw = _Sampler(generator, request, plan)
        with part.open("ab") as file:
            while state.planned < len(plan) or state.again:
                lines, drawn, state = _piece(draw, state, forbidden, seen)
                if logits is not None:
                    write_shard(logits, state.pieces - 1, drawn)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
                with whole_file(state_file) as temporary:
                    temporary.write_text(json.dumps(asdict(state)), encoding="utf-8")
                report(state.names)
        if not state.names:
            for path in (part, state_file, *_shards(logits, state)):
                path.unlink()
            raise ValueError("no text of the model is a new name: train it for longer, or lower the temperature")
        if logits is not None:
            write_index(logits, state.pieces, generator.tokenizer, settings)
        os.replace(part, out)
        state_file.unlink()
    return state.names


def _plan(cards: Sequence[Card], request: SampledNames) -> list[Attributes]:
    rng = random.Random(f"attribute sets/{request.seed}")
    drawn: dict[str, list[Attributes]] = {}
    for _ in range(request.count):
        attributes = Attributes.of(rng.choice(cards)).drop(rng, request.attribute_dropout)
        drawn.setdefault(attributes.prompt(), []).append(attributes)
    runs = [same[start : start + _RUN] for same in drawn.values() for start in range(0, len(same), _RUN)]
    rng.shuffle(runs)
    return [attributes for run in runs for attributes in run]


class _Sampler:
    def __init__(self, generator: NameGenerator, request: SampledNames, plan: Sequence[Attributes]) -> None:
        self.plan = plan
        self._generator, self._request = generator, request
        self._constraints = Constraints()
        model: PreTrainedModel = generator.model
        self._conditions = read_conditions(model.config.to_dict())

    def names(self, places: Sequence[int], piece: int) -> Iterator[DecodedName]:
        model, tokenizer = self._generator.model, self._generator.tokenizer
        attributes = [drop_unknown(self.plan[place], self._conditions) for place in places]
        encoded = encode_names([""] * len(places), attributes, tokenizer)
        prompts = [one.ids[: one.prompt_length] for one in encoded]
        longest = max(map(len, prompts))
        most = min(_MOST_TOKENS, model.config.max_position_embeddings - longest)
        if most < 2:
            raise ValueError(f"the longest prompt has {longest} tokens, but the model's context only {longest + most}")
        seed = stream_seed(self._request.seed, (piece,))
        sampling, size = self._request.sampling, self._request.batch_size
        top_logits = min(self._request.top_logits, model.config.vocab_size)
        with evaluating(model), torch.no_grad():
            decoder = NameDecoder(
                model, (), tokenizer.eos_token_id, sampling, [], most, seed, prompts=prompts, top_logits=top_logits
            )
            yield from decoder.stream(range(len(prompts)), size)

    def logits(self, name: DecodedName) -> NameLogits:
        ids_SK, log_probs_SK = (torch.stack(each) for each in zip(*name.top, strict=True))
        return NameLogits((*name.ids, self._generator.tokenizer.eos_token_id), ids_SK, log_probs_SK)

    def text(self, name: DecodedName) -> str:
        """The formatted name, or "" if the text is not a name."""
        text = self._generator.vocabulary.decode(name.ids) if name.is_whole else ""
        if not text.isprintable() or not text.startswith(" "):
            return ""
        text = format_name(text)
        is_name = CARD_ALPHABET.issuperset(text) and not BAD_MARKS.search(" " + text)
        return text if text and is_name and self._constraints.held_by(text) else ""


def _piece(
    draw: _Sampler, state: _State, forbidden: Collection[str], seen: set[str]
) -> tuple[bytes, dict[int, NameLogits], _State]:
    """Lines and logits of the next piece, and the state after it; ``seen`` gets the new names."""
    retried = sorted(state.again[:_PIECE], key=lambda one: draw.plan[one[0]].prompt())
    first = range(state.planned, min(state.planned + _PIECE - len(retried), len(draw.plan)))
    attempts = dict.fromkeys(first, 0) | dict(retried)
    places = list(attempts)
    again, lines = state.again[_PIECE:], []
    logits: dict[int, NameLogits] = {}
    for place, name in zip(places, draw.names(places, state.pieces), strict=True):
        text = draw.text(name)
        key = normal_form(text)
        if key and key not in forbidden and key not in seen:
            seen.add(key)
            card = _card(text, draw.plan[place], f"sampled:{place}").to_json()
            if name.top:
                logits[place] = draw.logits(name)
            lines.append(json.dumps(card | {"log_prob": round(name.log_prob, 4)}, ensure_ascii=False) + "\n")
        elif attempts[place] + 1 < _ATTEMPTS:
            again.append((place, attempts[place] + 1))
    text_of_piece = "".join(lines).encode()
    after = _State(
        settings=state.settings,
        planned=state.planned + len(first),
        again=again,
        pieces=state.pieces + 1,
        names=state.names + len(lines),
        bytes=state.bytes + len(text_of_piece),
    )
    return text_of_piece, logits, after


def _card(name: str, attributes: Attributes, source_id: str) -> Card:
    supertypes, types, subtypes = attributes.supertypes or (), attributes.types or (), attributes.subtypes or ()
    released = None if attributes.released is None else str(attributes.released)
    return Card(
        name=name,
        type_line=join_type_line(supertypes, types, subtypes),
        supertypes=supertypes,
        types=types,
        subtypes=subtypes,
        colors=attributes.colors,
        mana_value=attributes.mana_value,
        source_id=source_id,
        rarity=attributes.rarity,
        set_code=attributes.set_code,
        released=released,
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FileLock(out.with_name(out.name + ".lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is writing {out}: wait for it, or choose another --out") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _shards(logits: Path | None, state: _State) -> list[Path]:
    return [] if logits is None else [shard_file(logits, number) for number in range(state.pieces)]


def _hashes(cards: Sequence[Card], forbidden: Collection[str]) -> dict[str, str]:
    """What a run depends on besides its settings: the prompts and the names that it may not give."""
    prompts = (json.dumps(card.to_json(), sort_keys=True) for card in cards)
    return {"cards": _sha256_of(prompts), "known": _sha256_of(sorted(forbidden))}


def _sha256_of(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def _resumed(part: Path, state_file: Path, settings: dict[str, Any], logits: Path | None) -> tuple[_State, set[str]]:
    """The state and known names of an unfinished file, which is truncated to its last complete piece."""
    if not state_file.exists():
        part.unlink(missing_ok=True)  # its first piece was never complete
        return _State(settings), set()
    others = f" and {state_file.name}" if logits is None else f", {state_file.name} and {logits.name}"
    hint = f"remove {part}{others} to start again"
    try:
        state = _State(**json.loads(state_file.read_text(encoding="utf-8")))
        state.again = [(int(place), int(attempts)) for place, attempts in state.again]
        if state.settings != settings:
            both = {**state.settings, **settings}
            changed = [name for name in both if state.settings.get(name) != settings.get(name)]
            raise ValueError(
                f"{part} is unfinished and has other settings ({', '.join(changed)}): use those, or {hint}"
            )
        for shard in _shards(logits, state):
            if not shard.is_file():
                raise ValueError(f"{shard}, which belongs to the unfinished {part}, is missing: {hint}")
        with part.open("r+b") as file:
            if file.seek(0, os.SEEK_END) < state.bytes:
                raise ValueError(f"{part} is shorter than {state_file.name} records: {hint}")
            file.truncate(state.bytes)
        names = [json.loads(line)["name"] for line in part.read_text(encoding="utf-8").splitlines()]
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{part} cannot be resumed ({type(error).__name__}): {hint}") from error
    return state, set(map(normal_form, names))
