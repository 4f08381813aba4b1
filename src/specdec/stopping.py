"""Stop conditions that are judged on the host: stop strings, time, a user's own; and streamers.

End-of-sequence and the length limit are cut on the device, inside a block (``state.py``). Everything else is
called here as plain ``generate()`` would call it: once for every step, in order, with the whole batch at one
length. A row that is ahead waits to be judged until the others have come as far; where it should have stopped
earlier, what it wrote beyond is taken back. Cutting an exact stream leaves it exact, so a condition with a
state of its own, or one that looks at other rows, is honoured as well.
Knows no model and no rule. Read next: ``scorer.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from specdec.state import State


class Watcher:
    """Follows the steps that all rows have reached, and tells streamer and conditions of each."""

    def __init__(self, criteria: Any, streamer: Any, state: State) -> None:
        """Watch ``criteria`` (a ``StoppingCriteriaList``) for ``state``; ``streamer`` may be None."""
        self._watched = StoppingCriteriaList(
            c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        self._streamer = streamer
        # plain generate() pads an ended row only if some criterion knows an end-of-sequence token;
        # without one an ended row goes on until all have ended
        self._pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self._flagged = np.zeros(state.batch, dtype=bool)
        self._front = state.prompt_length

    @property
    def watches(self) -> bool:
        """There are conditions to judge."""
        return bool(self._watched)

    def final(self, state: State) -> np.ndarray:
        """(B,) columns of each row that no condition will take back; one that ended ahead of others may be cut."""
        if not self._watched:
            return state.lengths.copy()
        return np.minimum(state.lengths, self._front)

    def follow(self, state: State, scores: list[Tensor] | None) -> None:
        """Judge every step that has become common to all rows; end the rows that should have ended."""
        if not self._watched and self._streamer is None:
            return
        while self._front < self._common(state):
            self._front += 1
            if self._watched:
                seen = tuple(scores[: self._front - state.prompt_length]) if scores is not None else None
                verdict = self._watched(state.tokens[:, : self._front].contiguous(), seen)
                ended = torch.as_tensor(verdict).to("cpu").numpy().astype(bool)
                self._judge(state, np.broadcast_to(ended, (state.batch,)))
            if self._streamer is not None:
                self._streamer.put(state.tokens[:, self._front - 1].cpu())

    def _common(self, state: State) -> int:
        """Columns that every row has reached; ended rows are padded as far as it takes."""
        return int(state.lengths[state.live].min(initial=state.lengths.max()))

    def _judge(self, state: State, ended: np.ndarray) -> None:
        if self._pads:
            cut = ended & (state.live | (state.lengths > self._front))
            if cut.any():
                state.end_rows(cut, self._front)
            return
        self._flagged = self._flagged | ended
        if self._flagged.all():
            state.end_rows(np.ones(state.batch, dtype=bool), self._front)
