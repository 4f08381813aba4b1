"""Predicted outputs: the user says what the text will probably be, such as the file before an edit.

At first the prediction is guessed from its beginning, position by position. Where the text parts from it, the
longest end of the text that stands in the prediction says where to go on, places behind the last one first.
Rows without a prediction, or out of step with it, guess nothing here and are left to the call's draft
(``fallback.py``). What counts as accepted is a function of text and prediction alone, whatever was guessed:
OpenAI's ``accepted_prediction_tokens`` and ``rejected_prediction_tokens``, the tokens of the prediction that
appeared in the completion, and those that did not.
Knows no tokenizer but the one handed in. Read next: ``recycling.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from specdec.errors import InvalidInput
from specdec.proposers import Call, Proposer, existing, one_a_row
from specdec.records import Proposal, Stats
from specdec.state import State
from specdec.whole import whole

LONGEST = 16  # tokens of the text that are compared when looking for the place to go on
NEAR = 16  # a match of one token counts only this close behind the place where text and prediction parted


class Prediction:
    """Guess from what the user expects."""

    def __init__(self, expected: list[np.ndarray | None]) -> None:
        """Ids (L,) that are expected after the prompt of each row of the call, or None."""
        self._expected = expected

    def begin(self, call: Call) -> Proposer:
        """One alignment a row; ``num_return_sequences`` shares a prediction among its rows."""
        return _Run(one_a_row(self._expected, call.prompt.shape[0], "prediction"))


class _Run:
    """The alignments of one call."""

    def __init__(self, expected: list[np.ndarray | None]) -> None:
        self._expected = [np.zeros(0, dtype=np.int64) if one is None else one for one in expected]
        self._rows = [Alignment(one) for one in self._expected]

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        guesses: list[list[int]] = [[] for _ in limits]
        for row in np.flatnonzero(limits):
            aligned = self._rows[row]
            aligned.follow(state.host_tokens[row, state.prompt_length : state.lengths[row]])
            guesses[row] = existing(aligned.guess(int(limits[row])).tolist(), state.vocabulary)
        return Proposal.certain(guesses, state.device)

    def finish(self, state: State, stats: Stats) -> None:
        """Count, of the text that came out: stop conditions may have cut it."""
        for row, expected in enumerate(self._expected):
            aligned = Alignment(expected)
            aligned.follow(state.host_tokens[row, state.prompt_length : state.lengths[row]])
            stats.prediction_accepted += int(aligned.appeared.sum())
            stats.prediction_rejected += int((~aligned.appeared).sum())


class Alignment:
    """Where a text stands in what was expected.

    Attributes:
        appeared: (L,) bool, tokens of the prediction that appeared in the text.
    """

    def __init__(self, expected: np.ndarray) -> None:
        """Stand before the first token of ``expected`` (L,)."""
        self.appeared = np.zeros(len(expected), dtype=bool)
        self._expected = expected
        self._place = 0
        self._in_step = True
        self._read = 0
        self._found = np.zeros(0, dtype=bool)  # of the tokens read, which stand for one of the prediction

    def follow(self, text: np.ndarray) -> None:
        """Read the tokens of ``text`` (all that was written so far) that are new."""
        if not len(self._expected):
            return
        self._found = np.concatenate([self._found, np.zeros(len(text) - self._read, dtype=bool)])
        while self._read < len(text):
            token = text[self._read]
            self._read += 1
            if self._in_step and self._place < len(self._expected) and self._expected[self._place] == token:
                self.appeared[self._place] = self._found[self._read - 1] = True
                self._place += 1
            else:
                self._in_step = self._find(text[: self._read][-LONGEST:])

    def guess(self, limit: int) -> np.ndarray:
        """Up to ``limit`` tokens that should come next; none while the text is out of step."""
        return self._expected[self._place : self._place + limit] if self._in_step else self._expected[:0]

    def _find(self, end: np.ndarray) -> bool:
        """Go on behind the longest match of the text's ``end`` (n,), the nearest ahead; False if none will do."""
        expected = self._expected
        found = np.flatnonzero(expected == end[-1]) + 1
        matched = 1 if len(found) else 0
        while found.size and matched < len(end):
            longer = found[found > matched]
            longer = longer[expected[longer - matched - 1] == end[-matched - 1]]
            if not len(longer):
                break
            found, matched = longer, matched + 1
        ahead = found[found > self._place]
        sure = matched > 1 or (len(ahead) > 0 and ahead[0] <= self._place + NEAR)
        if not matched or not sure:
            return False
        self._place = int(ahead[0] if len(ahead) else found[-1])
        # a token of the text stands for one of the prediction only, the first that it was found to be
        new = ~self._found[self._read - matched : self._read]
        self.appeared[self._place - matched : self._place] |= new
        self._found[self._read - matched : self._read] = True
        return True


def read_predictions(given: Any, tokenizer: Any, pad_id: int | None) -> list[np.ndarray | None]:
    """The user's ``prediction=`` as ids (L,) a row.

    Args:
        given: a text, ids (L,), ids (B, L), or a list with a text, ids or None a row.
        tokenizer: for texts.
        pad_id: padding at both ends of the rows of a (B, L) tensor, which is taken off.

    Raises:
        InvalidInput: nothing of that, or a text without a tokenizer.
    """
    numbers = isinstance(given, (list, tuple)) and len(given) > 0 and None not in map(whole, given)
    if isinstance(given, (torch.Tensor, np.ndarray)):
        given = np.asarray(given.cpu() if isinstance(given, torch.Tensor) else given)
        if given.ndim == 2:
            return [_without_padding(_ids(row, tokenizer), pad_id) for row in given]
        numbers = True
    if isinstance(given, str) or numbers:
        given = [given]
    if not isinstance(given, (list, tuple)):
        raise InvalidInput(
            f"prediction is a {type(given).__name__}; wanted is a text, token ids, or a list with a text, "
            "token ids or None for each row"
        )
    return [None if one is None else _ids(one, tokenizer) for one in given]


def _ids(one: Any, tokenizer: Any) -> np.ndarray:
    if isinstance(one, str):
        if tokenizer is None:
            raise InvalidInput(
                "prediction is a text; pass tokenizer=... to generate() or to SpeculativeGenerator, or give "
                "token ids"
            )
        one = tokenizer(one, add_special_tokens=False)["input_ids"]
    ids = np.asarray(one.cpu() if isinstance(one, torch.Tensor) else one)
    if ids.ndim != 1 or not (len(ids) == 0 or np.issubdtype(ids.dtype, np.integer)):
        raise InvalidInput(
            f"a prediction has shape {ids.shape} and dtype {ids.dtype}; wanted are token ids (length,) for each row"
        )
    return ids.astype(np.int64)


def _without_padding(ids: np.ndarray, pad_id: int | None) -> np.ndarray:
    real = np.flatnonzero(ids != pad_id) if pad_id is not None else np.arange(len(ids))
    return ids[real[0] : real[-1] + 1] if len(real) else ids[:0]
