"""Drafting token by token: score, guess, write, once more; for every proposer that draws from rows of its own.

What is recorded as the guesses' distribution is exactly what they were drawn from. Whether one more is guessed is
settled by tokens that are submitted. What a grammar foresees is guessed without scores.
Knows no model. Read next: ``drawn.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidInput
from specdec.proposers import Call
from specdec.proposers.drawn import certain, chance_of, mixed, sound
from specdec.proposers.foresight import Foresight
from specdec.records import Proposal
from specdec.state import State, span
from specdec.transfer import to_device
from specdec.whole import real


class Steps(Protocol):
    """What drafts, one token of every row a step."""

    def next_scores(self, state: State, step: int, guessing: np.ndarray) -> Tensor:
        """Processed scores (B, 1, V) for guess ``step``, on the target's device; of rows ``guessing`` (B,)."""
        ...

    def history(self, state: State, step: int) -> Tensor:
        """(B, capacity) committed tokens and the guesses before ``step``, for processors that look at them."""
        ...

    def write(self, state: State, guess: Tensor, columns: np.ndarray) -> None:
        """The last ``guess`` (B, 1) stands at ``columns`` (B,); the next step goes on from there."""
        ...


def draft(
    steps: Steps,
    state: State,
    limits: np.ndarray,
    call: Call,
    confidence: float | None,
    foresight: Foresight,
) -> Proposal:
    """Up to ``limits[b]`` (B,) guesses for row b, at least one for some row.

    Args:
        steps: what drafts.
        state: the committed tokens.
        limits: (B,) guesses that a row may submit.
        call: how tokens are drawn, and whether one more guess pays.
        confidence: a row stops after a guess whose own chance is below this, 0 never stops; None asks the call.
        foresight: what is foreseen.
    """
    guesses: list[Tensor] = []
    rows: list[Tensor] = []
    # behind a pass the first sum of arrays takes as long as a hundred later: all are made before
    most = span(limits)[1]
    every = np.arange(most)[:, None]
    columns, guessing = state.lengths + every, limits > every
    positions = columns - state.prompt_length
    goes_on = asked(call, confidence, state.device)
    asks = True  # until the call's draft length has had enough: then only what is foreseen is guessed
    for step in range(most):
        known = foresight.at(step, limits, steps.history)
        drafted = guessing[step] if known is None else (known < 0) & guessing[step]
        if not asks:
            limits, drafted = np.where(drafted, step, limits), np.zeros_like(drafted)
            guessing, most = limits > every, span(limits)[1]
            if step >= most:
                break
        guess, scores = _guess(steps, state, step, drafted, known, call, positions[step])
        guesses.append(guess)
        if call.sampling.keeps_logits:
            rows.append(scores)
        lowered = limits
        if confidence:
            sure = (chance_of(scores, guess) >= confidence).cpu().numpy()[:, 0]
            lowered = np.where(sure, limits, np.minimum(limits, step + 1))
        elif goes_on is not None:
            chance = chance_of(scores, guess).double().numpy()[:, 0]
            asks = goes_on(np.where(guessing[step], chance, 0.0)) and asks
        lowered = foresight.cut(step, lowered, guess)
        if lowered is not limits:
            limits, guessing, most = lowered, lowered > every, span(lowered)[1]
        if step + 1 >= most:
            break
        if not (asks or foresight.more):
            limits = np.minimum(limits, step + 1)
            break
        steps.write(state, guess, columns[step])
    return Proposal(torch.cat(guesses, dim=1), limits, torch.cat(rows, dim=1) if rows else None)


def _guess(
    steps: Steps,
    state: State,
    step: int,
    drafted: np.ndarray,
    known: np.ndarray | None,
    call: Call,
    positions: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """Guess ``step`` of every row (B, 1), and the scores (B, 1, V) that it is drawn from.

    Rows ``drafted`` (B,) are asked for scores, rows whose guess is ``known`` (B,) and not -1 are not; it is the new
    token at ``positions`` (B,).
    """
    if known is not None and not drafted.any():
        sure = to_device(known.clip(min=0)[:, None], state.device)
        return sure, certain(sure, state.vocabulary)
    scores = steps.next_scores(state, step, drafted)
    guess = call.sampling.guess(scores, positions)
    if call.sampling.keeps_logits:
        scores = sound(scores, guess < 0)
        guess = guess.clamp(min=0)
    if known is not None and (known >= 0).any():
        guess, scores = mixed(guess, scores, to_device(known[:, None], state.device))
    return guess, scores


def asked(call: Call, confidence: float | None, device: torch.device) -> Callable[[np.ndarray], bool] | None:
    """What says whether one more guess pays (``DraftLength.goes_on``), told chances that are on ``device``.

    None where nothing does, ``confidence`` does, or there would be a device to wait for.
    """
    return call.length.goes_on if confidence is None and device.type == "cpu" else None


class Sure:
    """A draft whose rows stop behind a guess that it is not sure of."""

    def __init__(self, confidence: Any) -> None:
        """Stop below ``confidence``; None leaves it to the call.

        Raises:
            InvalidInput: it is no probability.
        """
        found = None if confidence is None else real(confidence)
        if confidence is not None and (found is None or not 0 <= found <= 1):
            raise InvalidInput(f"confidence={confidence!r}; give a probability, a number from 0 to 1, or None")
        self._confidence = found

    def sure(self, confidence: float) -> Self:
        """The same draft, stopping below ``confidence``."""
        other = copy.copy(self)
        Sure.__init__(other, confidence)
        return other
