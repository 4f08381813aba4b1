"""The errors of the library: one tree, every message says what came, what is wanted, what to do.

    SpecdecError
    ├── InvalidInput          the prompt or an argument cannot be used as given
    ├── UnsupportedOption     an option of ``generate()`` that is not honoured (yet); named
    ├── UnsupportedModel      a model that cannot play the part it was given
    ├── VocabularyMismatch    draft and target do not share their token ids, and nothing says how to translate
    ├── InvalidProposal       a proposer returned something that is no proposal
    └── InvalidScores         the target's scores hold NaN, or forbid every token

Imports nothing of ours. Read next: ``whole.py``.
"""

from __future__ import annotations

# what a model raises about inputs that it was not made for; anything else (a timeout, a cancellation) is its user's
FAULTS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, NameError,
    ImportError,
)  # fmt: skip


class SpecdecError(Exception):
    """Base of every error that this library raises on purpose."""


class InvalidInput(SpecdecError, ValueError):
    """The prompt or an argument cannot be used as given."""


class UnsupportedOption(SpecdecError, ValueError):
    """An option of ``generate()`` that is not honoured; never dropped in silence."""

    def __init__(self, option: str, instead: str) -> None:
        """Name the option and what to do instead."""
        self.option = option
        super().__init__(f"`{option}` is not supported by SpeculativeGenerator.generate(): {instead}")


class UnsupportedModel(SpecdecError, ValueError):
    """A model that cannot play the part it was given."""


class VocabularyMismatch(SpecdecError, ValueError):
    """Draft and target do not share their token ids."""


class InvalidProposal(SpecdecError, ValueError):
    """A proposer returned something that is no proposal."""


class InvalidScores(SpecdecError, RuntimeError):
    """The target's scores hold NaN, or forbid every token."""
