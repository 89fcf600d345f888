"""The decoding loop: batched generation with a KV cache, where a prompt is computed once for all its names.

Shape suffixes: B batch rows, T tokens of prompt and name, S most tokens of a name, V vocabulary, K cache columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from flash_experts.generation.filters.base import AllOf, NameFilter
from flash_experts.generation.request import Sampling
from flash_experts.generation.sampling import candidates, draw, noise
from flash_experts.models import decode_step
from flash_experts.models.ring_cache import RingCache

_FEW_ENDS = 8  # different tries: for more, the proof takes longer than the search
_CERTAIN = 1 - 1e-6
_COMPUTED_AHEAD = 128  # prompts computed together where each name has its own: full matmuls within little memory


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's KV cache (one row) and float32 logits after it."""

    cache: DynamicCache
    first_V: torch.Tensor


class Prompts:
    """The prompts of a stream of names, computed when first needed."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> None:
        """``ids``: BOS token and prompt of each name, by its index; one entry serves all names."""
        self.model = model
        self.longest = max(map(len, ids))
        self._ids = ids
        self._computed: dict[tuple[int, ...], Prompt] = {}
        self._is_fast = decode_step.supports(model)

    def of(self, name: int) -> Prompt:
        """The prompt of a name; names must come in order, since earlier prompts are dropped."""
        place = 0 if len(self._ids) == 1 else name
        ids = tuple(self._ids[place])
        if ids not in self._computed:
            coming = dict.fromkeys(tuple(one) for one in islice(self._ids, place, place + 8 * _COMPUTED_AHEAD))
            by_length: dict[int, list[tuple[int, ...]]] = {}
            for one in islice(coming, _COMPUTED_AHEAD):
                by_length.setdefault(len(one), []).append(one)
            self._computed = {}
            for together in by_length.values():  # equal lengths: no padding
                self._computed.update(zip(together, self._compute(together), strict=True))
        return self._computed[ids]

    def next_logits(self, tokens_B: torch.Tensor, cache: RingCache) -> torch.Tensor:
        """(B, V) float32 logits after one more token of each row."""
        if self._is_fast:
            return decode_step.next_logits(self.model, tokens_B, cache)
        mask_BK, positions_B1 = cache.step(tokens_B.device)
        out = self.model(
            tokens_B[:, None],
            attention_mask=mask_BK[:, None, None],
            position_ids=positions_B1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = out.logits[:, -1].float()
        return logits_BV

    def _compute(self, ids: Sequence[Sequence[int]]) -> list[Prompt]:
        cache = DynamicCache(config=self.model.config)
        ids_BT = torch.tensor(ids, device=self.model.device)
        # The BOS token is also the padding token: without a mask transformers would warn about padding.
        mask = torch.ones_like(ids_BT)
        out = self.model(ids_BT, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        first_BV = out.logits[:, -1].float()
        layer: Any
        if self._is_fast:
            dtype = decode_step.activation_dtype(self.model)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        prompts = []
        for row in range(len(ids)):
            one: Any = DynamicCache(config=self.model.config)
            for index, layer in enumerate(cache.layers):
                one.update(layer.keys[row : row + 1], layer.values[row : row + 1], index)
            prompts.append(Prompt(one, first_BV[row]))
        return prompts


class PromptRows:
    """Batch rows that continue their prompts, with float32 next-token logits in ``logits_BV``."""

    def __init__(self, prompts: Prompts, names: Sequence[int]) -> None:
        """``names``: the index of each row's name."""
        self._prompts = prompts
        self._begin(names)

    def _begin(self, names: Sequence[int]) -> None:
        rows = [self._prompts.of(name) for name in names]
        self._cache = RingCache([row.cache for row in rows], self._prompts.longest)
        is_one = all(row is rows[0] for row in rows)
        first = rows[0].first_V.expand(len(rows), -1) if is_one else torch.stack([row.first_V for row in rows])
        self.logits_BV = first

    def select(self, rows: torch.Tensor) -> None:
        self._cache.select(rows)

    def advance(self, tokens: Sequence[int], new: Mapping[int, int]) -> None:
        """Appends a token to each row, except those that start again with the names of ``new``, by row."""
        if len(new) == len(tokens):
            self._begin([new[place] for place in range(len(tokens))])
            return
        prompts = [self._prompts.of(name) for name in new.values()]
        self._cache.replace(list(new), [prompt.cache for prompt in prompts])
        self.logits_BV = self._prompts.next_logits(torch.tensor(tokens, device=self.logits_BV.device), self._cache)
        if new:
            self.logits_BV[list(new)] = torch.stack([prompt.first_V for prompt in prompts])


def guided(conditional_BV: torch.Tensor, unconditional_BV: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022; for language models Sanchez et al. 2023)."""
    unconditional_BV = unconditional_BV.log_softmax(dim=-1)
    return unconditional_BV + guidance * (conditional_BV.log_softmax(dim=-1) - unconditional_BV)


@dataclass(frozen=True, slots=True)
class DecodedName:
    """One name as tokens.

    Attributes:
        index: place in the seed's stream.
        ids: without prompt and EOS token.
        log_prob: of ``ids`` and the EOS token, in nats, without sampling settings and filters.
        is_whole: false if the filters left no token, or the EOS token did not come in time.
        top: for each of ``ids`` and the EOS token the most likely ids (K,) and their log-probabilities (K,).
    """

    index: int
    ids: tuple[int, ...]
    log_prob: float
    is_whole: bool
    top: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


class NameDecoder:
    """Decodes names within `flash_experts.models.scoring.evaluating` and ``torch.no_grad``."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Sequence[int],
        eos_id: int,
        sampling: Sampling,
        processors: Sequence[LogitsProcessor],
        max_new_tokens: int,
        seed: int,
        unconditional_ids: Sequence[int] | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        top_logits: int = 0,
    ) -> None:
        """Stores what all names share.

        Args:
            processors: each `NameFilter` comes after the others.
            unconditional_ids: prompt without attributes, for guidance.
            prompts: one for each index of the stream, instead of ``prompt_ids``; only with filters.
            top_logits: K, most likely tokens to record per position.
        """
        self.device = model.device
        self.prompt_ids, self.eos_id = prompt_ids, eos_id
        self.sampling, self.max_new_tokens, self.seed = sampling, max_new_tokens, seed
        self.top_logits = top_logits
        filters = [one for one in processors if isinstance(one, NameFilter)]
        self.filters = AllOf(filters) if filters else None
        self.processors = [one for one in processors if not isinstance(one, NameFilter)]
        if sampling.repetition_penalty != 1:
            penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, len(prompt_ids))
            self.processors.insert(0, penalty)
        if prompts is not None and self.processors:
            raise ValueError("names of different prompts need text filters (NameFilter), without repetition_penalty")
        self.prompts = [Prompts(model, [prompt_ids] if prompts is None else prompts)]
        if sampling.guidance != 1 and (prompts is not None or prompt_ids != unconditional_ids):
            assert unconditional_ids is not None, "guidance needs the unconditional prompt"
            self.prompts.append(Prompts(model, [unconditional_ids]))

    def stream(self, indices: range, batch_size: int) -> Iterator[DecodedName]:
        """The names of these indices of the stream, in order.

        A row whose name ends is given to the next name at once (continuous batching, Yu et al. 2022), except with
        processors other than `NameFilter`, which need rows of equal length.
        """
        done: dict[int, DecodedName] = {}
        next_index = indices.start
        batch = _Batch(self, indices, batch_size)
        while batch.rows:
            for name in batch.draw():
                done[name.index] = name
            while next_index in done:
                yield done.pop(next_index)
                next_index += indices.step
            batch.advance()

    def probability(self, ids: Sequence[int]) -> float:
        """The probability that the next name begins with these tokens, or is exactly these where they end with EOS."""
        row, found = _Row(0), 1.0
        after = [PromptRows(prompts, [0]) for prompts in self.prompts]
        for token in ids:
            probs_1K, ids_1K = candidates(self._scores([row], after), self.sampling)
            of_token = probs_1K[0, token] if ids_1K is None else (probs_1K * (ids_1K == token)).sum()
            found *= float(of_token / probs_1K.sum())
            if not found or token == self.eos_id:
                break
            row.ids.append(token)
            row.text = self.filters.vocabulary.extend(row.text, token) if self.filters is not None else ""
            for one in after:
                one.advance([token], {})
        return found

    def _scores(self, rows: Sequence[_Row], after: Sequence[PromptRows]) -> torch.Tensor:
        """(B, V) scores to draw from, after guidance and all processors."""
        logits_BV, *unconditional = (one.logits_BV for one in after)
        if unconditional:
            logits_BV = guided(logits_BV, unconditional[0], self.sampling.guidance)
        return self.filtered(rows, logits_BV)

    def filtered(self, rows: Sequence[_Row], logits_BV: torch.Tensor) -> torch.Tensor:
        """(B, V) scores after all processors."""
        scores_BV = logits_BV
        if self.processors:
            tokens_BT = torch.tensor([[*self.prompt_ids, *row.ids] for row in rows], device=self.device)
            for processor in self.processors:
                scores_BV = processor(tokens_BT, scores_BV)
        return scores_BV if self.filters is None else self.filters.apply([row.text for row in rows], scores_BV)


@dataclass(slots=True)
class _Row:
    index: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    top: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


class _Batch:
    def __init__(self, decoder: NameDecoder, indices: range, most: int) -> None:
        self._decoder = decoder
        self.rows = [_Row(index) for index in indices[:most]]
        self._waiting = indices[most:]
        size = len(self.rows)
        self._ended: list[int] = []
        device = decoder.device
        self._after = [PromptRows(prompts, [row.index for row in self.rows]) for prompts in decoder.prompts]
        self._log_prob_B = torch.zeros(size, dtype=torch.float64, device=device)
        self._noise_BS2 = torch.zeros(size, decoder.max_new_tokens, 2, dtype=torch.float64, device=device)
        self._draw_noise(list(range(size)))

    def draw(self) -> list[DecodedName]:
        """Draws a token for each row and returns the names that end with it."""
        decoder, rows = self._decoder, self.rows
        logits_BV = self._after[0].logits_BV
        ages = [len(row.ids) for row in rows]
        scores_BV = decoder._scores(rows, self._after)
        noise_B2 = self._noise_BS2[torch.arange(len(rows)), ages]
        chosen_B, dead_B = draw(scores_BV, noise_B2, decoder.sampling)
        log_probs_BV = logits_BV.log_softmax(-1)
        self._log_prob_B = self._log_prob_B + log_probs_BV.gather(1, chosen_B[:, None])[:, 0].double()
        if decoder.top_logits:
            top_BK = log_probs_BV.topk(decoder.top_logits)
            ids_BK, values_BK = top_BK.indices.to("cpu", torch.int32), top_BK.values.to("cpu", torch.float16)
            for row, ids_K, values_K in zip(rows, ids_BK, values_BK, strict=True):
                row.top.append((ids_K, values_K))
        ended: dict[int, bool] = {}  # whether each is whole
        drawn = zip(rows, chosen_B.tolist(), dead_B.tolist(), strict=True)
        for place, (row, token, is_dead) in enumerate(drawn):
            is_whole = token == decoder.eos_id and not is_dead
            if not is_whole and not is_dead:
                row.ids.append(token)
                if decoder.filters is not None:
                    row.text = decoder.filters.vocabulary.extend(row.text, token)
            if is_whole or is_dead or len(row.ids) == decoder.max_new_tokens:
                ended[place] = is_whole
        self._ended = list(ended)
        log_probs = self._log_prob_B[self._ended].tolist() if ended else []
        return [
            DecodedName(rows[place].index, tuple(rows[place].ids), log_prob, is_whole, tuple(rows[place].top))
            for (place, is_whole), log_prob in zip(ended.items(), log_probs, strict=True)
        ]

    def advance(self) -> None:
        """Gives ended rows to waiting names, drops the remaining ones, and computes the next logits."""
        decoder = self._decoder
        all_ended = len(self._ended) == len(self.rows)
        refill = self._ended if all_ended or not decoder.processors else []
        new = refill[: len(self._waiting)]
        for place, name in zip(new, self._waiting, strict=False):
            self.rows[place] = _Row(name)
        self._waiting = self._waiting[len(new) :]
        self._draw_noise(new)
        self._log_prob_B[new] = 0
        gone = set(self._ended) - set(new)
        if gone:
            keep = [place for place in range(len(self.rows)) if place not in gone]
            new = [keep.index(place) for place in new]
            self.rows = [self.rows[place] for place in keep]
            index = torch.tensor(keep, dtype=torch.int64, device=decoder.device)
            self._log_prob_B, self._noise_BS2 = self._log_prob_B[index], self._noise_BS2[index]
            for after in self._after:
                after.select(index)
        if not self.rows:
            return
        # A new row has no token yet: any token will do.
        tokens = [row.ids[-1] if row.ids else decoder.eos_id for row in self.rows]
        for after in self._after:
            after.advance(tokens, {place: self.rows[place].index for place in new})

    def _draw_noise(self, places: Sequence[int]) -> None:
        if places:
            numbers = [self.rows[place].index for place in places]
            steps = self._decoder.max_new_tokens
            self._noise_BS2[list(places)] = noise(self._decoder.seed, numbers, steps).to(self._decoder.device)


class Ends:
    """The different tries of a search while they are few: it is over when their probabilities add up to one.

    Where fixed text leaves no room for a name, or hardly any, each try ends in one of a few ways, and hundreds of tries
    would find nothing else.
    """

    def __init__(self, decoder: NameDecoder) -> None:
        self._decoder = decoder
        self._probabilities: dict[tuple[int, ...], float] = {}
        self._are_few = True

    @property
    def are_all(self) -> bool:
        """Whether other tries are impossible."""
        return self._are_few and sum(self._probabilities.values()) >= _CERTAIN

    def add(self, names: Iterable[DecodedName]) -> None:
        """Adds tries, within `evaluating` and ``torch.no_grad``."""
        if not self._are_few:
            return
        eos = (self._decoder.eos_id,)
        new = {name.ids + eos if name.is_whole else name.ids for name in names} - self._probabilities.keys()
        self._are_few = len(self._probabilities) + len(new) <= _FEW_ENDS
        if self._are_few:
            self._probabilities |= {ids: self._decoder.probability(ids) for ids in new}
