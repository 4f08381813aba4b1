"""Earlier outputs to copy from, one shelf a tenant (SuffixDecoding, 2411.04975, keeps such a tree of past outputs).

Nothing is shared unless a store is given, and then only within one tenant: how fast a text comes out tells what
it was guessed from, so one tenant's text must never draft another's. Memory is bounded: a shelf has two halves,
texts go into the younger, and when that is full the older is dropped (an automaton cannot forget a single
text); of the tenants, the one that was idle longest is dropped. A store may be used by several threads.
Knows no proposal and no model. Read next: ``prediction.py``.
"""

from __future__ import annotations

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specdec.errors import InvalidInput
from specdec.proposers.automaton import NOTHING, SuffixAutomaton
from specdec.whole import at_least

FORMAT = "specdec-store-1"


class Store:
    """Outputs of earlier calls, kept apart by tenant, in memory; ``save`` and ``load`` for the disk."""

    def __init__(self, *, tokens: int = 100_000, tenants: int = 64) -> None:
        """Keep at most ``tokens`` tokens a tenant (about 0.5 KB each in memory) and ``tenants`` tenants."""
        self._half = at_least(4, "Store: tokens", tokens) // 2
        self._tenants = at_least(1, "Store: tenants", tenants)
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # what is copied is whole; a copy has a lock of its own
            return {name: copy.deepcopy(value) for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    def add(self, tenant: str, tokens: Sequence[int] | np.ndarray) -> None:
        """Keep a text (L,) of ``tenant``; of one longer than half a shelf, the end."""
        text = [int(token) for token in tokens[-(self._half - 1) :]]
        if not text:
            return
        with self._lock:
            self._shelf(tenant).add(text, self._half)

    def read(self, tenant: str) -> Reader:
        """A place in the texts of ``tenant``, at the beginning of a row."""
        with self._lock:
            shelf = self._shelves.get(_name(tenant))
            if shelf is None:
                return Reader([], self._lock)
            self._shelves.move_to_end(tenant)
            return Reader(shelf.halves, self._lock)

    def forget(self, tenant: str) -> None:
        """Drop every text of ``tenant``."""
        with self._lock:
            self._shelves.pop(_name(tenant), None)

    @property
    def tenants(self) -> list[str]:
        """Tenants of whom there are texts, the one idle longest first."""
        with self._lock:
            return list(self._shelves)

    def tokens(self, tenant: str) -> int:
        """Tokens kept of ``tenant``, the marks between texts included."""
        with self._lock:
            shelf = self._shelves.get(_name(tenant))
            return 0 if shelf is None else sum(len(half.text) for half in shelf.halves)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all texts to ``path`` (safetensors; tenants are named in its header), whole or not at all."""
        with self._lock:
            names = list(self._shelves)
            texts = {
                str(number): np.array([t for half in self._shelves[name].halves for t in half.text], dtype=np.int64)
                for number, name in enumerate(names)
            }
        unfinished = Path(f"{os.fspath(path)}.unfinished")
        save_file(texts, unfinished, metadata={"format": FORMAT, "tenants": json.dumps(names)})
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, tokens: int = 100_000, tenants: int = 64) -> Store:
        """Read what ``save`` wrote, into a store of the given size; the oldest texts are dropped first.

        Raises:
            InvalidInput: the file is no store.
        """
        store = cls(tokens=tokens, tenants=tenants)
        try:
            with safe_open(path, framework="numpy") as file:
                header: dict[str, Any] = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise InvalidInput(
                        f"{path} is no store: its format is {header.get('format')!r}, not {FORMAT!r}"
                    )
                for number, name in enumerate(json.loads(header["tenants"])):
                    for text in _texts(file.get_tensor(str(number))):
                        store.add(name, text)
        except (SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"{path} cannot be read as a store: {error}") from error
        return store

    def _shelf(self, tenant: str) -> _Shelf:
        shelf = self._shelves.setdefault(_name(tenant), _Shelf())
        self._shelves.move_to_end(tenant)
        while len(self._shelves) > self._tenants:
            self._shelves.popitem(last=False)
        return shelf


class _Shelf:
    """One tenant's texts: the older half, and the younger, which grows."""

    def __init__(self) -> None:
        self.halves = [SuffixAutomaton(), SuffixAutomaton()]

    def add(self, text: list[int], room: int) -> None:
        if len(self.halves[1].text) + len(text) + 1 > room:
            # a new list: who reads the old halves goes on reading them
            self.halves = [self.halves[1], SuffixAutomaton()]
        self.halves[1].extend([*text, NOTHING])


class Reader:
    """Follows one row's text through one tenant's texts."""

    def __init__(self, halves: list[SuffixAutomaton], lock: Lock) -> None:
        """Stand at the beginning of ``halves``, which may grow under ``lock``."""
        self._halves = halves
        self._places = [(0, 0) for _ in halves]
        self._lock = lock

    @property
    def matched(self) -> int:
        """Length of the longest end of the row's text that stands in the texts."""
        return max((matched for _, matched in self._places), default=0)

    def follow(self, tokens: Iterable[int]) -> None:
        """The row goes on with ``tokens``."""
        with self._lock:
            for number, half in enumerate(self._halves):
                place = self._places[number]
                for token in tokens:
                    place = half.advance(*place, token)
                self._places[number] = place

    def copy(self) -> Reader:
        """A second reader at the same place."""
        other = Reader(self._halves, self._lock)
        other._places = [*self._places]
        return other

    def guess(self, limit: int) -> list[int]:
        """Up to ``limit`` tokens that followed the longest match; the younger half at a tie."""
        if not self.matched:
            return []
        with self._lock:
            best = max(range(len(self._halves)), key=lambda number: (self._places[number][1], number))
            return self._halves[best].continuation(self._places[best][0], limit)


def _name(tenant: str) -> str:
    if not isinstance(tenant, str):
        raise InvalidInput(f"a tenant is a {type(tenant).__name__}; give a string")
    return tenant


def _texts(tokens: np.ndarray) -> Iterable[np.ndarray]:
    """The texts between the marks."""
    ends = np.flatnonzero(tokens == NOTHING)
    start = 0
    for end in ends:
        yield tokens[start:end]
        start = int(end) + 1
