"""The target drafts for itself with some of its layers: early exit, and layers left out.

Early exit: the first E layers, then the target's own norm and head (LayerSkip 2404.16710, section 4.3). Layers left
out: anywhere, chosen for the model (Draft & Verify 2309.08168, SWIFT 2410.06916). Neither needs other weights;
models are the better at it the more they were trained for it, and most were not.

In slots nothing is computed twice. The draft reads the keys and values that the target left for committed tokens,
which for the first E layers are its own and for later ones stand for its own, and writes those of its guesses where
the target's next pass begins, which overwrites them. So it never feeds the prompt, has nothing to forget, and every
step is one token. In other layouts a cache cannot be lent so: there the draft keeps one of its own, like any model.

Knows nothing of verification. Read next: ``vocabulary.py``.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidInput
from specdec.layouts.slots import Slots
from specdec.proposers import Call, Nothing, Proposer
from specdec.proposers.draft_model import DraftModel
from specdec.proposers.drafting import Sure, draft
from specdec.proposers.foresight import Foresight
from specdec.proposers.past import tried
from specdec.records import Proposal, Round
from specdec.scorer import Scorer
from specdec.state import State, put, span, widened
from specdec.weights.layers import count_layers, with_layers
from specdec.whole import at_least


class OwnLayers(Sure, ABC):
    """Some layers of the target draft; which, its children say."""

    def __init__(self, confidence: float | None) -> None:
        """See ``Sure``."""
        super().__init__(confidence)
        self._part = _Part()

    @abstractmethod
    def kept(self, depth: int) -> tuple[int, ...]:
        """The layers of a target of ``depth`` layers that draft."""

    def check(self, target: Any) -> None:
        """Refuse a target that does not have these layers, or whose layers cannot be told from the rest."""
        self.kept(count_layers(target))

    def begin(self, call: Call) -> Proposer:
        """A drafting run for one call."""
        keep = self.kept(count_layers(call.target))
        return _Run(self._part.of(call.target, keep), keep, call, self._confidence)


class EarlyExit(OwnLayers):
    """The first layers of the target draft, with its norm and head.

    Example:
        >>> SpeculativeGenerator(target, EarlyExit(layers=8))  # doctest: +SKIP
    """

    def __init__(self, layers: int, *, confidence: float | None = None) -> None:
        """Leave the target after ``layers`` of its layers.

        Args:
            layers: from 1 to one less than the target has.
            confidence: as for ``DraftModel``.

        Raises:
            InvalidInput: not a whole number >= 1, or a confidence that is no probability.
        """
        super().__init__(confidence)
        self.layers = at_least(1, "layers", layers, "a whole number from 1 to one less than the target has")

    def kept(self, depth: int) -> tuple[int, ...]:
        """See ``OwnLayers``."""
        if depth < 2:
            raise InvalidInput("the target has one layer, so there is no exit before its last; give another draft")
        if self.layers >= depth:
            raise InvalidInput(
                f"an exit after {self.layers} layers, and the target has {depth}; give 1 to {depth - 1}"
            )
        return tuple(range(self.layers))


class LayerSkip(OwnLayers):
    """The target without some of its layers drafts; ``choose_layers`` finds which.

    Example:
        >>> SpeculativeGenerator(target, LayerSkip(skip=choose_layers(target, texts, tokenizer)))  # doctest: +SKIP
    """

    def __init__(self, skip: Iterable[int], *, confidence: float | None = None) -> None:
        """Leave out the layers ``skip``, counted from 0.

        Args:
            skip: at least one layer, and not all.
            confidence: as for ``DraftModel``.

        Raises:
            InvalidInput: ``skip`` is empty or holds anything but whole numbers >= 0.
        """
        super().__init__(confidence)
        wanted = "the numbers of the layers to leave out, from 0. Where no choice pays, draft=None decodes plainly"
        try:
            layers = list(skip)
        except TypeError:
            raise InvalidInput(f"skip={skip!r}; give a list of {wanted}") from None
        self.skip = tuple(sorted({at_least(0, "skip", layer, wanted) for layer in layers}))
        if not self.skip:
            raise InvalidInput(f"skip=(); give {wanted}")

    def kept(self, depth: int) -> tuple[int, ...]:
        """See ``OwnLayers``."""
        if depth < 2:
            raise InvalidInput("the target has one layer, and without it none would draft; give another draft")
        keep = tuple(layer for layer in range(depth) if layer not in self.skip)
        if self.skip[-1] >= depth or not keep:
            raise InvalidInput(
                f"skip={self.skip!r}, and the target's layers are 0 to {depth - 1}; leave out some of them, not all"
            )
        return keep


class _Part:
    """The part of a target that drafts, made once: it follows the target's weights."""

    def __init__(self) -> None:
        self._made: tuple[Any, Any, Any, tuple[int, ...]] | None = None  # the part, and what it was made of

    def of(self, target: Any, keep: tuple[int, ...]) -> Any:
        """``target`` with the layers ``keep`` only."""
        attention = getattr(target.config, "_attn_implementation", None)
        made = self._made
        if made is None or made[1]() is not target or made[2:] != (attention, keep):
            reference = weakref.ref(target, self._forget)
            made = self._made = (with_layers(target, keep), reference, attention, keep)
        return made[0]

    def _forget(self, _: Any) -> None:
        self._made = None

    def __reduce__(self) -> Any:
        return _Part, ()  # a copy makes its own


class _Run:
    """Drafting during one call; where the keys and values lie is known with the first guess that is asked for."""

    foresees = True

    def __init__(self, model: Any, keep: tuple[int, ...], call: Call, confidence: float | None) -> None:
        self._model, self._keep, self._call = model, keep, call
        self._confidence = confidence
        self._run: Proposer | None = None

    @property
    def forwards(self) -> int:
        """Passes of the draft."""
        return getattr(self._run, "forwards", 0)

    @property
    def layout(self) -> str:
        """Where the draft's keys and values lie: "shared slots", or the layout of a cache of its own."""
        return getattr(self._run, "layout", "")

    def observe(self, round_: Round) -> None:
        """See ``Proposer``."""
        observe = getattr(self._run, "observe", None)
        if observe is not None:
            observe(round_)

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        if not limits.any():
            return Proposal.empty(state.batch, state.device)
        if self._run is not None:
            return self._run.propose(state, limits)
        # layers may need one another in a way that nothing tells
        name = f"{len(self._keep)} layers of {type(self._model).__name__}"
        proposal = tried(name, lambda: self._begin().propose(state, limits))
        if proposal is not None:
            return proposal
        self._run = Nothing()
        return Proposal.empty(state.batch, state.device)

    def _begin(self) -> Proposer:
        scorer = self._call.scorer
        slots = None if scorer is None else scorer.share(self._model, self._keep)
        if scorer is None or slots is None:
            self._run = DraftModel(self._model, confidence=self._confidence).begin(self._call)
        else:
            self._run = _InSlots(slots, scorer, self._call, self._confidence)
        return self._run


class _InSlots:
    """Drafting in the target's slots."""

    layout = "shared slots"

    def __init__(self, slots: Slots, scorer: Scorer, call: Call, confidence: float | None) -> None:
        self._slots, self._scorer, self._call = slots, scorer, call
        self._confidence = confidence
        self._tokens = torch.zeros(0, 0, dtype=torch.int64)
        self._known = 0  # columns of ``_tokens`` that are committed in every row
        self._limits = np.zeros(0, dtype=np.int64)
        self._passes: Iterator[tuple[Tensor, np.ndarray]] = iter(())
        self._next = 0  # the guess whose scores come next from them

    @property
    def forwards(self) -> int:
        """Passes of the draft."""
        return self._slots.forwards

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        foresight = Foresight(self._call.processing, state, limits)
        if foresight.covers(limits) or not self._call.length.begins(None):
            return foresight.proposal()
        # the target's next pass begins at these columns and writes every one that is written here, or sees none
        self._slots.stand_at(self._scorer.kept.copy(), state.live)
        self._limits, self._next = limits, -1
        if not self._known:
            self._tokens = torch.zeros_like(state.tokens)
        self._tokens = widened(self._tokens, state.tokens.shape[1] - self._tokens.shape[1])
        longest = int(state.lengths.max())
        self._tokens[:, self._known : longest] = state.tokens[:, self._known : longest]
        self._known = state.foundation
        return draft(self, state, limits, self._call, self._confidence, foresight)

    def next_scores(self, state: State, step: int, guessing: np.ndarray) -> Tensor:
        """See ``Steps``. A row that has all its guesses feeds its last token once more."""
        if step != self._next:  # the first, or guesses were foreseen since
            last = np.maximum(self._limits - 1, 0)
            every = range(step, span(self._limits)[1])
            ends = [self._scorer.kept + 1 + np.minimum(place, last) for place in every]
            self._passes = zip(self._slots.steps(self._tokens, ends, state.live), ends, strict=True)
        self._next = step + 1
        logits, lengths = next(self._passes)
        return self._call.processing.draft(logits, self._tokens, lengths, state.vocabulary, guessing)

    def history(self, state: State, step: int) -> Tensor:
        """See ``Steps``."""
        return self._tokens

    def write(self, state: State, guess: Tensor, columns: np.ndarray) -> None:
        """See ``Steps``."""
        put(self._tokens, columns, guess.clamp(0, state.vocabulary - 1))
