"""Drafting token by token: score, guess, write, once more; for every proposer that draws from rows of its own.

What is recorded as the guesses' distribution is exactly what they were drawn from. Whether one more is guessed is
settled by tokens that are submitted. Knows no model. Read next: ``draft_model.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidInput
from specdec.proposers import Call
from specdec.records import Proposal
from specdec.state import State


class Steps(Protocol):
    """What drafts, one token of every row a step."""

    def next_scores(self, state: State, step: int) -> Tensor:
        """Processed scores (B, V) for guess ``step`` of every row, on the target's device."""
        ...

    def write(self, state: State, guess: Tensor, step: int) -> None:
        """Guess ``step`` of every row was ``guess`` (B,); the next step goes on from there."""
        ...


def draft(
    steps: Steps,
    state: State,
    limits: np.ndarray,
    call: Call,
    confidence: float | None,
    goes_on: Callable[[np.ndarray], bool] | None,
) -> Proposal:
    """Up to ``limits[b]`` (B,) guesses for row b, at least one for some row.

    Args:
        steps: what drafts.
        state: the committed tokens.
        limits: (B,) guesses that a row may submit.
        call: how tokens are drawn.
        confidence: a row stops after a guess whose own chance is below this; None or 0 never stops.
        goes_on: told the chance (B,) of each guess, says whether one more pays; None always goes on.
    """
    guesses: list[Tensor] = []
    rows: list[Tensor] = []
    start = state.device_lengths - state.prompt_length
    for step in range(int(limits.max())):
        scores = steps.next_scores(state, step)
        guess = call.sampling.guess(scores, start + step if step else start)
        if call.sampling.keeps_logits:
            rows.append(sound(scores, guess < 0))
            guess = guess.clamp(min=0)
        guesses.append(guess)
        if confidence:
            sure = (chance_of(scores, guess) >= confidence).cpu().numpy()
            limits = np.where(sure, limits, np.minimum(limits, step + 1))
        elif goes_on is not None:
            chance = chance_of(scores, guess).double().numpy()
            if not goes_on(np.where(limits > step, chance, 0.0)):
                limits = np.minimum(limits, step + 1)
        if step + 1 >= int(limits.max()):
            break
        steps.write(state, guess, step)
    return Proposal(torch.stack(guesses, dim=1), limits, torch.stack(rows, dim=1) if rows else None)


def check_confidence(confidence: float | None) -> None:
    """Refuse a confidence that is no probability."""
    if confidence is not None and not 0 <= confidence <= 1:
        raise InvalidInput(f"confidence={confidence!r}; give a probability, or None")


def chance_of(scores: Tensor, guess: Tensor) -> Tensor:
    """(B,) the draft's own probability of its guesses (B,)."""
    # on a CPU softmax takes half of logsumexp's time
    return scores.softmax(dim=1).gather(1, guess.clamp(min=0)[:, None])[:, 0].nan_to_num(0)


def sound(scores: Tensor, bad: Tensor) -> Tensor:
    """Where a draft's scores are no distribution (NaN) it has guessed token 0, and says that it was certain."""
    scores = scores.masked_fill(bad[:, None], -torch.inf)
    scores[:, 0] = scores[:, 0].masked_fill(bad, 0)
    return scores
