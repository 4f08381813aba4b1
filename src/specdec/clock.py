"""The clock of the rounds: seconds without those that happen once, such as compiling.

What a round has cost shall say what the next one will. Knows nothing else. Read next: ``transfer.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

_here = threading.local()  # .once: seconds of this thread that the clock does not see


def clock() -> float:
    """Seconds, those of ``happens_once`` in this thread left out."""
    seconds: float = perf_counter() - getattr(_here, "once", 0.0)
    return seconds


@contextmanager
def happens_once() -> Iterator[None]:
    """While this lasts, the clock of this thread stands still."""
    start = perf_counter()
    try:
        yield
    finally:
        _here.once = getattr(_here, "once", 0.0) + perf_counter() - start
