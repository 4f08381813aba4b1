"""specdec: speculative decoding for Hugging Face models, batched, with exactly the target's output distribution.

    from specdec import SpeculativeGenerator

    gen = SpeculativeGenerator(target, draft)          # draft: a model, a Proposer, "ngram", or None
    out = gen.generate(**inputs, max_new_tokens=256)   # every argument of target.generate(); batches too
    gen.stats                                          # what the call did: rounds, drafted, accepted, seconds

Read next: ``generator.py``, the front door; ``loop.py`` is the heart.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.errors import (
        InvalidInput,
        InvalidProposal,
        InvalidScores,
        SpecdecError,
        UnsupportedModel,
        UnsupportedOption,
        VocabularyMismatch,
    )
    from specdec.generator import SpeculativeGenerator
    from specdec.proposers import Proposer
    from specdec.proposers.draft_model import DraftModel
    from specdec.proposers.ngram import NGram
    from specdec.records import Proposal, Round, Stats
    from specdec.streaming import Tokens

__version__ = "0.1.0"

_HOMES = {
    "specdec.errors": (
        "InvalidInput",
        "InvalidProposal",
        "InvalidScores",
        "SpecdecError",
        "UnsupportedModel",
        "UnsupportedOption",
        "VocabularyMismatch",
    ),
    "specdec.generator": ("SpeculativeGenerator",),
    "specdec.proposers": ("Proposer",),
    "specdec.proposers.draft_model": ("DraftModel",),
    "specdec.proposers.ngram": ("NGram",),
    "specdec.records": ("Proposal", "Round", "Stats"),
    "specdec.streaming": ("Tokens",),
}

__all__ = [
    "DraftModel",
    "InvalidInput",
    "InvalidProposal",
    "InvalidScores",
    "NGram",
    "Proposal",
    "Proposer",
    "Round",
    "SpecdecError",
    "SpeculativeGenerator",
    "Stats",
    "Tokens",
    "UnsupportedModel",
    "UnsupportedOption",
    "VocabularyMismatch",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import specdec`` alone stays cheap."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")
