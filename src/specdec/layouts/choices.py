"""Which layouts come into question for a model and a call, in order of preference; the self-check tries them.

Knows what configs say (``facts.py``) and nothing of scores. Read next: ``check.py``.
"""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import QuantizedLayer

from specdec.errors import InvalidInput
from specdec.layouts import NEVER, Layout
from specdec.layouts.check import Candidate
from specdec.layouts.columns import Columns
from specdec.layouts.facts import counts_from_last_key, one_token_reason, slots_reason
from specdec.layouts.forget import own_cache
from specdec.layouts.handover import is_callers, static_columns
from specdec.layouts.slots import Slots

LAYOUTS = ("auto", "slots", "columns", "snapshot", "plain")


def choices(
    columns: Columns, wanted: str, prompt: Tensor, longest: int, is_draft: bool
) -> tuple[dict[str, Candidate], str]:
    """Makers of layouts by name, the last being taken untried, and why only one-token steps are exact, or "".

    Args:
        columns: what has fed the prompt.
        wanted: "auto", or one of ``LAYOUTS`` to force it.
        prompt: (B, P) ids.
        longest: columns that a row of ids may reach.
        is_draft: a draft is rolled back even where it can only take one-token steps.

    Raises:
        InvalidInput: a wanted layout does not exist or would not be exact.
    """
    model, reach = columns.model, longest + columns.hidden
    reason = one_token_reason(model, int(prompt.shape[1]) + columns.hidden, reach, len(prompt))
    if not reason and columns.is_foreign:
        reason = "its past is of a form of its own, which cannot be put back"
    if not reason and is_callers(columns.cache):
        own = own_cache(columns.cache)
        kinds = map(type, (own, *getattr(own, "layers", ())))
        strange = next((kind.__name__ for kind in kinds if _may_change(kind)), None)
        reason = f"a {strange} may come to change what it holds" if strange else ""
    if not reason and static_columns(columns.cache) < NEVER and counts_from_last_key(model):
        reason = "it counts its window from the last key, and a static cache has keys of columns to come"
    slotless = slots_reason(model, reach, len(prompt))
    makers = {**MAKERS, "slots": lambda columns: Slots(columns, longest)}
    if wanted != "auto":
        if wanted not in LAYOUTS:
            raise InvalidInput(f"layout={wanted!r} does not exist; use one of {LAYOUTS}")
        if wanted == "slots":
            reason = reason or slotless
        if wanted != "plain" and reason:
            raise inexact(wanted, reason)
        return {wanted: makers[wanted], "plain": plain}, reason
    last = "one by one" if is_draft else "plain"
    names = [last] if reason else ["slots", "columns", "snapshot", last]
    if slotless and not reason:
        names.remove("slots")
    return {name: makers[name] for name in names}, reason


def _may_change(kind: type) -> bool:
    """Whether what a cache or a layer of this ``kind`` holds may depend on how many tokens are fed at once."""
    # those that quantise do so whenever enough tokens have come together
    return not kind.__module__.startswith("transformers.") or issubclass(kind, QuantizedLayer)


def inexact(layout: str, reason: str) -> InvalidInput:
    """The error for a layout that was named and does not fit."""
    return InvalidInput(f'layout={layout!r} would not be exact with this model: {reason}; leave it to "auto"')


def plain(columns: Columns) -> Layout:
    """One-token steps only."""
    return columns.become("nothing")


MAKERS: dict[str, Candidate] = {
    "columns": lambda columns: columns.become("crop"),
    "snapshot": lambda columns: columns.become("snapshot"),
    "one by one": lambda columns: columns.become("snapshot", wide=False),
    "plain": plain,
}
