"""The decoding loop: many names from one prompt, with a KV cache.

Where ``model.generate`` runs every row to the end of the longest, here the prompt is computed once for all,
finished rows leave the batch, and no row of the vocabulary is ever sorted whole.

Letters in the shapes: B rows still running, T tokens of a row so far, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from flash_experts.generation.filters import AllOf, NameFilter
from flash_experts.generation.presets import Sampling
from flash_experts.generation.sampling import draw, noise
from flash_experts.generation.vocabulary import NameVocabulary


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


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into eval mode and each of its modules back to what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class NameDecoder:
    """Decodes names that follow one prompt. For use within `evaluating` and ``torch.no_grad``."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Sequence[int],
        end_id: int,
        sampling: Sampling,
        processors: Sequence[LogitsProcessor],
        max_new_tokens: int,
        seed: int,
    ) -> None:
        """Computes the prompt, once for all names.

        Args:
            model: a causal LM of transformers that takes a `DynamicCache`.
            prompt_ids: begin symbol and prompt.
            end_id: the token that ends a name.
            sampling: how tokens are drawn.
            processors: filters, before the sampling: those that are no `NameFilter` first, then the others as one.
            max_new_tokens: names without an end by then are given up.
            seed: of all names of this decoder.
        """
        self._model = model
        self._prompt_1T = torch.tensor([prompt_ids], device=model.device)
        self._end_id = end_id
        self._sampling = sampling
        filters = [one for one in processors if isinstance(one, NameFilter)]
        self._filters = AllOf(filters) if filters else None
        self._processors = [one for one in processors if not isinstance(one, NameFilter)]
        if sampling.repetition_penalty != 1:
            penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, len(prompt_ids))
            self._processors.insert(0, penalty)
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._cache = DynamicCache(config=model.config)
        # The begin symbol is also the pad symbol: without a mask transformers would warn of padding.
        mask = torch.ones_like(self._prompt_1T)
        out = model(
            self._prompt_1T,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._first_1V = out.logits[:, -1].float()

    def decode(self, indices: range) -> list[DecodedName]:
        """The names of these indices, computed together, in order. A name is the same in any company."""
        device = self._prompt_1T.device
        num_rows = len(indices)
        noise_BS = noise(self._seed, indices, self._max_new_tokens).to(device)
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(num_rows)
        tokens_BT = self._prompt_1T.repeat(num_rows, 1)
        logits_BV = self._first_1V.expand(num_rows, -1)
        log_prob_B = torch.zeros(num_rows, dtype=torch.float64, device=device)
        running = torch.arange(num_rows, device=device)  # which of the names each row is
        names = [""] * num_rows
        decoded: dict[int, DecodedName] = {}
        for step in range(self._max_new_tokens):
            scores_BV = self._filter(tokens_BT, names, logits_BV)
            chosen_B, dead_B = draw(scores_BV, noise_BS[running, step], self._sampling)
            chosen_logit_B = logits_BV.gather(1, chosen_B[:, None])[:, 0]
            log_prob_B = log_prob_B + (chosen_logit_B - logits_BV.logsumexp(dim=-1)).double()
            stops_B = (chosen_B == self._end_id) | dead_B
            if stops_B.any():
                self._collect(decoded, indices, running, stops_B, dead_B, tokens_BT, log_prob_B)
                keep = (~stops_B).nonzero()[:, 0]
                if not len(keep):
                    break
                cache.batch_select_indices(keep)
                running, tokens_BT, log_prob_B, chosen_B = (x[keep] for x in (running, tokens_BT, log_prob_B, chosen_B))
                names = [names[row] for row in keep.tolist()]
            tokens_BT = torch.cat([tokens_BT, chosen_B[:, None]], dim=1)
            if self._filters is not None:
                names = _extended(self._filters.vocabulary, names, chosen_B)
            if step + 1 < self._max_new_tokens:
                out = self._model(chosen_B[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits_BV = out.logits[:, -1].float()
        else:
            late_B = torch.ones_like(running, dtype=torch.bool)
            self._collect(decoded, indices, running, late_B, late_B, tokens_BT, log_prob_B)
        return [decoded[index] for index in indices]

    def _filter(self, tokens_BT: torch.Tensor, names: Sequence[str], logits_BV: torch.Tensor) -> torch.Tensor:
        scores_BV = logits_BV
        for processor in self._processors:
            scores_BV = processor(tokens_BT, scores_BV)
        # A row without a token is no error here: it is dropped and another name tried.
        return scores_BV if self._filters is None else self._filters.apply(names, scores_BV)

    def _collect(
        self,
        decoded: dict[int, DecodedName],
        indices: range,
        running: torch.Tensor,
        stops_B: torch.Tensor,
        failed_B: torch.Tensor,
        tokens_BT: torch.Tensor,
        log_prob_B: torch.Tensor,
    ) -> None:
        """Adds the rows that stop to ``decoded``."""
        rows = stops_B.nonzero()[:, 0]
        names = tokens_BT[rows, self._prompt_1T.shape[1] :].tolist()
        columns = zip(running[rows].tolist(), names, log_prob_B[rows].tolist(), failed_B[rows].tolist(), strict=True)
        for place, ids, log_prob, failed in columns:
            index = indices[place]
            decoded[index] = DecodedName(index, tuple(ids), log_prob, not failed)


def _extended(vocabulary: NameVocabulary, names: Sequence[str], chosen_B: torch.Tensor) -> list[str]:
    """The texts of the rows, each with its next token: no row is decoded anew."""
    return [vocabulary.extend(name, token) for name, token in zip(names, chosen_B.tolist(), strict=True)]
