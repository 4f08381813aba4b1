"""Processors with a state, run over several positions of ragged rows: the states are values, one a prefix.

A processor of transformers that has a state cannot be asked about a guess: the state would have to be taken back
when the guess is rejected. Here a state is a value that never changes: ``advance(state, token)`` gives another one.
So every guess has a state of its own, a rejected guess is forgotten by going on from an older state, and draft and
target share what was worked out along the same tokens. The target is the *locally masked* model, each token drawn
from what the state allows; nothing else is to be preserved. Grammars are the main use (``structured/``).
Knows no model, cache, rule or grammar. Read next: ``warpers.py``.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from specdec.errors import FAULTS, InvalidInput
from specdec.transfer import to_device, to_host


@runtime_checkable
class Stepwise(Protocol):
    """A logits processor whose state is a value; give it to ``generate(logits_processor=[...])``.

    To be used with plain ``generate()`` too it must also be a ``LogitsProcessor``. It may have two more methods:
    ``forward(state, most)``: up to ``most`` ids that will very probably follow, guessed without asking a draft
    (jump-forward); any answer is exact, a good one is fast.
    And ``require(state)``, which is called when the text has come to ``state`` and may raise: what is wrong with a
    state that only guesses lead to is no error.
    """

    def start(self, prompt: Tensor) -> Sequence[Any]:
        """One state a row, before its first new token, for the ``prompt`` (B, P), padding included."""
        ...

    def advance(self, state: Any, token: int) -> Any:
        """The state after one more token, or None where ``process`` forbids the token; ``state`` stays as it is."""
        ...

    def process(self, states: Sequence[Any], scores: Tensor) -> Tensor:
        """Processed scores (N, V), a new tensor; where a state is None no token is drawn, whatever comes out."""
        ...


class Walk:
    """The states of one processor along the rows of a call."""

    def __init__(self, processor: Stepwise, prompt: Tensor, ends: frozenset[int] = frozenset()) -> None:
        """Stand behind the ``prompt`` (B, P); behind one of the ids ``ends`` nothing is asked."""
        self._processor, self._ends = processor, ends
        self._forward = getattr(processor, "forward", None)
        self._require = getattr(processor, "require", None)
        self._rows = [_Row(state, prompt.shape[1]) for state in processor.start(prompt)]

    @property
    def foresees(self) -> bool:
        """The processor may know what follows."""
        return self._forward is not None

    def columns(self) -> np.ndarray:
        """(B,) columns of each row that are known to be final: ids before them are not read any more."""
        return np.array([row.column for row in self._rows], dtype=np.int64)

    def process(self, scores: Tensor, seen: Seen, *, final: bool) -> Tensor:
        """Processed scores (B, n, V).

        Args:
            scores: (B, n, V); position i of row b follows ``seen.lengths[b] + i`` tokens.
            seen: the tokens, and how many positions of each row matter.
            final: the first ``seen.lengths[b]`` tokens of row b are committed, for the rows that matter.
        """
        count, vocabulary = scores.shape[1:]
        slowest = seen.lengths[seen.wanted > 0].min(initial=seen.lengths.max())
        states: list[Any] = []
        for number, row in enumerate(self._rows):
            length, wanted = int(seen.lengths[number]), int(seen.wanted[number])
            here: list[Any] = []
            if wanted:
                path = row.follow(seen.ids(number, row.column, length + wanted - 1), self._processor, self._ends)
                begin = length - row.column
                here = path[begin : begin + wanted]
                if final:
                    row.settle(length)
                    # a row that is ahead of others waits for them: a stop condition may end all before it
                    if self._require is not None and length == slowest and here[0] is not None:
                        self._require(here[0])
            states += here + [None] * (count - len(here))
        if all(state is None for state in states):
            return scores
        flat = self._processor.process(states, scores.reshape(-1, vocabulary))
        return flat.view(len(self._rows), count, vocabulary)

    def foresee(self, seen: Seen, most: np.ndarray) -> list[list[int]]:
        """For each row up to ``most[b]`` ids that will very probably follow its tokens; empty: no idea."""
        found: list[list[int]] = [[] for _ in self._rows]
        if self._forward is None:
            return found
        for number in np.flatnonzero(most).tolist():
            row = self._rows[number]
            path = row.follow(seen.ids(number, row.column, int(seen.lengths[number])), self._processor, self._ends)
            state = path[int(seen.lengths[number]) - row.column]
            if state is not None:
                found[number] = list(self._forward(state, int(most[number])))[: int(most[number])]
        return found


class Seen:
    """Tokens of the rows on the host, as far as somebody will read them."""

    def __init__(self, tokens: Tensor, lengths: np.ndarray, wanted: np.ndarray, columns: np.ndarray) -> None:
        """Copy what is needed of ``tokens`` (B, capacity), once for all processors.

        Args:
            tokens: committed tokens and guesses.
            lengths: (B,) tokens before a row's first position.
            wanted: (B,) positions of each row that matter, 0 for none.
            columns: (B,) columns that nobody reads before.
        """
        self.lengths, self.wanted = lengths, wanted
        rows = wanted > 0
        self._first = int(columns[rows].min()) if rows.any() else 0
        last = int((lengths + wanted)[rows].max()) - 1 if rows.any() else 0
        self._ids = to_host(tokens[:, self._first : last])

    def ids(self, row: int, start: int, end: int) -> list[int]:
        """The ids of ``row`` in the columns from ``start`` to before ``end``."""
        ids: list[int] = self._ids[row, start - self._first : end - self._first].tolist()
        return ids


class _Row:
    """States along the newest tokens of one row."""

    def __init__(self, state: Any, column: int) -> None:
        self.column = column  # columns that are final
        self._ids: list[int] = []  # read behind them
        self._states = [state]  # before, between and after these

    def follow(self, ids: list[int], processor: Stepwise, ends: frozenset[int]) -> list[Any]:
        """The states before, between and after ``ids``, which stand behind the final columns."""
        pairs = zip(ids, self._ids, strict=False)
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
        if same is not None:
            del self._ids[same:], self._states[same + 1 :]
        for token in ids[len(self._ids) :]:
            state = self._states[-1]
            self._ids.append(token)
            over = state is None or token in ends
            self._states.append(None if over else processor.advance(state, token))
        return self._states[: len(ids) + 1]

    def settle(self, column: int) -> None:
        """Everything before ``column`` is final: forget how the row came there."""
        done = column - self.column
        del self._ids[:done], self._states[:done]
        self.column = column


class Allowed:
    """``prefix_allowed_tokens_fn`` of transformers as a stepwise processor; a state is a row's ids.

    The function is asked only about prefixes that plain ``generate()`` might meet, in their order along a row. What
    it raises about a guess is an error only if the text comes there; until then nothing is allowed behind it.
    """

    def __init__(self, processor: Any) -> None:
        """Ask what ``processor``, a ``PrefixConstrainedLogitsProcessor``, asks."""
        self._kind = type(processor)
        self._ask, self._each = processor._prefix_allowed_tokens_fn, processor._num_beams

    def start(self, prompt: Tensor) -> list[_Prefix]:
        """See ``Stepwise.start``; since transformers 5.24 the rows of one prompt have one number."""
        return [_Prefix(row // self._each, ids.clone(), self._ask) for row, ids in enumerate(prompt)]

    def advance(self, state: _Prefix, token: int) -> _Prefix | None:
        """See ``Stepwise.advance``."""
        if token not in state.allowed:
            return None
        return _Prefix(state.row, torch.cat([state.ids, state.ids.new_tensor([token])]), self._ask)

    def process(self, states: Sequence[_Prefix | None], scores: Tensor) -> Tensor:
        """See ``Stepwise.process``; a guess behind which nothing may stand is an error only if it is kept."""
        free = to_device(np.array([state is None for state in states]), scores.device)
        out = torch.where(free[:, None], scores, -torch.inf)
        asked = [(row, state) for row, state in enumerate(states) if state is not None]
        known = [(row, state) for row, state in asked if state.error is None]
        if known:
            rows = to_device(np.array([row for row, _ in known]), scores.device)
            # the arithmetic is transformers' own: where all that is allowed has no chance, it is equally likely
            own = self._kind(lambda number, _: known[number][1].listed, 1)
            out[rows] = own(rows[:, None], scores[rows])
        return out

    def require(self, state: _Prefix) -> None:
        """The text has come to ``state``: what the function raised about it, or allowed nothing, is an error."""
        if state.error is not None:
            raise state.error


class _Prefix:
    """A row's ids, and what may follow, asked for when it is first wanted."""

    def __init__(self, row: int, ids: Tensor, ask: Any) -> None:
        self.row, self.ids, self._ask = row, ids, ask

    @cached_property
    def _answer(self) -> tuple[Any, Exception | None]:
        """What the function returned, and what it raised; it is asked once."""
        try:
            listed = self._ask(self.row, self.ids)
            is_empty = len(listed) == 0
        except FAULTS as error:
            # in words, because the frames that it came through would keep all of the call alive
            error.add_note("".join(traceback.format_exception(error)))
            error.__traceback__ = error.__context__ = error.__cause__ = None
            return (), error
        if is_empty:
            return (), InvalidInput(
                f"prefix_allowed_tokens_fn allows nothing behind the {len(self.ids)} tokens of row {self.row}; "
                "return at least one id there, such as that of the end of the text"
            )
        return listed, None

    @property
    def listed(self) -> Any:
        """What may follow, as the function returned it."""
        return self._answer[0]

    @property
    def error(self) -> Exception | None:
        """What the function raised instead, or that it allowed nothing."""
        return self._answer[1]

    @cached_property
    def allowed(self) -> frozenset[int]:
        """What may follow, as a set."""
        return frozenset(torch.as_tensor(self.listed, device="cpu").flatten().tolist())
