"""How likely guesses are kept: counts of past rounds, by position and by the draft's own chance.

Old rounds fade, so that a draft that turns good or bad is noticed; where there is little evidence, a position
borrows from its neighbours and all from a prior. Knows no clock. Read next: ``rows.py``.
"""

from __future__ import annotations

import copy

import numpy as np

FADE = 0.93  # what a round is worth after the next one: a memory of about fourteen rounds
PRIOR, PRIOR_WEIGHT = 0.7, 2.0  # before anything is known, in rounds
ROUND_WEIGHT = 4  # rows of a batch are alike: together they count no more than this many rounds of one row
DOUBT = 2.0  # rounds that are still believed once drafting has been switched off
TEXTS, BEST = 4, 2  # texts that are remembered, and how many of them, the best, say what to expect of the next one
TEXT_WEIGHT, TEXT_PRIOR = 3.0, 0.5  # guesses that a text counts for at most, and what is believed before any
TEXT_FADE = 0.9  # what remembered texts are worth after one in which nothing was tried
BINS, BIN_WEIGHT = 8, 4.0


class Acceptance:
    """Fading counts over positions 0 .. ``most`` - 1 of a round."""

    def __init__(self, most: int) -> None:
        """Know nothing yet of up to ``most`` guesses a round."""
        self._tried = np.zeros(most)  # asked for, all guesses before it kept
        self._kept = np.zeros(most)  # of these: submitted and kept
        self._asked = np.zeros(most)  # rounds that asked for it
        self._wide = np.zeros(most)  # of these: some row submitted it
        self._judged = np.zeros(2)  # guesses submitted, all before them kept; of these: kept
        self._texts: list[np.ndarray] = []  # of each earlier one (2, 2): tried and kept; judged and kept
        self._sure = np.zeros(BINS)  # guesses by their own chance, all guesses before them kept
        self._right = np.zeros(BINS)  # of these: kept

    def add(self, asked: int, lengths: np.ndarray, accepted: np.ndarray, chances: list[np.ndarray]) -> None:
        """One round.

        Args:
            asked: guesses a row that were asked for.
            lengths: (R,) submitted by each row that was live.
            accepted: (R,) kept of them.
            chances: one (R,) for each guess whose own chance the proposer told.
        """
        rows = len(lengths)
        if not asked or not rows:
            return
        for counts in (*self._beliefs, self._asked, self._wide):
            counts *= FADE
        weight = min(rows, ROUND_WEIGHT) / rows
        for place in range(asked):
            tried, kept = accepted >= place, accepted > place
            self._tried[place] += weight * np.count_nonzero(tried)
            self._kept[place] += weight * np.count_nonzero(kept)
            self._judged += weight * np.array([np.count_nonzero(tried & (lengths > place)), np.count_nonzero(kept)])
        self._asked[:asked] += 1
        self._wide[: min(asked, int(lengths.max()))] += 1
        for place, chance in enumerate(chances):
            # a row without a chance of its own was guessed for by another proposer (``proposers/fallback.py``)
            judged = (lengths > place) & (accepted >= place) & (chance > 0)
            bins = _bins(chance[judged])
            np.add.at(self._sure, bins, weight)
            np.add.at(self._right, bins, weight * (accepted[judged] > place))

    def another_text(self) -> Acceptance:
        """What to expect of the next text: what was kept of the best of the last ones, and no more than that.

        Texts differ, and a first guess that shows one to be good earns more than one that is lost. A text in which
        nothing was tried lets the earlier ones fade: a draft that was given up is asked again.
        """
        other = copy.deepcopy(self)
        counts = np.array([[self._tried.sum(), self._kept.sum()], self._judged])
        if counts[0, 0]:
            counts *= np.minimum(1, TEXT_WEIGHT / np.maximum(counts[:, :1], 1e-9))
            other._texts = [*self._texts, counts][-TEXTS:]
        else:
            other._texts = [TEXT_FADE * text for text in self._texts]
        other.doubt()  # how far the draft's own chances can be trusted is the draft's, not the text's
        for belief in (other._tried, other._kept, other._judged):
            belief *= 0
        return other

    def doubt(self) -> None:
        """Drafting was switched off: believe little of the past, so that a few good probes are enough."""
        share = min(1.0, DOUBT / max(float(self._tried[0]), 1e-9))
        for counts in self._beliefs:
            counts *= share

    @property
    def _beliefs(self) -> tuple[np.ndarray, ...]:
        return self._tried, self._kept, self._judged, self._sure, self._right

    def _expected(self, which: int) -> float:
        """Chance that a guess is kept, from what was tried (0) or judged (1) in earlier texts."""
        known = [
            (kept + TEXT_PRIOR * PRIOR) / (tried + TEXT_PRIOR) for tried, kept in (t[which] for t in self._texts)
        ]
        return float(np.mean(sorted([PRIOR] * (TEXTS - len(known)) + known)[-BEST:]))

    @property
    def overall(self) -> float:
        """Chance that a submitted guess is kept when all before it were, whatever its position."""
        judged, kept = self._judged
        return float((kept + PRIOR_WEIGHT * self._expected(1)) / (judged + PRIOR_WEIGHT))

    def survival(self) -> np.ndarray:
        """(most,) chance that the guess at each position is submitted and kept, if it is asked for."""
        return survival(self._kept, self._tried, self._expected(0), PRIOR_WEIGHT)

    def widths(self) -> np.ndarray:
        """(most,) chance that some row submits a guess at each position, if it is asked for."""
        return (self._wide + 1) / (self._asked + 1)

    def of_chance(self, chance: np.ndarray) -> np.ndarray:
        """Chance (R,) that guesses are kept to which the draft itself gave ``chance`` (R,)."""
        bins = _bins(chance)
        kept: np.ndarray = (self._right[bins] + BIN_WEIGHT * chance) / (self._sure[bins] + BIN_WEIGHT)
        return kept


def survival(kept: np.ndarray, tried: np.ndarray, expected: float, weight: float) -> np.ndarray:
    """(..., K) chance that each guess and all before it are kept, from counts (..., K) of those kept and tried.

    A position borrows from all, with the ``weight`` of so many guesses, and these from what is ``expected``.
    """
    usual = (kept.sum(axis=-1, keepdims=True) + weight * expected) / (tried.sum(axis=-1, keepdims=True) + weight)
    return np.cumprod((kept + weight * usual) / (tried + weight), axis=-1)


def _bins(chance: np.ndarray) -> np.ndarray:
    return np.clip((chance * BINS).astype(np.int64), 0, BINS - 1)
