"""How the rows of a batch differ: a batch ends with its slowest row, so what its fastest gain helps little.

Each row's share of kept guesses, beside that of all rows, fades as other evidence does, and belongs to the running
call. What a batch gets on with in a round is a mean over its rows in which the slow ones weigh most. Knows no
clock. Read next: ``adaptive.py``.
"""

from __future__ import annotations

import numpy as np

from specdec.length.acceptance import FADE
from specdec.length.cost import tokens_per_round

ALIKE = 1.0  # guesses that a row is taken to have in common with the others
# of the power mean: infinity is the slowest row. Not quite: rows also end by themselves, and nobody knows when
SLOWEST = 6
NARROW = 4  # rounds after which a batch may be guessed one token more for


def together(tokens: np.ndarray) -> np.ndarray:
    """(...) what a batch gets on with whose rows get ``tokens`` (..., R), all above 0."""
    mean: np.ndarray = (tokens**-SLOWEST).mean(axis=-1) ** (-1 / SLOWEST)
    return mean


class Rows:
    """Fading counts of B rows: guesses asked for with all before them kept, and those kept of them."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._tried = self._kept = np.zeros(0)
        self._live = np.zeros(0, dtype=bool)
        self._rounds = 0  # with guesses

    def most(self, rows: int) -> float:
        """Guesses a round for so many live ``rows``, of drafts that tell their chances: a batch begins narrow.

        What is known of other texts, or of a draft by itself, promises all rows the same; that some get on slowly
        shows after some rounds, and a wide first one costs a short text more than it can bring.
        """
        return np.inf if rows < 2 else 1 + np.ceil(self._rounds / NARROW)

    def see(self, asked: int, live: np.ndarray, accepted: np.ndarray) -> None:
        """One round: guesses ``asked`` for of every row, rows that were ``live`` (B,), guesses kept (B,)."""
        if len(self._live) != len(live):
            self._tried = self._kept = np.zeros(len(live))
        self._live = live
        self._rounds += asked > 0
        if asked:
            self._tried = FADE * self._tried + np.where(live, np.minimum(accepted + 1, asked), 0)
            self._kept = FADE * self._kept + np.where(live, accepted, 0)

    def pace(self, survival: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What rounds with 0 .. K guesses bring, whose ``survival`` (K,) is that of all rows together.

        Returns:
            (K + 1,) tokens a row, and (K + 1, B) what one token more of a row adds to that, times the live rows; 1
            everywhere where rows do not differ.
        """
        tokens = tokens_per_round(survival)
        usual = self._kept.sum() / max(self._tried.sum(), 1e-9)
        if len(self._live) < 2 or not self._live.any() or not usual:
            return tokens, np.ones((len(tokens), 1))
        own = (self._kept + ALIKE * usual) / (self._tried + ALIKE) / usual
        chances = survival / np.concatenate(([1.0], survival[:-1]))
        each = np.stack([tokens_per_round(np.cumprod(np.minimum(chances * one, 1.0))) for one in own], axis=1)
        tokens = together(each[:, self._live])
        return tokens, np.where(self._live, (tokens[:, None] / each) ** (SLOWEST + 1), 0.0)
