"""How many tokens to draft next. One rule a file.

The non-anticipating rule: whether a token is submitted must be settled before its own value is looked at, and
never by the target's outcome in the same round (2211.17192 leaves this implicit; a rule that breaks it biases
the output). Past rounds, and guesses that are submitted in any case, may be looked at. Read next: ``fixed.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from specdec.records import Round


class Opening(NamedTuple):
    """What is known of a draft model before its prompt is fed, as shares of what the target takes.

    Attributes:
        work: multiplications for a token: what the prompt takes.
        reading: bytes of weights in a pass: what a guess takes of a plain round, where nothing was measured.
    """

    work: float
    reading: float


class DraftLength(Protocol):
    """How many guesses each row may submit in the next round."""

    most: int

    def next(self, room: int) -> int:
        """Guesses a row in the next round, at most ``room``; 0 decodes one step plainly."""
        ...

    def free(self, runs: np.ndarray) -> int:
        """How many guesses a row may make, whatever ``next`` says, where they are known without drafting.

        Args:
            runs: (R,) guesses of each live row that a processor's state foresees: all but certain.
        """
        ...

    @property
    def goes_on(self) -> Callable[[np.ndarray], bool] | None:
        """Says whether one more guess pays in the running round, to proposers that can ask without waiting.

        It is told (B,) the draft's own chance of the guess that each row has just made, 0 for rows that made none;
        that guess is submitted whatever the answer. None: it does not matter, and no chance need be computed.
        """
        ...

    def begins(self, opening: Opening | None = None) -> bool:
        """Whether a draft model shall guess in this round: it may not earn its prompt, or be one of several.

        Args:
            opening: what its prompt will cost, None once it is fed.
        """
        ...

    def within(self) -> DraftLength:
        """A rule of the same kind that knows nothing yet, for rounds that a proposer makes of its own."""
        ...

    def fed(self, seconds: float, rows: int, columns: int) -> None:
        """See how many seconds the target took for the prompt of so many rows and columns."""
        ...

    def observe(self, round_: Round, seconds: float) -> None:
        """See what a round did, and how long it took from its first guess to its commit."""
        ...
