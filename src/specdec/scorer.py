"""A model and its layout: feed a prompt, score guesses, forget what was not kept.

The target and a draft model are the same class here. The invariant: *the cache holds every committed token
except the last one*, so the next ``score`` feeds that one first. ``kept`` says how many columns of each row
are in the cache and still true. Knows nothing of rules or proposers. Read next: ``layouts/__init__.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor

from specdec.layouts import NEVER, Layout
from specdec.layouts.check import FED, Trial
from specdec.layouts.choices import choices, inexact, plain
from specdec.layouts.columns import Columns
from specdec.layouts.compiled import CompiledSteps
from specdec.layouts.facts import last_position
from specdec.layouts.handover import is_callers, static_columns
from specdec.layouts.slots import Slots
from specdec.records import States
from specdec.weights.quantized import all_alike


class Scorer:
    """A model over a batch of B rows.

    Attributes:
        kept: (B,) columns of each row that are in the cache and agree with the committed tokens.
        layout: how the batch keeps its keys and values.
        reason: why only one-token steps are exact, where that is known without a trial; else "".
    """

    def __init__(
        self,
        model: Any,
        kwargs: dict[str, Any],
        config: Any,
        *,
        max_length: int,
        layout: str = "auto",
        is_draft: bool = False,
        returns_cache: bool = False,
        steps: CompiledSteps | None = None,
    ) -> None:
        """Wrap ``model`` with the inputs that ``generate()`` prepared for it.

        Args:
            model: the Hugging Face model.
            kwargs: model inputs beside the ids.
            config: the prepared ``GenerationConfig``.
            max_length: columns that a row may reach.
            layout: "auto", or one of ``LAYOUTS`` to force it.
            is_draft: a draft is rolled back even where it can only take one-token steps.
            returns_cache: the caller gets the cache, so rows that have ended go on in padding as they do in
                plain ``generate()``; in a pass that is run for the others anyway.
            steps: graphs to run through where the layout is slots; None is eager.
        """
        self.model = model
        self._columns = Columns(model, kwargs, config, is_draft=is_draft)
        self.layout: Layout = self._columns
        self.kept = np.zeros(0, dtype=np.int64)
        self.reason = ""
        self._max_length = max_length
        self._positions = min(last_position(model), static_columns(self._columns.cache))
        self._live = np.ones(0, dtype=bool)
        self._wanted = layout
        self._is_draft = is_draft
        self._trial: Trial | None = None  # until the layout is settled: one-token steps, which it watches
        self._ready = False
        self._at_prompt = True
        self._speculates = False
        self._returns_cache = returns_cache
        self._ends = np.zeros(0, dtype=np.int64)  # (B,) what ``kept`` was when a row ended
        self._steps = steps

    @property
    def forwards(self) -> int:
        """Forward passes so far, prefill and self-check included."""
        return self.layout.forwards

    @property
    def settled(self) -> bool:
        """The layout is the one to stay."""
        return self._trial is None

    @property
    def hidden(self) -> int:
        """Columns of the cache before the first id of a row: a past that was given, or embeddings."""
        return self._columns.hidden

    def prefill(self, prompt: Tensor, *, speculate: bool, at_once: bool = False) -> Tensor:
        """Feed the whole prompt (B, P) alone; scores of its last column, (B, 1, V).

        The first call with a model and kind of batch settles the layout two steps later (``decide``).

        Args:
            prompt: the prompt, left padding included.
            speculate: False when no guess will ever be scored: then no self-check is needed.
            at_once: settle the layout now, on steps made up for it: two passes more, and no plain rounds.
        """
        scores = self._columns.prefill(prompt).clone()
        self.kept = np.full(prompt.shape[0], prompt.shape[1], dtype=np.int64)
        self._live = np.ones(len(self.kept), dtype=bool)
        self._at_prompt, self._speculates = True, speculate
        self._ends = np.full_like(self.kept, NEVER)
        if not speculate:
            self.layout = plain(self._columns)
            return scores
        if prompt.shape[1] + self.hidden + FED > self._positions:
            self.layout = plain(self._columns)
            self.reason = "its positions end right behind the prompt, or those of its cache do"
            return scores
        candidates, self.reason = choices(self._columns, self._wanted, prompt, self._max_length, self._is_draft)
        trial = self._trial = Trial(self._columns, prompt, candidates)
        known = trial.known()
        forced = self._wanted not in ("auto", "plain")
        if known is None and (self._is_draft or at_once or forced):
            with all_alike():  # a quantised draft's wide passes may have weights of their own
                known = trial.decide_at_once(scores)
        if forced and known is not None and known.name == "plain":
            raise inexact(self._wanted, "it does not give the scores of one-token steps")
        if known is not None:
            self._settle(known)
        return scores

    def score(self, tokens: Tensor, lengths: np.ndarray, first: np.ndarray, count: int) -> Tensor:
        """Scores of ``count`` columns from ``first`` (B,) on, rows being fed up to ``lengths`` (B,)."""
        if self._returns_cache:
            lengths, first = self._with_padding(lengths, first)
        elif self._positions < NEVER:  # a row that has ended may have done so behind the last position
            lengths = np.where(self._live, lengths, np.minimum(lengths, self._positions - self.hidden))
            first = np.minimum(first, lengths - 1)
        self._at_prompt = False
        scores = self.layout.forward(tokens, lengths, first, count)
        self.kept = lengths  # arrays of lengths are exchanged and never written into
        if self._trial is not None:
            self._ready = self._trial.see(scores)
        return scores

    def decide(self, tokens: Tensor) -> None:
        """Settle the layout once the first steps were seen; to be called before ``rollback``."""
        if self._ready and self._trial is not None:
            self._settle(self._trial.decide(tokens))

    def give_hidden(self) -> str:
        """Have every pass return its hidden states from now on; the name that ``states`` has for them."""
        return self._columns.give_hidden()

    def states(self, names: tuple[str, ...]) -> States | None:
        """The outputs called ``names`` for the columns that the last scores belong to.

        Hidden states are (B, count, ...) a layer, of the prompt (B, P, ...). Where no guess is ever scored passes
        are plain's, and so are their states: attentions are asked for there only.
        """
        if not names:
            return None
        outputs = self.layout.outputs
        whole = self._at_prompt or not self._speculates
        found: States = {}
        for name in names:
            layers = list(outputs.get(name) or ())
            found[name] = layers if whole else [self.layout.pick(layer) for layer in layers]
        return found

    def rollback(self, tokens: Tensor, kept: np.ndarray, live: np.ndarray, final: np.ndarray | None = None) -> None:
        """Forget every column from ``kept`` (B,) on; after this the cache agrees with the committed tokens.

        No later call may go behind ``final`` (B,): ``kept`` itself, unless a draft with another tokenizer may
        still change its ids for the end of a text.
        """
        if self._returns_cache:
            # a row that ended earlier holds padding by now, unless it was cut once more
            stays = ~live & (kept >= self._ends)
            self._ends = np.where(live | stays, self._ends, kept)
            kept = np.where(stays, self.kept, kept)
            live = np.ones_like(live)
        elif self._positions < NEVER:
            kept = np.where(live, kept, np.minimum(kept, self._positions - self.hidden - 1))
        self._live = live
        self.kept = np.minimum(self.kept, kept)
        final = self.kept if final is None else np.minimum(self.kept, final)
        self.layout.rewind(self.kept, live)
        if isinstance(self.layout, Columns):  # nothing moves in slots
            self.layout.settle(int(final[live].min()) if live.any() else 0)
            self.layout.catch_up(tokens, final, live)

    def abandon(self, tokens: Tensor, kept: np.ndarray, live: np.ndarray) -> None:
        """The call ends in the middle: a cache of the caller's is left with committed columns, as far as it can be.

        Slots have not written into it yet.
        """
        if isinstance(self.layout, Columns) and is_callers(self._columns.given):
            with suppress(Exception):  # there are caches of which nobody knows what a pass that broke off wrote
                if self._trial is not None and self._trial.at_prompt is not None:
                    self._trial.at_prompt.put_back()
                self._columns.undo()
                self.rollback(tokens, kept, live)
                self.layout.hand_over(self.layout.fed)

    def share(self, model: Any, layers: Sequence[int]) -> Slots | None:
        """The slots for ``model``, made of some ``layers`` of this one's; None in every other layout.

        See ``Slots.share``. ``kept`` is where the next pass of this model will begin.
        """
        return self.layout.share(model, layers) if isinstance(self.layout, Slots) else None

    def finish(self, tokens: Tensor, columns: int) -> Any:
        """The cache of transformers with the first ``columns`` of every row, as plain ``generate()`` leaves it."""
        if self._columns.cache is None and not self._columns.is_foreign:
            return None
        everyone = np.ones(len(self.kept), dtype=bool)
        self.kept = np.minimum(self.kept, columns)
        layout, held = self.layout, int(self.kept.min())
        layout.rewind(self.kept, everyone)
        if isinstance(layout, Columns):
            layout.settle(held)
            held = layout.fed
        if held < columns:
            lengths = np.full_like(self.kept, columns)
            layout.forward(tokens, lengths, lengths - 1, 1)
            if isinstance(layout, Columns):
                layout.settle(columns)
        return layout.hand_over(columns)

    def steps(
        self, tokens: Tensor, lengths: np.ndarray, live: np.ndarray, count: int, longest: int
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Up to ``count`` passes of a draft, each a column further: the last scores (B, 1, V), and the lengths.

        Args:
            tokens: (B, capacity), into which the caller writes a token of every row between two passes.
            lengths: (B,) columns for the first pass.
            live: (B,) bool, rows that guess.
            count: passes that may be asked for.
            longest: columns that no row goes beyond; rows that have ended need not end before.
        """
        self.layout.rewind(self.kept, live)
        ends = [np.minimum(lengths + step, longest) for step in range(count)]
        for scores, end in zip(self.layout.steps(tokens, ends, live), ends, strict=True):
            self.kept = end
            yield scores, end

    def reach(self, limits: np.ndarray, lengths: np.ndarray, live: np.ndarray) -> np.ndarray:
        """(B,) ``limits``, lowered to the guesses that each row may have scored in the next forward.

        Plain ``generate()`` may stop before the last position, and a guess behind it would be an error.
        """
        room = np.maximum(self._positions - self.hidden - lengths, 0)
        return self.layout.reach(np.minimum(limits, room), lengths, live)

    def outgrown(self, columns: int) -> bool:
        """A text of ``columns``, of which the last is not fed, has more than there are positions for."""
        return columns - 1 > self._positions

    def _settle(self, layout: Layout) -> None:
        """Go on in ``layout``, and through the graphs; say so once where it cannot be."""
        self.layout, self._trial = layout, None
        steps = self._steps
        if steps is None or steps.refused:
            return
        if isinstance(layout, Slots):
            if steps.fits(self.model, self._max_length + self.hidden):
                layout.compile_with(steps, self._max_length)
        else:
            steps.refuse(self.model, f"its layout is {layout.name!r}, and only slots keep their shapes")

    def _with_padding(self, lengths: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lengths, first) with ended rows going on in padding as far as the pass is wide."""
        ended = self._ends < NEVER
        if not ended.any() or ended.all():
            return lengths, first
        width = int((lengths - self.kept)[~ended].max())
        padded = np.minimum(self.kept + width, int(lengths[~ended].max()))
        lengths = np.where(ended, padded, lengths)
        return lengths, np.where(ended, padded - 1, first)


def warn_plain(model: Any, reason: str) -> None:
    """Say once that a target decodes plainly, and why: for ``reason``, or because a trial has shown it ("")."""
    reason = reason or "several tokens in one forward do not give the scores of one-token steps"
    if model.training:
        reason += ". It is in training mode, where dropout makes every pass another: call model.eval()"
    warnings.warn(
        f"specdec decodes {type(model).__name__} plainly, without drafts, because {reason}",
        stacklevel=2,
    )
