"""What a round brings and what it costs: the formulas, for the run-time controller and for advice to users.

With survival s_i the chance that guess i of a round is submitted and kept, and T(w) the seconds of a round whose
widest row guessed w tokens, a draft length of k brings 1 + s_1 + ... + s_k tokens a row for T(k) seconds, and the
best k brings most tokens a second. k = 0 is plain decoding. With constant acceptance and cost ratio this is
Leviathan et al. 2023 (2211.17192), theorem 3.8. Knows no model and no clock. Read next: ``acceptance.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Before the first round with guesses was timed, a guess is taken to cost half a plain round: careful, so that the
# first try is a short one.
UNTIMED_GUESS = 0.5
SHORTEST = 1e-9  # seconds of a round
REMEMBERED = 5  # timings a width: few, so that a growing context or a busier machine is noticed
CLEARLY_LESS = 0.75  # of the seconds that a width is known to take: those were a neighbour's, or a first pass'
OUTDATED = 48  # rounds with guesses after which a width that does not come again loses a timing: it may have been
# beside a neighbour's work


def tokens_per_round(survival: Sequence[float] | np.ndarray) -> np.ndarray:
    """(K + 1,) expected tokens of a row in a round with 0 .. K guesses, from their survival (K,)."""
    return 1 + np.concatenate(([0.0], np.cumsum(np.asarray(survival, dtype=np.float64))))


def speed(acceptance: float, cost: float, guesses: int, *, verify: float = 1.0) -> float:
    """Expected speed against plain decoding, every guess being kept with the same chance.

    Args:
        acceptance: in [0, 1], chance that a guess is kept when all before it were.
        cost: seconds of a draft step over seconds of a one-token pass of the target.
        guesses: k >= 0.
        verify: seconds of a (k + 1)-token pass of the target over those of a one-token pass.
    """
    tokens = float(tokens_per_round(acceptance ** np.arange(1, guesses + 1))[-1])
    return tokens / (guesses * cost + verify)


def best_length(tokens: np.ndarray, seconds: np.ndarray) -> int:
    """The number of guesses with most tokens (K + 1,) a second (K + 1,); the shortest of equals."""
    return int(np.argmax(tokens / seconds))


class Timings:
    """Measured seconds of rounds by width, and what they say of widths that were not measured.

    Calls in several threads may add to the same ones: what is known is exchanged and never written into.
    """

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self._seen: dict[int, tuple[float, ...]] = {}
        self.age = 0  # rounds with guesses of a draft since a plain one was timed, or asked for
        self._rounds = 0  # with guesses
        self._came: dict[int, int] = {}  # the round in which a width came last, or lost a timing

    def add(self, width: int, seconds: float) -> None:
        """A round whose widest row guessed ``width`` tokens took ``seconds``."""
        self.age = self.age + 1 if width else 0
        # a clock may stand still, as in a test that freezes it
        seen = {**self._seen, width: (*self._seen.get(width, ()), max(seconds, SHORTEST))[-REMEMBERED:]}
        self._rounds += width > 0
        self._came[width] = self._rounds
        # the narrowest stays priced: probes time it again
        for other in sorted(seen.keys() - {0})[1:]:
            if self._rounds - self._came.get(other, 0) >= OUTDATED:
                seen[other] = seen[other][1:]
                self._came[other] = self._rounds
        self._seen = {width: timed for width, timed in seen.items() if timed}

    def at_most(self, width: int, seconds: float) -> None:
        """Such a round and something more took ``seconds``: believed where that is clearly less than is known."""
        table = self.table(width) if self.priced else None
        if table is not None and seconds < CLEARLY_LESS * float(table[width]):
            self.add(width, seconds)

    def afresh(self) -> Timings:
        """The same kind, with nothing measured yet."""
        return Timings()

    def heard(self, seconds: float) -> float:
        """What a clock said, as far as it is listened to."""
        return seconds

    @property
    def priced(self) -> bool:
        """Some round with guesses was timed."""
        return max(self._seen, default=0) > 0

    @property
    def known(self) -> float:
        """How well a plain round's seconds are known, from 0 to 1: the first ones of a process are slow."""
        return len(self._seen.get(0, ())) / REMEMBERED

    def table(self, most: int, wider: float = np.inf, least: float = 0.0) -> np.ndarray | None:
        """(most + 1,) seconds of a round by width, never falling; None until a plain round was timed.

        Between measured widths the line between them holds, beyond the widest the line from the plain round
        through it, or one that rises by ``wider`` a guess where that is less; a quarter of the former at least, and
        ``least`` plain rounds a guess.
        """
        seen = self._seen
        if 0 not in seen:
            return None
        widths = sorted(seen)
        # the lower median: one slow round is a neighbour's doing, not the width's
        medians = [sorted(seen[width])[(len(seen[width]) - 1) // 2] for width in widths]
        seconds = rising(medians, [len(seen[width]) for width in widths])
        plain, widest = seconds[0], widths[-1]
        slope = (seconds[-1] - plain) / widest if widest else UNTIMED_GUESS * plain
        # kernels for a few tokens may cost several times that for one, and for more hardly more
        slope = slope if len(seconds) < 2 else max(min(slope, wider), slope / 4)
        slope = max(slope, least * plain)  # the first plain rounds are slow, and a guess beside them seems free
        asked = np.arange(most + 1)
        table: np.ndarray = np.interp(asked, widths, seconds) + np.maximum(asked - widest, 0) * slope
        return table


class Assumed:
    """Seconds that are not measured, so that a seed alone decides the text (``Timings`` answers differently)."""

    priced = True
    age = 0  # never out of date
    known = 1.0

    def __init__(self, cost: float) -> None:
        """A guess costs ``cost`` plain rounds."""
        self._cost = cost

    def afresh(self) -> Assumed:
        """See ``Timings.afresh``."""
        return self

    def heard(self, seconds: float) -> float:
        """See ``Timings.heard``."""
        return 0.0

    def add(self, width: int, seconds: float) -> None:
        """What the clock says is not listened to."""

    def at_most(self, width: int, seconds: float) -> None:
        """Nor here."""

    def table(self, most: int, wider: float = np.inf, least: float = 0.0) -> np.ndarray:
        """See ``Timings.table``."""
        return 1 + self._cost * np.arange(most + 1)


def rising(values: Sequence[float], weights: Sequence[int]) -> np.ndarray:
    """The never-falling sequence nearest to ``values`` in weighted squares: neighbours out of order are pooled."""
    pools: list[tuple[float, int, int]] = []  # mean, weight, members
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (low, light, few), (mean, heavy, many) = pools.pop(), pools.pop()
            total = light + heavy
            pools.append(((low * light + mean * heavy) / total, total, few + many))
    return np.repeat([mean for mean, _, _ in pools], [members for _, _, members in pools])
