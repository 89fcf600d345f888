"""When a search has seen all that sampling can give: the probabilities of its different tries add up to one."""

from __future__ import annotations

from collections.abc import Iterable

from flash_experts.generation.decoding import DecodedName, NameDecoder

_FEW = 8  # different tries: for more, the proof takes longer than the search
_CERTAIN = 1 - 1e-6


class Ends:
    """The different tries of a search while they are few, with their probabilities.

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
        self._are_few = len(self._probabilities) + len(new) <= _FEW
        if self._are_few:
            self._probabilities |= {ids: self._decoder.probability(ids) for ids in new}
