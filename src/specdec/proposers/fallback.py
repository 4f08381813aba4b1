"""Two proposers, one behind the other: rows for which the first has no guess are guessed by the second.

A row's guesses come from one of the two alone, and which one is settled by the committed tokens, so the law is
untouched. Where one gives probabilities and the other does not, the certain guesses are shown as rows with all
weight on the guess. Each of the two sees its own part of a round: rows that the other guessed for look to it
as if nothing had been guessed. Knows neither of the two. Read next: ``layers.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.errors import UnsupportedModel
from specdec.proposers import Call, Proposer, begun, checked, is_proposer
from specdec.proposers.drawn import certain
from specdec.records import Proposal, Round, Stats
from specdec.state import State
from specdec.transfer import to_device


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


class Behind:
    """One proposer behind another during a call."""

    def __init__(self, first: Any, second: Any) -> None:
        """``second`` behind ``first``, both begun."""
        self._parts = (first, second)
        self.wants_hidden = wants_hidden(self._parts)
        self.has_model = any(map(has_model, self._parts))
        self._proposals: tuple[Proposal, Proposal] | None = None
        self._of_first = np.zeros(0, dtype=bool)

    @property
    def forwards(self) -> int:
        """Forward passes of draft models."""
        return passes(self._parts)

    @property
    def layout(self) -> str:
        """The layout of the draft model, if one of the two is one."""
        return first_layout(self._parts)

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

    def finish(self, state: State, stats: Stats) -> None:
        """Tell both that the call is over."""
        for part in self._parts:
            if hasattr(part, "finish"):
                part.finish(state, stats)


def merged(first: Proposal, second: Proposal, of_first: np.ndarray, vocabulary: int) -> Proposal:
    """One proposal, row by row from the first or the second."""
    width = max(first.tokens.shape[1], second.tokens.shape[1])
    choice = to_device(of_first, first.tokens.device)[:, None]
    mine, other = (pad(part.tokens, (0, width - part.tokens.shape[1])) for part in (first, second))
    lengths = np.where(of_first, first.lengths, second.lengths)
    if first.logits is None and second.logits is None:
        return Proposal(torch.where(choice, mine, other), lengths)
    my_rows, other_rows = _rows(first, mine, vocabulary), _rows(second, other, vocabulary)
    logits = torch.where(choice[..., None], my_rows, other_rows)
    return Proposal(torch.where(choice, mine, other), lengths, logits)


def _rows(part: Proposal, tokens: Tensor, vocabulary: int) -> Tensor:
    """(B, K, V) scores that ``tokens`` (B, K) were drawn from; of certain guesses all is on the guess."""
    if part.logits is not None:
        return pad(part.logits, (0, 0, 0, tokens.shape[1] - part.logits.shape[1]))
    return certain(tokens, vocabulary)


def show(part: Any, own: np.ndarray, proposal: Proposal | None, round_: Round) -> None:
    """Let ``part`` observe the round as it looks to who guessed ``proposal`` for the rows ``own`` (B,) only."""
    if proposal is not None and not own.all():
        round_ = dataclasses.replace(
            round_,
            proposal=proposal,
            drafted=np.where(own[:, None], round_.drafted, -1),
            lengths=np.where(own, round_.lengths, 0),
            accepted=np.where(own, round_.accepted, 0),
        )
    if hasattr(part, "observe"):
        part.observe(round_)


def wants_hidden(parts: Sequence[Any]) -> bool:
    """Whether one of ``parts`` wants the target's hidden states."""
    return any(getattr(part, "wants_hidden", False) for part in parts)


def has_model(part: Any) -> bool:
    """Whether guesses of ``part`` cost passes of a model: what only combines others has none of its own."""
    return bool(getattr(part, "has_model", hasattr(part, "forwards")))


def passes(parts: Sequence[Any]) -> int:
    """Forward passes of the draft models among ``parts``."""
    return sum(getattr(part, "forwards", 0) for part in parts)


def first_layout(parts: Sequence[Any]) -> str:
    """The layout of the first draft model among ``parts``, "" where there is none."""
    return next((part.layout for part in parts if getattr(part, "layout", "")), "")
