"""A draft that is drafted for itself, level upon level (CS Drafting, 2312.11462; Staged, 2308.04623).

Under the target stands a model, and that model need not write its guesses one by one: a cheaper proposer guesses
for it, it scores several of those guesses in one pass, and the verifier that serves the target keeps what may be
kept *by the model's own law*. What comes out are samples of the model, drawn from the rows it scored, and that is
all the target must know: it judges a proposal like any other, whatever lies below. Any depth: the cheaper proposer
may be such a level itself.

A level has rounds of its own over a text of its own (``State``): the committed one, and behind it what this
proposal holds so far, which may be taken back. Whether a row goes on is settled by tokens that it submits, and a
lossless verifier may stop after any of its rounds: given that token i + 1 is written at all, it is a sample of the
model after the first i, because what would follow an earlier end is one. So no law is bent. Where the
model does not pay, what is below it guesses for the target itself.

Knows nothing of the target. Read next: ``mixture.py``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.clock import clock
from specdec.errors import InvalidInput
from specdec.length import DraftLength
from specdec.proposers import Call, Nothing, Proposer, begun, checked
from specdec.proposers.combined import has_model
from specdec.proposers.draft_model import DraftModel
from specdec.proposers.drafting import asked
from specdec.proposers.drawn import chance_of, sound
from specdec.proposers.past import Past
from specdec.proposers.translated import TranslatedDraft
from specdec.proposers.words import named
from specdec.records import Proposal, Round, Stats
from specdec.state import State, in_common
from specdec.transfer import to_device


class Cascade:
    """The first proposer guesses for the model behind it, that one for the next, the last for the target.

    Example:
        >>> Cascade("ngram", model)  # doctest: +SKIP
    """

    def __init__(self, *levels: Any) -> None:
        """Give the levels from the cheapest to the one under the target.

        Args:
            levels: two or more; the first is any proposer, a model or a word, the others are models (or
                ``DraftModel``) that share their token ids with the target.

        Raises:
            InvalidInput: fewer than two, or a level above the first that is no model.
        """
        parts = [named(level) for level in levels]
        if len(parts) < 2:
            raise InvalidInput(f"Cascade with {len(parts)} of its levels; give at least two, the cheapest first")
        wrong = next((part for part in parts[1:] if not isinstance(part, DraftModel)), None)
        if wrong is not None:
            raise InvalidInput(
                f"a {type(wrong).__name__} cannot judge guesses; all levels of a Cascade above the first are models"
            )
        if isinstance(parts[0], TranslatedDraft):
            raise InvalidInput(
                "a draft with another tokenizer cannot stand at the bottom of a Cascade, where text is taken back"
            )
        self.parts = parts

    def begin(self, call: Call) -> Proposer:
        """Begin all levels, the cheapest first."""
        first, *models = self.parts
        # how many guesses are made for a level is a question of its own at each
        # and the target's cache holds its text, not a level's
        judges = [replace(call, length=call.length.within(), scorer=None) for _ in models]
        run: Proposer = begun(first, judges[0])
        for model, judge, above in zip(models, judges, [*judges[1:], call], strict=True):
            run = model.open(above, partial(_Level, below=run, length=judge.length))
            if isinstance(run, Nothing):
                return run
        return run


class _Level:
    """A draft model during one call, and the proposer that guesses for it."""

    def __init__(
        self, past: Past, call: Call, confidence: float | None, *, below: Proposer, length: DraftLength
    ) -> None:
        self._past, self._call, self._confidence = past, call, confidence
        self._below, self._length = below, length
        # this model's scores are looked at where the text is
        self._goes_on = asked(call, confidence, call.prompt.device)
        self._text: State | None = None
        self._settled = 0  # columns that were settled when last asked, of the shortest row
        self._drafted = self._accepted = 0
        self._chances = np.zeros((0, 0))  # this model's own, of the tokens of the running proposal
        self._told = 0  # positions whose chances were told to the level above
        self._hands_down = False  # in the running round

    @property
    def forwards(self) -> int:
        """Forward passes of this model and of those below."""
        return self._past.scorer.forwards + int(getattr(self._below, "forwards", 0))

    @property
    def layout(self) -> str:
        """The layout of this model."""
        return self._past.scorer.layout.name

    @property
    def drafting(self) -> str:
        """What this level kept of the one below it."""
        return f"{self._past.name} kept {self._accepted} of {self._drafted} guesses made for it"

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        limits = self._past.limits(state, limits)
        self._hands_down = False
        if not limits.any():
            return Proposal.empty(state.batch, state.device)
        if not self._call.length.begins(self._past.opening) or not self._past.feed_prompt():
            # what is below guesses for the level above, unless that is a model too, which would have to be asked
            self._hands_down = not has_model(self._below)
            return (
                self._below.propose(state, limits)
                if self._hands_down
                else Proposal.empty(state.batch, state.device)
            )
        text = self._follow(state)
        written = np.zeros_like(limits)
        scores: list[Tensor] = []
        places: list[tuple[np.ndarray, np.ndarray]] = []  # before and after each round
        self._chances = np.zeros((state.batch, int(limits.max())))
        self._told = 0
        while (limits > written).any():
            round_, ended = self._round(text, limits - written, state)
            before, written = written, written + round_.counts
            if self._call.sampling.keeps_logits:
                scores.append(round_.scores)
                places.append((before, written))
            limits = self._stop(round_, np.where(ended, written, limits), before, written)
        width = int(written.max())
        columns = state.lengths[:, None] + np.arange(width)
        tokens = to_device(np.take_along_axis(text.host_tokens, columns, axis=1), state.device)
        return Proposal(tokens, written, _rows(scores, places, width) if scores else None)

    def observe(self, round_: Round) -> None:
        """Show what is below the round that it guessed for."""
        if self._hands_down and hasattr(self._below, "observe"):
            self._below.observe(round_)

    def _round(self, text: State, left: np.ndarray, state: State) -> tuple[Round, np.ndarray]:
        """One round of this level: the one below guesses, this one judges and writes one token more.

        Args:
            text: of this level.
            left: (B,) tokens that each row may still write; rows with 0 rest, and may come back later.
            state: of the level above.

        Returns:
            The round, and (B,) bool, rows that said an end of the text.
        """
        scorer = self._past.scorer
        start = clock()
        limits = scorer.reach(np.maximum(left - 1, 0), text.lengths, state.live)
        limits = np.minimum(limits, self._length.next(int(limits.max())))
        proposal = checked(self._below.propose(text, limits), text, limits)
        text.write_guesses(proposal)
        scores = self._scores(text, proposal)
        submitted = to_device(proposal.lengths, text.device)
        positions = text.lengths - text.prompt_length
        accepted, next_token = self._call.sampling.verify(
            scores, proposal.tokens, submitted, proposal.logits, positions
        )
        text.only(left > 0)
        round_ = text.commit(proposal, accepted, next_token, scores, None)
        ended = (left > 0) & ~text.live
        text.only(state.live)
        scorer.rollback(self._ids(text), text.lengths - 1, state.live, state.settled - 1)
        self._drafted += int(round_.lengths.sum())
        self._accepted += int(round_.accepted.sum())
        if hasattr(self._below, "observe"):
            self._below.observe(round_)
        self._length.observe(round_, clock() - start)
        return round_, ended

    def _scores(self, text: State, proposal: Proposal) -> Tensor:
        """Processed scores (B, K + 1, V) of this model: the rows that its tokens are drawn from."""
        ends = text.lengths + proposal.lengths
        width = proposal.tokens.shape[1] + 1
        logits = self._past.scorer.score(self._ids(text), ends, text.lengths - 1, width).to(text.device)
        scores = self._call.processing.draft(logits, text.tokens, text.lengths, text.vocabulary)
        # a model out of order must not break the call: where it has no distribution it says token 0
        bad = ~torch.isfinite(scores.amax(dim=-1))
        if scores.device.type == "cpu" and not bool(bad.any()):
            return scores
        return sound(scores, bad)

    def _ids(self, text: State) -> Tensor:
        """The text with guesses (B, capacity), for the model to be fed."""
        if self._past.embeds >= text.vocabulary and text.device == self._past.device:
            return text.tokens
        return text.tokens.clamp(max=self._past.embeds - 1).to(self._past.device)

    def _follow(self, state: State) -> State:
        """This level's text, brought to that of the level above; what was fed and is not there is forgotten."""
        scorer = self._past.scorer
        since = self._settled
        if self._text is None:
            self._text = State(
                state.prompt, max_length=state.max_length, max_guesses=state.reserve - 2,
                eos_ids=state.eos_ids, pad_id=state.pad_id, starts=state.starts,
            )  # fmt: skip
            since = state.prompt_length
        text = self._text
        upto = int(np.minimum(text.lengths, state.lengths).max())
        agree = since + in_common(text.host_tokens[:, since:upto], state.host_tokens[:, since:upto])
        text.follow(state, since)
        kept = np.minimum(agree, state.lengths - 1)
        scorer.rollback(self._ids(text), kept, state.live, state.settled - 1)
        self._settled = state.foundation
        return text

    def _stop(self, round_: Round, limits: np.ndarray, before: np.ndarray, written: np.ndarray) -> np.ndarray:
        """(B,) limits, lowered to what is written where no more pays; what is written is submitted all the same."""
        if not self._confidence and self._goes_on is None:
            return limits
        inside = to_device(round_.emitted, round_.scores.device).clamp(max=round_.scores.shape[-1] - 1)
        chances = chance_of(round_.scores, inside).double().cpu().numpy()
        if self._confidence:
            real = np.arange(chances.shape[1]) < round_.counts[:, None]
            return np.where((real & (chances < self._confidence)).any(axis=1), written, limits)
        for row, count in enumerate(round_.counts):
            self._chances[row, before[row] : written[row]] = chances[row, :count]
        # a position is told of once every row that gets there has done so
        while self._goes_on is not None:
            gets_there = limits > self._told
            if not gets_there.any() or int(written[gets_there].min()) <= self._told:
                break
            chance = np.where(gets_there, self._chances[:, self._told], 0.0)
            self._told += 1
            if not self._goes_on(chance):
                return written
        return limits

    def finish(self, state: State, stats: Stats) -> None:
        """Tell the level below that the call is over."""
        if hasattr(self._below, "finish"):
            self._below.finish(state, stats)


def _rows(scores: list[Tensor], places: list[tuple[np.ndarray, np.ndarray]], width: int) -> Tensor:
    """(B, width, V) the rows that the tokens of each row were drawn from, out of ``scores`` (B, n, V) a round."""
    batch = len(places[0][0])
    where = np.zeros((batch, width), dtype=np.int64)
    start = 0
    for rows, (before, after) in zip(scores, places, strict=True):
        for row in range(batch):
            where[row, before[row] : after[row]] = start + np.arange(after[row] - before[row])
        start += rows.shape[1]
    every = torch.cat(scores, dim=1)
    return every[torch.arange(batch, device=every.device)[:, None], to_device(where, every.device)]
