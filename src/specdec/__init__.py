"""specdec: speculative decoding for Hugging Face models, batched, with exactly the target's output distribution.

    from specdec import SpeculativeGenerator

    gen = SpeculativeGenerator(target, draft)          # draft: a model, a Proposer, a word, or None
    out = gen.generate(**inputs, max_new_tokens=256)   # every argument of target.generate(); batches too
    gen.stats                                          # what the call did: rounds, drafted, accepted, seconds

Read next: ``loop.py``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.choosing import choose_layers
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
    from specdec.proposers.cascade import Cascade
    from specdec.proposers.draft_model import DraftModel
    from specdec.proposers.fallback import Fallback
    from specdec.proposers.layers import EarlyExit, LayerSkip
    from specdec.proposers.mixture import Mixture
    from specdec.proposers.ngram import NGram
    from specdec.proposers.recycling import Recycling
    from specdec.proposers.store import Store
    from specdec.proposers.suffix import Suffix
    from specdec.proposers.translated import TranslatedDraft
    from specdec.records import Proposal, Round, Stats
    from specdec.shaping import Chunk, Content, ShapedRelease, unpad
    from specdec.streaming import Tokens
    from specdec.weights.head import prune_head
    from specdec.weights.packed import Packing, pack_weights, unpack_weights
    from specdec.weights.quantized import quantize_draft

__version__ = "0.1.0"

_HOMES = {
    "specdec.choosing": ("choose_layers",),
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
    "specdec.proposers.cascade": ("Cascade",),
    "specdec.proposers.draft_model": ("DraftModel",),
    "specdec.proposers.fallback": ("Fallback",),
    "specdec.proposers.layers": ("EarlyExit", "LayerSkip"),
    "specdec.proposers.mixture": ("Mixture",),
    "specdec.proposers.ngram": ("NGram",),
    "specdec.proposers.recycling": ("Recycling",),
    "specdec.proposers.store": ("Store",),
    "specdec.proposers.suffix": ("Suffix",),
    "specdec.proposers.translated": ("TranslatedDraft",),
    "specdec.records": ("Proposal", "Round", "Stats"),
    "specdec.shaping": ("Chunk", "Content", "ShapedRelease", "unpad"),
    "specdec.streaming": ("Tokens",),
    "specdec.weights.head": ("prune_head",),
    "specdec.weights.packed": ("Packing", "pack_weights", "unpack_weights"),
    "specdec.weights.quantized": ("quantize_draft",),
}

__all__ = [
    "Cascade",
    "Chunk",
    "Content",
    "DraftModel",
    "EarlyExit",
    "Fallback",
    "InvalidInput",
    "InvalidProposal",
    "InvalidScores",
    "LayerSkip",
    "Mixture",
    "NGram",
    "Packing",
    "Proposal",
    "Proposer",
    "Recycling",
    "Round",
    "ShapedRelease",
    "SpecdecError",
    "SpeculativeGenerator",
    "Stats",
    "Store",
    "Suffix",
    "Tokens",
    "TranslatedDraft",
    "UnsupportedModel",
    "UnsupportedOption",
    "VocabularyMismatch",
    "choose_layers",
    "pack_weights",
    "prune_head",
    "quantize_draft",
    "unpack_weights",
    "unpad",
]


def __dir__() -> list[str]:
    """What there is, for notebooks that complete names."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import specdec`` alone stays cheap."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")
