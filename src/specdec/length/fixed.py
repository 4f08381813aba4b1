"""Always the same number of guesses. Read next: ``../processing.py``."""

from __future__ import annotations

from specdec.records import Round


class Fixed:
    """``most`` guesses in every round."""

    def __init__(self, most: int) -> None:
        """Draft ``most`` >= 0 tokens a round."""
        self.most = most

    def next(self) -> int:
        """See ``DraftLength.next``."""
        return self.most

    def observe(self, round_: Round) -> None:
        """Nothing to learn."""
