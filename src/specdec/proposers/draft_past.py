"""A draft's cache when its ids are its own: the committed text in them, fed, forgotten and fed again.

The rows have other lengths than the target's, and other padding. Each round what was committed is said in the
draft's ids (``rewriting.py``), compared with what the draft has been fed, forgotten from the first difference on
and the rest fed. The prompt is fed once and never said anew.

Knows no rule and no way to guess. Read next: ``translated.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.layouts.compiled import CompiledSteps
from specdec.proposers import Call
from specdec.proposers.past import opening, tried
from specdec.proposers.prompt import embedded, positions, prepare
from specdec.proposers.rewriting import DraftRow, Translator
from specdec.scorer import Scorer
from specdec.state import ROOM, State, in_common, put, widened
from specdec.transfer import to_device
from specdec.weights.adapters import device_of


class DraftPast:
    """The draft's cache, and the committed text in its ids, during one call.

    Attributes:
        lengths: (B,) the committed text in columns of the draft, padding included.
    """

    def __init__(
        self, model: Any, call: Call, translator: Translator, layout: str, steps: CompiledSteps | None = None
    ) -> None:
        """Nothing is fed before the first guess is asked for: only then is the prompt's padding known."""
        self._model, self._call, self._translator, self._layout = model, call, translator, layout
        self._steps = steps
        self.device = device_of(model, call.prompt.device)
        self._embeds = embedded(model)
        self._opening = opening(model, call.target)
        self._scorer: Scorer | None = None
        self._failed = False
        self._rows: list[DraftRow] = []
        self.lengths = np.zeros(0, dtype=np.int64)
        # (B, K) the draft's ids behind ``lengths``
        self._guesses: np.ndarray = np.zeros((len(call.prompt), 0), dtype=np.int64)
        self._most = 0  # guesses that a row may make in this round
        self._passes: Iterator[tuple[Tensor, np.ndarray]] = iter(())

    @property
    def forwards(self) -> int:
        """Forward passes of the draft model."""
        return self._scorer.forwards if self._scorer is not None else 0

    @property
    def layout(self) -> str:
        """The draft's layout; "" before it was fed anything."""
        return self._scorer.layout.name if self._scorer is not None else ""

    def follow(self, state: State, limits: np.ndarray) -> np.ndarray:
        """Bring the draft to the committed text; (B,) guesses that each row can make, at most ``limits``."""
        none = np.zeros_like(limits)
        if self._failed or not limits.any():
            return none
        if not self._call.length.begins(self._opening if self._scorer is None else None):
            return none
        if self._scorer is None:
            self._scorer = tried(type(self._model).__name__, lambda: self._open(state))
            if self._scorer is None:
                self._failed = True
                return none
        self._translate(state)
        usable = self._active & np.array([row.known for row in self._rows])
        limits = np.where(usable, np.minimum(limits, self._longest - self.lengths), 0).clip(min=0)
        self._most = int(limits.max())
        return limits

    def scores(self, step: int) -> Tensor:
        """(B, 1, V of the draft) scores for guess ``step`` of every row; to be asked for one after the other."""
        assert self._scorer is not None
        if not step:
            self._passes = self._scorer.steps(self._tokens, self.lengths, self._active, self._most, self._longest)
        return next(self._passes)[0]

    def write(self, ids: Tensor, step: int) -> None:
        """Put the draft's guess ``step``, ids (B, 1), behind the text."""
        put(self._tokens, self.lengths + step, ids.to(self.device).clamp(0, self._embeds - 1))

    def remember(self, guesses: np.ndarray) -> None:
        """(B, K) the draft's guesses as they were written, for the next round to compare with; -1 is unknown."""
        self._guesses = guesses.clip(-1, self._embeds - 1)

    def _open(self, state: State) -> Scorer:
        """Feed the prompt in the draft's ids."""
        rows = [state.host_tokens[b, state.starts[b] : state.prompt_length] for b in range(state.batch)]
        prompts, unfinished = self._translator.prompts(rows)
        width = max(map(len, prompts))
        # the same text has more tokens here or fewer; a row that goes past the limit guesses no more
        new = state.max_length - state.prompt_length
        self._longest = min(positions(self._model), width + 2 * new + 64)
        if width >= self._longest:
            raise ValueError(f"the prompt has {width} of its tokens, more than it can take")
        ids, mask = np.zeros((2, state.batch, width), dtype=np.int64)
        for b, prompt in enumerate(prompts):
            ids[b, width - len(prompt) :] = prompt
            mask[b, width - len(prompt) :] = 1
        ids = ids.clip(0, self._embeds - 1)
        prompt_ids = to_device(ids, self.device)
        inputs = {"attention_mask": to_device(mask, self.device)}
        call = replace(self._call, target=None, prompt=prompt_ids, inputs=inputs, max_length=self._longest + 1)
        prepared, kwargs, config, inner = prepare(self._model, call, self._embeds)
        if prepared.shape != prompt_ids.shape:
            raise ValueError("its generate() changes the prompt")
        scorer = Scorer(
            inner, kwargs, config, max_length=call.max_length, layout=self._layout, is_draft=True, steps=self._steps
        )
        scorer.prefill(prepared, speculate=True)
        self._host, self._tokens = ids, prompt_ids
        self._make_room(width, state.reserve)
        self._starts = width - mask.sum(axis=1)
        self._rows = [DraftRow(width, rest) for rest in unfinished]
        self.lengths = np.full(state.batch, width, dtype=np.int64)
        self._translated = np.full(state.batch, state.prompt_length, dtype=np.int64)
        self._active = np.ones(state.batch, dtype=bool)
        return scorer

    def _make_room(self, longest: int, reserve: int) -> None:
        """``reserve`` columns behind ``longest``, in blocks: few texts become as long as they may."""
        missing = longest + reserve - self._host.shape[1]
        if missing > 0:
            self._tokens = widened(self._tokens, missing + ROOM)
            self._host = widened(torch.from_numpy(self._host), missing + ROOM).numpy()

    def _translate(self, state: State) -> None:
        """Say what was committed since in the draft's ids; forget what it was fed and does not fit."""
        assert self._scorer is not None
        self._active = self._active & state.live
        active = np.flatnonzero(self._active)
        said = []
        for b in active:
            new = state.host_tokens[b, self._translated[b] : state.lengths[b]]
            said.append(self._rows[b].add(self._translator.bytes_of(new)))
        self._translated = np.where(self._active, state.lengths, self._translated)
        kept = self._scorer.kept.copy()
        guesses, self._guesses = self._guesses, self._guesses[:, :0]
        for b, ids in zip(active, self._translator.draft.encode(said), strict=True):
            row = self._rows[b]
            start = row.settled
            head = row.encoded(ids, self._translator)
            fed = np.concatenate([self._host[b, start : self.lengths[b]], guesses[b]])
            now = np.array([*head, *row.tail], dtype=np.int64).clip(0, self._embeds - 1)
            if start + len(now) > self._longest:
                self._active[b] = False
                continue
            self._make_room(start + len(now), state.reserve)
            self._host[b, start : start + len(now)] = now
            self.lengths[b] = start + len(now)
            # the last id is always fed again: its scores are what the next guess needs
            both = max(min(len(fed), len(now) - 1), 0)
            kept[b] = min(kept[b], start + int(in_common(fed[None, :both], now[None, :both])[0]))
        if self._active.any():
            # rows that take no part any more must not hold up or stretch the others
            shortest = int(self.lengths[self._active].min())
            self.lengths = np.where(self._active, self.lengths, np.minimum(self.lengths, shortest))
        kept = np.minimum(kept, self.lengths - 1)
        low, high = int(kept.min()), int(self.lengths.max())
        self._tokens[:, low:high] = to_device(self._host[:, low:high], self.device)
        settled = np.array([row.settled for row in self._rows])
        self._scorer.rollback(self._tokens, kept, self._active, np.minimum(kept, settled))
