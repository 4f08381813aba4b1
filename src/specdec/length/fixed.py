"""Always the same number of guesses. Read next: ``cost.py``."""

from __future__ import annotations

import numpy as np

from specdec.length import Opening
from specdec.records import Round


class Fixed:
    """``most`` guesses in every round."""

    goes_on = None  # whatever the chances of the guesses are

    def __init__(self, most: int) -> None:
        """Draft ``most`` >= 0 tokens a round."""
        self.most = most

    def next(self, room: int) -> int:
        """See ``DraftLength.next``."""
        return min(self.most, room)

    def free(self, runs: np.ndarray) -> int:
        """See ``DraftLength.free``."""
        return self.most

    def begins(self, opening: Opening | None = None) -> bool:
        """See ``DraftLength.begins``."""
        return True

    def within(self) -> Fixed:
        """See ``DraftLength.within``."""
        return Fixed(self.most)

    def fed(self, seconds: float, rows: int, columns: int) -> None:
        """Nothing to learn."""

    def observe(self, round_: Round, seconds: float) -> None:
        """Nothing to learn."""
