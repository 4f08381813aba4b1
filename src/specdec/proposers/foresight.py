"""What a grammar foresees along the guesses of a round, for a proposer that drafts step by step.

The draft asks before every step: rows whose next token is foreseen need no pass of the model, and where all are, no
pass is made; the model is fed the tokens with its next one. Which rows those are is settled by the tokens before.
Knows no model. Read next: ``jump.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from specdec.processing import Processing
from specdec.proposers import existing
from specdec.records import Proposal
from specdec.state import State
from specdec.transfer import to_host


class Foresight:
    """Foreseen ids of each row, from the committed tokens on."""

    def __init__(self, processing: Processing, state: State, limits: np.ndarray) -> None:
        """Ask about the committed tokens of rows that may guess up to ``limits`` (B,) tokens."""
        self._processing = processing
        self._state = state
        self._foresees = processing.foresees
        # for each row the ids that follow the tokens asked about last, as far as they are not used up
        self._runs: list[list[int]] = [[] for _ in limits]
        if self._foresees:
            self._ask(state.tokens, 0, limits)

    def covers(self, limits: np.ndarray) -> bool:
        """All guesses that may be made are foreseen, to the limit or to the end of the row."""
        pairs = zip(self._runs, limits, strict=True)
        return self._foresees and all(len(run) >= most or self._is_whole(run) for run, most in pairs)

    def proposal(self) -> Proposal:
        """What is foreseen, and nothing else."""
        return Proposal.certain(self._runs, self._state.device)

    @property
    def more(self) -> bool:
        """Some row's next guess is known."""
        return any(self._runs)

    def at(self, step: int, limits: np.ndarray, history: Callable[[State, int], Tensor]) -> np.ndarray | None:
        """(B,) foreseen ids for guess ``step``, -1 where the draft must be asked; None where nothing is foreseen.

        Args:
            step: guesses of each row so far.
            limits: (B,) guesses that each row may make in all.
            history: tells the committed tokens and the guesses so far (B, capacity).
        """
        if not self._foresees:
            return None
        if step:
            self._ask(history(self._state, step), step, limits)
        return np.array([run.pop(0) if run else -1 for run in self._runs], dtype=np.int64)

    def cut(self, step: int, limits: np.ndarray, guess: Tensor) -> np.ndarray:
        """(B,) ``limits``, lowered where ``guess`` (B, 1) is the last because it ends the row."""
        if not self._foresees:
            return limits
        return np.where(self._state.ends(to_host(guess)[:, 0]), np.minimum(limits, step + 1), limits)

    def _is_whole(self, run: list[int]) -> bool:
        return bool(run) and bool(self._state.ends(np.array(run[-1:])).all())

    def _ask(self, tokens: Tensor, step: int, limits: np.ndarray) -> None:
        """Ask for the rows that may go on and have nothing left."""
        used_up = np.array([not run for run in self._runs])
        most = np.where(used_up, (limits - step).clip(min=0), 0)
        found = self._processing.foresee(tokens, self._state.lengths + step, most)
        found = [existing(ids, self._state.vocabulary) for ids in found]
        self._runs = [new or old for new, old in zip(found, self._runs, strict=True)]
