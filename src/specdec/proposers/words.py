"""Drafts by name: what a word, a model or a proposer stands for wherever a draft may be given.

Knows no target. Read next: ``ngram.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specdec.errors import InvalidInput, UnsupportedModel
from specdec.proposers import is_proposer
from specdec.proposers.draft_model import DraftModel
from specdec.proposers.fallback import Fallback
from specdec.proposers.ngram import NGram
from specdec.proposers.recycling import Recycling
from specdec.proposers.suffix import Suffix
from specdec.weights.adapters import is_model

# drafts that are no model, by the word for them
WORDS: dict[str, Callable[[], Any]] = {"ngram": NGram, "recycling": Recycling, "suffix": Suffix}
# the same where another draft guesses when they do not: longer matches only
AHEAD: dict[str, Callable[[], Any]] = {
    "ngram": lambda: NGram(longest=6, shortest=4),
    "suffix": lambda: Suffix(shortest=4),
}


def named(draft: Any) -> Any:
    """The proposer that ``draft``, a part of a larger one, stands for: a word, a Hugging Face model or a proposer.

    Raises:
        InvalidInput: a word that is not known, or a list.
        UnsupportedModel: nothing of the three.
    """
    if isinstance(draft, str):
        if draft not in WORDS:
            raise InvalidInput(
                f"{draft!r} is no known proposer here; use {', '.join(map(repr, WORDS))}, a model or a proposer"
            )
        return WORDS[draft]()
    if isinstance(draft, (list, tuple)):
        raise InvalidInput("a list cannot stand among several drafts; give them one by one, or Fallback(a, b)")
    if not isinstance(draft, type):
        if is_proposer(draft):
            return draft
        if is_model(draft):
            return DraftModel(draft)
    came = f"the class {draft.__name__}" if isinstance(draft, type) else f"a {type(draft).__name__}"
    raise UnsupportedModel(
        f"{came} cannot draft; wanted is a Hugging Face model, an object with propose(state, limits), or one "
        f"of {', '.join(map(repr, WORDS))}"
    )


def one_behind_another(drafts: Sequence[Any], build: Callable[[Any], Any]) -> Any:
    """What a list of drafts stands for: each guesses for the rows that all before it have no guess for.

    Args:
        drafts: one or more.
        build: makes the proposer of one of them.

    Raises:
        InvalidInput: the list is empty, or holds None.
    """
    if not drafts or any(one is None for one in drafts):
        came = ", ".join(repr(one) if isinstance(one, (str, type(None))) else type(one).__name__ for one in drafts)
        raise InvalidInput(f"draft=[{came}]; a list holds one draft or more, none of them None")
    proposer = build(drafts[-1])
    for one in reversed(drafts[:-1]):
        sure = isinstance(one, str) and one in AHEAD
        proposer = Fallback(AHEAD[one]() if sure else build(one), proposer)
    return proposer
