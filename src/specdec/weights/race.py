"""Races: which of some ways to the same product is the fastest one on this machine.

Kernels that multiply a few rows with a large matrix differ by factors: between libraries, between sizes, between
numbers of rows. Which wins is a fact of the machine, so it is timed, and a way that is not clearly faster than the
usual one is left alone. Knows no kernel. Read next: ``blocks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

TRIES = 5
CLEARLY = 0.9  # of the other's time
LEAST = 1 << 19  # numbers of a matrix: smaller ones stay in the processor's caches, and calls cost more than sums


def seconds(ways: Sequence[Callable[[], object]]) -> list[float]:
    """The least time of each of ``ways``, which take turns.

    What is called for the first time is slow, which the least of some leaves out, as it does a neighbour's work.
    """
    best = [float("inf")] * len(ways)
    for _ in range(1 + TRIES):
        for place, way in enumerate(ways):
            start = perf_counter()
            way()
            best[place] = min(best[place], perf_counter() - start)
    return best
