"""Several proposers that are one to the call: what they are told, what they tell, and how guesses are put together.

A row's guesses come from one of them alone. Where one gives probabilities and another does not, the certain guesses
are shown as rows with all weight on the guess. Each sees its own part of a round: rows that another guessed for
look to it as if nothing had been guessed. Knows none of them, and not which one is asked.
Read next: ``fallback.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.proposers.drawn import certain
from specdec.records import Proposal, Round, Stats
from specdec.state import State
from specdec.transfer import to_device


class Combined:
    """Several proposers during a call; children ask them.

    Attributes:
        wants_hidden: one of them wants the target's hidden states.
        has_model: guesses of one of them cost passes of a model.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        """Combine ``parts``, all begun."""
        self._parts = parts
        self.wants_hidden = any(getattr(part, "wants_hidden", False) for part in parts)
        self.has_model = any(map(has_model, parts))

    @property
    def forwards(self) -> int:
        """Forward passes of draft models."""
        return sum(getattr(part, "forwards", 0) for part in self._parts)

    @property
    def layout(self) -> str:
        """The layout of the first draft model, "" where there is none."""
        return next((part.layout for part in self._parts if getattr(part, "layout", "")), "")

    def finish(self, state: State, stats: Stats) -> None:
        """Tell all that the call is over."""
        for part in self._parts:
            if hasattr(part, "finish"):
                part.finish(state, stats)


def has_model(part: Any) -> bool:
    """Whether guesses of ``part`` cost passes of a model: what only combines others has none of its own."""
    return bool(getattr(part, "has_model", hasattr(part, "forwards")))


def merged(first: Proposal, second: Proposal, of_first: np.ndarray, vocabulary: int) -> Proposal:
    """One proposal, row by row from the first, where ``of_first`` (B,), or the second."""
    width = max(first.tokens.shape[1], second.tokens.shape[1])
    choice = to_device(of_first, first.tokens.device)[:, None]
    mine, other = (pad(part.tokens, (0, width - part.tokens.shape[1])) for part in (first, second))
    lengths = np.where(of_first, first.lengths, second.lengths)
    logits = None
    if first.logits is not None or second.logits is not None:
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
