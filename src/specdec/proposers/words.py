"""Drafts by name: what a word, a model or a proposer stands for wherever a draft may be given.

Knows no target. Read next: ``cascade.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specdec.errors import InvalidInput, UnsupportedModel
from specdec.proposers.draft_model import DraftModel
from specdec.proposers.ngram import NGram
from specdec.proposers.recycling import Recycling
from specdec.proposers.suffix import Suffix

# drafts that are no model, by the word for them
WORDS: dict[str, Callable[[], Any]] = {"ngram": NGram, "recycling": Recycling, "suffix": Suffix}


def named(draft: Any) -> Any:
    """The proposer that ``draft``, a part of a larger one, stands for: a word, a Hugging Face model or a proposer.

    Raises:
        InvalidInput: a word that is not known.
        UnsupportedModel: nothing of the three.
    """
    if isinstance(draft, str):
        if draft not in WORDS:
            raise InvalidInput(
                f"{draft!r} is no known proposer here; use {', '.join(map(repr, WORDS))}, a model or a proposer"
            )
        return WORDS[draft]()
    if not isinstance(draft, type):
        if hasattr(draft, "propose") or hasattr(draft, "begin"):
            return draft
        if hasattr(draft, "generate") and hasattr(draft, "config"):
            return DraftModel(draft)
    raise UnsupportedModel(
        f"{draft!r} cannot draft; wanted is a Hugging Face model, an object with propose(state, limits), or one "
        f"of {', '.join(map(repr, WORDS))}"
    )
