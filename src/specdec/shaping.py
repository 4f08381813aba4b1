"""Tokens in chunks of one size on a fixed clock: who watches the wire learns how long a text is, and no more.

How many tokens a round brings depends on how well the draft guesses, and that on the text: number and times of
packets tell prompts apart ("When Speculation Spills Secrets", 2411.01076; "Whisper Leak", 2511.03675). So a row's
tokens leave in chunks at start + i × interval, i = 1, 2, ...; every chunk has ``pad_to`` bytes, whatever is inside;
token j (from 0) is in no chunk before number j // N + 1; and the number of chunks is rounded up to a multiple of
``bucket``. Where every token is final when it is due, that number is a function of the text's length alone: of its
tokens, or of its bytes if they need more room. A late token travels in a later chunk: those in between keep their
time and size, and only the number at the end may grow. What is not hidden: ``docs/private-streaming.md``.
Knows no model and no round. Read next: ``testing.py``.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from specdec.ahead import Ahead
from specdec.errors import InvalidInput
from specdec.streaming import Text, Tokens
from specdec.whole import at_least

HEADER = struct.Struct(">BH")  # flags, bytes of content
ENDED, IS_TEXT = 1, 2  # flags
ID = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Chunk:
    """What leaves at one tick for one row.

    Args:
        row: which row of the batch.
        payload: always ``pad_to`` bytes; ``unpad`` reads it. To be encrypted on its way, like any text.
    """

    row: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Content:
    """What a payload holds.

    Args:
        ids: tokens, where the stream had no tokenizer; else None.
        text: what the chunk adds to the row's text, or None without a tokenizer.
        ended: nothing follows but empty chunks.
    """

    ids: tuple[int, ...] | None
    text: str | None
    ended: bool


@dataclass(frozen=True, slots=True)
class ShapedRelease:
    """How ``stream(release=...)`` lets tokens out.

    Args:
        tokens_per_chunk: N >= 1, tokens that become due at a tick.
        interval: seconds between ticks, > 0. If no text may ever be late: N times the slowest round, guesses
            included, for a round brings one token at least.
        pad_to: bytes of every chunk, 3 of them a header, at most 65538. Tokens without a tokenizer take 4 bytes
            each; text in UTF-8, what does not fit waits for the next chunk.
        bucket: chunks, >= 1; a row gets a multiple of it.
        first_after: seconds from the request to the start of the clock, which hide how long the prompt took to
            be read; None starts it when the prompt has been read.
        clock: seconds now; monotonic.
        sleep: waits so many seconds.

    Raises:
        InvalidInput: a number out of range.
    """

    tokens_per_chunk: int
    interval: float
    pad_to: int
    bucket: int = 1
    first_after: float | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name, least in (("tokens_per_chunk", 1), ("pad_to", HEADER.size + ID.size), ("bucket", 1)):
            object.__setattr__(self, name, at_least(least, f"ShapedRelease: {name}", getattr(self, name)))
        if self.pad_to > HEADER.size + 0xFFFF:
            raise InvalidInput(f"ShapedRelease(pad_to={self.pad_to}); give at most {HEADER.size + 0xFFFF}")
        for name, value in (("interval", self.interval), ("first_after", self.first_after)):
            seconds = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
            if not seconds and not (value is None and name == "first_after"):
                raise InvalidInput(f"ShapedRelease({name}={value!r}); give seconds")
        if self.interval <= 0:
            raise InvalidInput(f"ShapedRelease(interval={self.interval!r}); give seconds > 0")


def unpad(payload: bytes) -> Content:
    """What a chunk's payload holds; for the receiving side.

    Raises:
        InvalidInput: no payload of a ``Chunk``.
    """
    if len(payload) < HEADER.size or len(payload) - HEADER.size < HEADER.unpack_from(payload)[1]:
        raise InvalidInput(f"{len(payload)} bytes that are no payload; give Chunk.payload, whole")
    flags, size = HEADER.unpack_from(payload)
    body = payload[HEADER.size : HEADER.size + size]
    ended = bool(flags & ENDED)
    try:
        if flags & IS_TEXT:
            return Content(None, body.decode(), ended)
        return Content(tuple(number for (number,) in ID.iter_unpack(body)), None, ended)
    except (UnicodeDecodeError, struct.error) as reason:
        raise InvalidInput(f"{len(payload)} bytes that are no payload ({reason}); give Chunk.payload") from reason


def shaped(
    records: Generator[Tokens, None, Any], rows: int, tokenizer: Any, release: ShapedRelease
) -> Generator[Chunk, None, Any]:
    """Chunks of ``records`` (of so many ``rows``) as ``release`` wants them; returns what ``records`` returns."""
    return on_a_clock(Ahead(records), rows, tokenizer, release)


def on_a_clock(
    source: Ahead[Tokens], rows: int, tokenizer: Any, release: ShapedRelease
) -> Generator[Chunk, None, Any]:
    """The same, of a ``source`` that generates by itself: ``Ahead``, or what has its methods."""
    with closing(source):
        start = release.clock() + (release.first_after or 0.0)
        source.start()
        if release.first_after is None:
            source.wait()
            start = release.clock()
        leaving = {row: _Row(row, release, tokenizer) for row in range(rows)}
        tick = 0
        while leaving:
            tick += 1
            release.sleep(max(0.0, start + tick * release.interval - release.clock()))
            for record in source.taken():
                leaving[record.row].arrive(record)
            for row in list(leaving):
                yield leaving[row].chunk(tick)
                if leaving[row].complete(tick):
                    del leaving[row]
        return source.result()


class _Row:
    """One row's tokens on their way out."""

    def __init__(self, row: int, release: ShapedRelease, tokenizer: Any) -> None:
        self._row, self._release = row, release
        self._text = None if tokenizer is None else Text(tokenizer)
        self._ids: list[int] = []  # all that came
        self._due = 0  # so many of them have been due
        self._waiting: deque[bytes] = deque()  # what was due and has not left: ids or characters, never divided
        self._ended = False

    def arrive(self, record: Tokens) -> None:
        """Take note of ``record``; which of its tokens were guessed stays here."""
        self._ids += record.ids
        self._ended = record.ended

    def chunk(self, tick: int) -> Chunk:
        """What leaves at ``tick`` (from 1): as much of what is due as fits."""
        while self._due < min(tick * self._release.tokens_per_chunk, len(self._ids)):
            self._waiting += self._written(self._ids[self._due])
            self._due += 1
        if self._text is not None and self._ended and self._due == len(self._ids):
            self._waiting += _characters(self._text.add([], True))  # of which there is nothing left the next time
        room = self._release.pad_to - HEADER.size
        body = b""
        while self._waiting and len(body) + len(self._waiting[0]) <= room:
            body += self._waiting.popleft()
        flags = (ENDED if self._empty() else 0) | (0 if self._text is None else IS_TEXT)
        payload = HEADER.pack(flags, len(body)) + body
        return Chunk(self._row, payload.ljust(self._release.pad_to, b"\0"))

    def complete(self, tick: int) -> bool:
        """Whether the row needs no chunk after ``tick``."""
        return self._empty() and tick % self._release.bucket == 0

    def _empty(self) -> bool:
        return self._ended and self._due == len(self._ids) and not self._waiting

    def _written(self, token: int) -> list[bytes]:
        """``token`` in pieces that must not be divided."""
        if self._text is None:
            return [ID.pack(token)]
        # token by token: what leaves then depends on the text, not on how many tokens a round brought
        return _characters(self._text.add([token], False))


def _characters(text: str) -> list[bytes]:
    return [character.encode() for character in text]
