"""Numbers, whoever made them: Python's, numpy's and torch's are the same to a user.

Knows nothing else. Read next: ``lockstep.py``.
"""

from __future__ import annotations

from operator import index
from typing import Any

from specdec.errors import InvalidInput


def whole(number: Any) -> int | None:
    """``number`` as Python's own if it is a whole one, else None; True and False are none."""
    if _is_truth(number):
        return None
    try:
        return index(number)
    except TypeError:
        return None


def real(number: Any) -> float | None:
    """``number`` as Python's own if it is a real one, else None; a text is none, nor are True and False."""
    if isinstance(number, (str, bytes)) or _is_truth(number):
        return None
    try:
        return float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _is_truth(number: Any) -> bool:
    return isinstance(number, bool) or str(getattr(number, "dtype", "")).endswith("bool")


def at_least(least: int, name: str, number: Any, wanted: str = "") -> int:
    """``number``, a whole one from ``least`` on.

    Args:
        least: the smallest that there may be.
        name: what the caller calls it.
        number: what came.
        wanted: said in place of "a whole number >= ``least``".

    Raises:
        InvalidInput: it is none.
    """
    found = whole(number)
    if found is None or found < least:
        raise InvalidInput(f"{name}={number!r}; give {wanted or f'a whole number >= {least}'}")
    return found
