"""transformers' own options for assisted decoding, understood where they mean the same here.

``assistant_model=``, ``prompt_lookup_num_tokens=`` and their companions name a draft, how many tokens it guesses
and when it stops. They hold for the call they are given to, before what ``SpeculativeGenerator`` was made with.
Knows no rounds. Read next: ``attaching.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.errors import InvalidInput, UnsupportedOption
from specdec.proposers.layers import EarlyExit
from specdec.proposers.ngram import NGram
from specdec.whole import at_least

# arguments that are read here and that generate() must not see: it would take them for its own assisted decoding
UNDERSTOOD = (
    "assistant_model",
    "assistant_tokenizer",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)
MATCHED = 2  # tokens that prompt lookup matches at most when nothing is said


@dataclass(frozen=True)
class Assistance:
    """What a call asks for.

    Attributes:
        draft: what guesses, as for ``SpeculativeGenerator``; None keeps the generator's own.
        tokenizer: the draft's, or None.
        num_draft_tokens: guesses a round and row, or None for the generator's own.
        confidence: a model stops guessing below this chance, or None.
    """

    draft: Any = None
    tokenizer: Any = None
    num_draft_tokens: int | None = None
    confidence: float | None = None


def read_assistance(has_draft: bool, config: Any, own: Any, given: dict[str, Any]) -> Assistance | None:
    """What a call asks for, or None for nothing.

    Args:
        has_draft: the generator has a draft; it counts before ``own``.
        config: the ``generation_config`` of the call, or None.
        own: the target's ``generation_config``.
        given: arguments of the call.

    Raises:
        InvalidInput: a number out of range, or two drafts at once.
        UnsupportedOption: a knob without the draft that it belongs to.
    """
    sources = [given, config] if has_draft else [given, config, own]
    lookup = first_given(sources, "prompt_lookup_num_tokens")
    model = given.get("assistant_model")
    early = first_given(sources, "assistant_early_exit") or None
    number = given.get("num_assistant_tokens")
    confidence = given.get("assistant_confidence_threshold")
    matched = given.get("max_matching_ngram_size")
    named = {"assistant_model": model, "prompt_lookup_num_tokens": lookup, "assistant_early_exit": early}
    asked = [name for name, draft in named.items() if draft is not None]
    if len(asked) > 1:
        raise InvalidInput(f"{' and '.join(asked)} are several drafts; give one of them")
    if model is None and given.get("assistant_tokenizer") is not None:
        raise UnsupportedOption(
            "assistant_tokenizer", "give assistant_model with it, or draft_tokenizer to SpeculativeGenerator"
        )
    if lookup is not None:
        longest = at_least(1, "max_matching_ngram_size", first_given(sources, "max_matching_ngram_size") or MATCHED)
        number = lookup if number is None else number
        return Assistance(
            NGram(longest=longest),
            num_draft_tokens=at_least(1, "prompt_lookup_num_tokens", number),
            confidence=confidence,
        )
    if matched is not None:
        raise UnsupportedOption(
            "max_matching_ngram_size", "give prompt_lookup_num_tokens with it, or draft=NGram(longest=...)"
        )
    if early is not None:
        model = EarlyExit(at_least(1, "assistant_early_exit", early))
    elif model is not None:
        settings = getattr(model, "generation_config", None)
        if number is None:
            number = getattr(settings, "num_assistant_tokens", None)
        if confidence is None:
            confidence = getattr(settings, "assistant_confidence_threshold", None)
    if model is None and number is None and confidence is None:
        return None
    number = None if number is None else at_least(1, "num_assistant_tokens", number)
    return Assistance(model, given.get("assistant_tokenizer"), number, confidence)


def first_given(sources: Sequence[Any], name: str) -> Any:
    """What the first of ``sources`` (arguments, configs or None) that says something about ``name`` says.

    An argument that is None says something as well: it takes back what a config has.
    """
    for source in sources:
        if isinstance(source, dict) and name in source:
            return source[name]
        found = getattr(source, name, None)
        if found is not None:
            return found
    return None
