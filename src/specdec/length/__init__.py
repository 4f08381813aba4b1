"""How many tokens to draft next. One rule a file; a rule sees past rounds only.

The non-anticipating rule: whether a token is submitted must be settled before its own value is looked at, and
never by the target's outcome in the same round (2211.17192 leaves this implicit; a rule that breaks it biases
the output). Read next: ``fixed.py``.
"""

from __future__ import annotations

from typing import Protocol

from specdec.records import Round


class DraftLength(Protocol):
    """How many guesses each row may submit in the next round."""

    most: int

    def next(self) -> int:
        """Guesses a row in the next round; 0 decodes one step plainly."""
        ...

    def observe(self, round_: Round) -> None:
        """See what a round did."""
        ...
