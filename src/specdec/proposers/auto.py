"""What ``draft="auto"`` stands for: drafts that need nothing but the text, and the better of them wins.

Where the text repeats something, the longest match is copied; where it does not, what the target itself scored best
is recycled. ``mixture.py`` finds out which, row by row, and the draft length decides whether either pays.
Whoever knows more should say so: a model of the same family drafts better in free text, and a text that is
expected goes in as ``prediction``, which comes before any draft. Read next: ``../length/__init__.py``.
"""

from __future__ import annotations

from typing import Any

from specdec.proposers.mixture import Mixture


def automatic() -> Any:
    """The draft for who has none: no second model, next to no time of its own."""
    return Mixture("suffix", "recycling")
