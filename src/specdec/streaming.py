"""Tokens as they become final, row by row: what ``SpeculativeGenerator.stream()`` yields.

A token is told once nothing can take it back. Without stop conditions that are judged on the host that is at once;
with them it is when every row has come as far (``stopping.py``). Knows no model and no rule.
Read next: ``ahead.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from specdec.ahead import surroundings
from specdec.records import Round
from specdec.state import State

Record = TypeVar("Record")
LONGEST = 4  # bytes of a character, and so tokens


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one row; their number and ``from_draft`` tell how well the text could be guessed.

    Args:
        row: which row of the batch.
        ids: the tokens, end-of-sequence included, padding excluded; the first record of a call may have none.
        from_draft: for each token, whether the draft guessed it; the others the target drew itself.
        text: what the tokens add to the row's text, or None without a tokenizer. Bytes that are no whole
            character yet wait for the rest.
        ended: the row gets no more tokens.
    """

    row: int
    ids: tuple[int, ...]
    from_draft: tuple[bool, ...]
    text: str | None
    ended: bool


def told(
    rounds: Generator[tuple[State, Round, np.ndarray], None, Any], tokenizer: Any
) -> Generator[Tokens, None, Any]:
    """Records of ``rounds``: (state, round, (B,) columns that are final), and what ``rounds`` returns."""
    teller = None
    while True:
        try:
            state, round_, final = next(rounds)
        except StopIteration as end:
            return end.value
        teller = teller or _Teller(state, tokenizer)
        yield from teller.tell(state, round_, final)


async def in_threads(records: Generator[Record, None, Any]) -> AsyncGenerator[Record, None]:
    """``records`` for an event loop: every step runs in a thread of its pool, and none outlives the iteration.

    The threads see what torch keeps for each thread (autocast, inference mode) as it is in the loop's.
    """
    loop, within = asyncio.get_running_loop(), surroundings()

    def advance() -> Record | None:
        with within():
            return next(records, None)

    step: asyncio.Future[Record | None] | None = None
    try:
        while True:
            step = loop.run_in_executor(None, advance)
            record = await asyncio.shield(step)
            if record is None:
                return
            yield record
    finally:
        if step is not None and not step.done():
            await asyncio.wait([step])
        # what runs ahead in a thread of its own ends its round first
        await asyncio.shield(loop.run_in_executor(None, records.close))


class _Teller:
    """Remembers what was told of every row."""

    def __init__(self, state: State, tokenizer: Any) -> None:
        """Tell of ``state``, in text too if there is a ``tokenizer``."""
        self._told = np.full(state.batch, state.prompt_length, dtype=np.int64)
        self._ended = np.zeros(state.batch, dtype=bool)
        self._guessed: np.ndarray = np.zeros_like(state.host_tokens, dtype=bool)
        self._texts = None if tokenizer is None else [Text(tokenizer) for _ in range(state.batch)]

    def tell(self, state: State, round_: Round, final: np.ndarray) -> list[Tokens]:
        """One record for every row with news.

        Args:
            state: after the round.
            round_: what was committed.
            final: (B,) columns of each row that nothing will take back.
        """
        missing = state.host_tokens.shape[1] - self._guessed.shape[1]
        if missing > 0:
            self._guessed = np.pad(self._guessed, ((0, 0), (0, missing)))
        for row, (first, kept) in enumerate(zip(round_.before, round_.accepted, strict=True)):
            self._guessed[row, first : first + kept] = True
        records = []
        for row in np.flatnonzero((final > self._told) | (~state.live & ~self._ended)).tolist():
            new = slice(int(self._told[row]), int(final[row]))
            ended = bool(~state.live[row] and final[row] >= state.lengths[row])
            if not ended and new.start == new.stop:
                continue
            ids = state.host_tokens[row, new].tolist()
            text = None if self._texts is None else self._texts[row].add(ids, ended)
            records.append(Tokens(row, tuple(ids), tuple(self._guessed[row, new].tolist()), text, ended))
            self._told[row], self._ended[row] = new.stop, ended
        return records


class Text:
    """Ids to text, piece by piece: the text of a token depends on the ones before it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._read = 0  # tokens to decode with, tokens whose text was given out

    def add(self, ids: list[int], ended: bool) -> str:
        """What ``ids`` add; ``ended`` gives out what was waiting for the rest of a character."""
        self._ids += ids
        upto = len(self._ids) if ended else self._whole()
        if upto == self._read:
            return ""
        before, now = (self._decode(self._ids[self._context : end]) for end in (self._read, upto))
        self._context, self._read = self._read, upto
        return now[len(before) :]

    def _whole(self) -> int:
        """How many tokens are whole characters, or bytes that will never be one: the last three may become one."""
        end = len(self._ids)
        for upto in range(end, max(end - LONGEST, self._read), -1):
            if not self._decode(self._ids[self._context : upto]).endswith("\ufffd"):
                return upto
        return max(end - LONGEST + 1, self._read)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
