"""The decoding loop: many names at once, with a KV cache.

Where ``model.generate`` runs every row to the end of the longest, here a prompt is computed once for all its names, a
row whose name ends goes to the next name (continuous batching), and no row of the vocabulary is ever sorted whole.

Letters in the shapes: B rows, T tokens of prompt and name so far, S tokens that a name may have, V tokens of the
vocabulary, K columns of the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import LogitsProcessor, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from flash_experts.generation.filters import AllOf, NameFilter
from flash_experts.generation.presets import Sampling
from flash_experts.generation.prompt_rows import PromptRows, Prompts, guided
from flash_experts.generation.sampling import draw, noise


@dataclass(frozen=True, slots=True)
class DecodedName:
    """One name as tokens.

    Attributes:
        index: which name of its seed's stream it is.
        ids: tokens after the prompt, without the end symbol.
        log_prob: the model's own log-probability of them and the end symbol, in nats, at temperature 1.
        is_whole: false if the filters left no token, or the end did not come in time.
    """

    index: int
    ids: tuple[int, ...]
    log_prob: float
    is_whole: bool


class NameDecoder:
    """Decodes names that follow one prompt, or each its own.

    For use within `flash_experts.models.modes.evaluating` and ``torch.no_grad``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Sequence[int],
        end_id: int,
        sampling: Sampling,
        processors: Sequence[LogitsProcessor],
        max_new_tokens: int,
        seed: int,
        untold_ids: Sequence[int] | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Stores what all names share.

        Args:
            model: a causal LM of transformers that takes a `DynamicCache`.
            prompt_ids: begin symbol and prompt.
            end_id: the token that ends a name.
            sampling: how tokens are drawn.
            processors: filters, before the sampling: those that are no `NameFilter` first, then the others as one.
            max_new_tokens: names without an end by then are given up.
            seed: of all names of this decoder.
            untold_ids: begin symbol and the prompt that tells nothing, for ``sampling.guidance``.
            prompts: a prompt for each index of the stream, in the place of ``prompt_ids``. Names of one prompt should
                follow each other: it is computed once for them.

        Raises:
            ValueError: different prompts, and a repetition penalty or a filter that looks at token ids.
        """
        self.device = model.device
        self.prompt_ids, self.end_id = prompt_ids, end_id
        self.sampling, self.max_new_tokens, self.seed = sampling, max_new_tokens, seed
        filters = [one for one in processors if isinstance(one, NameFilter)]
        self.filters = AllOf(filters) if filters else None
        self.processors = [one for one in processors if not isinstance(one, NameFilter)]
        if sampling.repetition_penalty != 1:
            penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, len(prompt_ids))
            self.processors.insert(0, penalty)
        if prompts is not None and self.processors:
            raise ValueError("names of different prompts take filters of the text alone, and no repetition_penalty")
        self.prompts = [Prompts(model, [prompt_ids] if prompts is None else prompts)]
        if sampling.guidance != 1 and (prompts is not None or prompt_ids != untold_ids):
            assert untold_ids is not None, "guidance leads away from a prompt"
            self.prompts.append(Prompts(model, [untold_ids]))

    def stream(self, indices: range, batch_size: int) -> Iterator[DecodedName]:
        """The names of these indices in order, each as soon as it and all before it are done.

        A row whose name ends is given to the next name at once, so the batch stays full to the last
        (continuous batching; Yu et al. 2022). Logits processors that are no `NameFilter` want rows of equal length:
        with them a batch ends before the next begins. A name is the same in any company.

        Args:
            indices: which names of the seed's stream.
            batch_size: rows computed at once.
        """
        waiting = deque(indices)
        done: dict[int, DecodedName] = {}
        next_index = indices.start
        batch = _Batch(self, min(batch_size, len(indices)), waiting)
        while batch.rows:
            for name in batch.draw():
                done[name.index] = name
            while next_index in done:
                yield done.pop(next_index)
                next_index += indices.step
            batch.advance(waiting)

    def filtered(self, rows: Sequence[_Row], logits_BV: torch.Tensor) -> torch.Tensor:
        """(B, V) scores after all processors. A row without a token is no error here: another name is tried."""
        scores_BV = logits_BV
        if self.processors:
            tokens_BT = torch.tensor([[*self.prompt_ids, *row.ids] for row in rows], device=self.device)
            for processor in self.processors:
                scores_BV = processor(tokens_BT, scores_BV)
        return scores_BV if self.filters is None else self.filters.apply([row.text for row in rows], scores_BV)


@dataclass(slots=True)
class _Row:
    """A name in the making."""

    index: int
    ids: list[int] = field(default_factory=list)
    text: str = ""


class _Batch:
    """The rows that are computed together, and how they come and go."""

    def __init__(self, decoder: NameDecoder, size: int, waiting: deque[int]) -> None:
        self._decoder = decoder
        self.rows = [_Row(waiting.popleft()) for _ in range(size)]
        self._ended: list[int] = []
        device = decoder.device
        self._after = [PromptRows(prompts, [row.index for row in self.rows]) for prompts in decoder.prompts]
        self._log_prob_B = torch.zeros(size, dtype=torch.float64, device=device)
        self._noise_BS2 = torch.zeros(size, decoder.max_new_tokens, 2, dtype=torch.float64, device=device)
        self._draw_noise(list(range(size)))

    def draw(self) -> list[DecodedName]:
        """Draws a token for each row; returns the names that end with it."""
        decoder, rows = self._decoder, self.rows
        logits_BV, *untold = (after.logits_BV for after in self._after)
        ages = [len(row.ids) for row in rows]
        guided_BV = guided(logits_BV, untold[0], decoder.sampling.guidance) if untold else logits_BV
        scores_BV = decoder.filtered(rows, guided_BV)
        noise_B2 = self._noise_BS2[torch.arange(len(rows)), ages]
        chosen_B, dead_B = draw(scores_BV, noise_B2, decoder.sampling)
        log_prob_B1 = logits_BV.log_softmax(-1).gather(1, chosen_B[:, None])
        self._log_prob_B = self._log_prob_B + log_prob_B1[:, 0].double()
        names: list[DecodedName] = []
        self._ended = []
        drawn = zip(rows, chosen_B.tolist(), dead_B.tolist(), strict=True)
        for place, (row, token, is_dead) in enumerate(drawn):
            is_whole = token == decoder.end_id and not is_dead
            if not is_whole and not is_dead:
                row.ids.append(token)
                if decoder.filters is not None:
                    row.text = decoder.filters.vocabulary.extend(row.text, token)
            if is_whole or is_dead or len(row.ids) == decoder.max_new_tokens:
                self._ended.append(place)
                names.append(DecodedName(row.index, tuple(row.ids), 0.0, is_whole))
        if names:
            log_probs = self._log_prob_B[self._ended].tolist()
            names = [replace(name, log_prob=value) for name, value in zip(names, log_probs, strict=True)]
        return names

    def advance(self, waiting: deque[int]) -> None:
        """Gives the rows that ended to names that wait, drops what is left of them, and computes the next logits."""
        decoder = self._decoder
        everyone = len(self._ended) == len(self.rows)
        refill = self._ended if everyone or not decoder.processors else []
        new = refill[: len(waiting)]
        for place in new:
            self.rows[place] = _Row(waiting.popleft())
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
        # A row that is new has no token yet: it takes part with any.
        tokens = [row.ids[-1] if row.ids else decoder.end_id for row in self.rows]
        for after in self._after:
            after.advance(tokens, {place: self.rows[place].index for place in new})

    def _draw_noise(self, places: Sequence[int]) -> None:
        """Random numbers for the names that begin in these places; they depend on the names' indices alone."""
        if places:
            numbers = [self.rows[place].index for place in places]
            steps = self._decoder.max_new_tokens
            self._noise_BS2[list(places)] = noise(self._decoder.seed, numbers, steps).to(self._decoder.device)
