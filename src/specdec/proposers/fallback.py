"""Two proposers, one behind the other: rows for which the first has no guess are guessed by the second.

Which of the two a row's guesses come from is settled by the committed tokens, so the law is untouched.
Knows neither of the two. Read next: ``layers.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specdec.errors import UnsupportedModel
from specdec.proposers import Call, Proposer, begun, checked, is_proposer
from specdec.proposers.combined import Combined, merged, show
from specdec.records import Proposal, Round
from specdec.state import State


class Fallback:
    """``first`` where it guesses something, else ``second``.

    Example:
        >>> Fallback(Suffix(shortest=4), DraftModel(model))  # doctest: +SKIP
    """

    def __init__(self, first: Any, second: Any) -> None:
        """Both are proposers, or have a ``begin(call)`` that returns one; words and models are for lists.

        Raises:
            UnsupportedModel: one is neither.
        """
        for part in (first, second):
            if not is_proposer(part):
                raise UnsupportedModel(
                    f"Fallback was given a {type(part).__name__}; wanted are two proposers, such as Suffix() and "
                    "DraftModel(model). A list, draft=[first, second], takes words and models too"
                )
        self.parts = (first, second)

    def begin(self, call: Call) -> Proposer:
        """Begin both."""
        first, second = self.parts
        return Behind(begun(first, call), begun(second, call))


class Behind(Combined):
    """One proposer behind another during a call."""

    def __init__(self, first: Any, second: Any) -> None:
        """``second`` behind ``first``, both begun."""
        super().__init__((first, second))
        self._proposals: tuple[Proposal, Proposal] | None = None
        self._of_first = np.zeros(0, dtype=bool)

    @property
    def drafting(self) -> str:
        """What either has to say of itself."""
        return "; ".join(filter(None, (getattr(part, "drafting", "") for part in self._parts)))

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``; both are asked in every round, the second for the rows that are left."""
        first = checked(self._parts[0].propose(state, limits), state, limits)
        self._of_first = first.lengths > 0
        limits = np.where(self._of_first, 0, limits)
        second = checked(self._parts[1].propose(state, limits), state, limits)
        self._proposals = (first, second)
        if not self._of_first.any():
            return second
        if not second.lengths.any():
            return first
        return merged(first, second, self._of_first, state.vocabulary)

    def observe(self, round_: Round) -> None:
        """Show each of the two its part of the round."""
        owns = (self._of_first, ~self._of_first)
        for part, own, proposal in zip(self._parts, owns, self._proposals or (None, None), strict=True):
            show(part, own, proposal, round_)
