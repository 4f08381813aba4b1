"""Several proposers, and in every round the one that has promised most so far (HedgeSpec, 2510.20064).

What was committed tells how each proposer would have done, whether its guess was used or not: the guess is compared
with the text that came, without a pass of the target. So proposers without a model guess in every round and are all
judged (full information); a draft model costs passes, is judged where it was used, and is asked again now and then.
A row goes to the proposer with most expected tokens a second: the survival of its guesses, old rounds fading, for
the length at hand, over what its guesses cost in rounds of the target. The paper draws the choice with exponential
weights; here the leader is taken, so that nothing random is added to a greedy text.

Non-anticipating: the choice looks at committed tokens and at how long a guess is that was not drawn; never at a
drawn token, and never at what the target says in the same round. A row's guesses come from one proposer alone.

``draft="auto"`` is ``Mixture("suffix", "recycling")``, drafts that need nothing but the text and next to no time:
where the text repeats something, the longest match is copied; where it does not, what the target itself scored best
is recycled. Whoever knows more should say so: a model of the same family drafts better in free text, and a text
that is expected goes in as ``prediction``, which comes before any draft.
Knows none of those that it mixes. Read next: ``combined.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from specdec.errors import InvalidInput
from specdec.length.acceptance import survival
from specdec.length.adaptive import ASSUMED_COST, FIRST_WAIT, LAG, LONGEST_WAIT, MOST
from specdec.proposers import Call, Proposer, begun, checked
from specdec.proposers.combined import Combined, has_model, merged, show
from specdec.proposers.words import named
from specdec.records import Proposal, Round
from specdec.state import State

FADE = 0.95  # what a judged guess is worth after the next one of the same proposer
PRIOR, PRIOR_WEIGHT = 0.6, 1.0  # of a guess nothing is known about: kept with this chance; in guesses
RECENT = 0.3  # weight of the newest measurement of seconds


class Mixture:
    """The best of several proposers, row by row and round by round.

    Example:
        >>> Mixture("suffix", "recycling", model)  # doctest: +SKIP
    """

    def __init__(self, *proposers: Any) -> None:
        """Give two or more proposers, words or models; of equals the first is taken.

        Raises:
            InvalidInput: fewer than two.
        """
        self.parts = [named(proposer) for proposer in proposers]
        if len(self.parts) < 2:
            raise InvalidInput(f"Mixture of {len(self.parts)} proposers; give at least two")

    def begin(self, call: Call) -> Proposer:
        """Begin all of them."""
        runs = [begun(part, call) for part in self.parts]
        names = [type(part).__name__ for part in self.parts]
        return _Run(runs, names, call)


@dataclass(frozen=True)
class _Waiting:
    """A guess that the text has not yet answered to the end."""

    part: int
    row: int
    start: int
    guess: np.ndarray


class _Run(Combined):
    """The proposers during one call, and their record."""

    def __init__(self, parts: list[Any], names: list[str], call: Call) -> None:
        super().__init__(parts)
        self._names, self._clock = names, call.clock
        self._has_model = np.array([has_model(part) for part in parts])
        # guesses on an accelerator are not looked at but where they were used
        self._when_used = self._has_model | (call.prompt.device.type != "cpu")
        self.record = Record(len(parts), len(call.prompt))
        self._waiting: list[_Waiting] = []
        self._choice = np.full(len(call.prompt), -1)  # (B,) the proposer of each row, -1 where none guesses
        self._proposals = [Proposal.empty(len(call.prompt), call.prompt.device) for _ in parts]
        self._idle = np.zeros(len(parts), dtype=np.int64)  # rounds without a part that is judged by its use
        self._wait = np.full(len(parts), FIRST_WAIT)
        self._prices = np.where(self._has_model, ASSUMED_COST, 0.0)  # of a guess, in rounds without one
        self._rounds = 0
        self._last = np.full(len(parts), -LAG - 1)  # round in which a model was last asked
        self._left: float | None = None  # when the last proposal was made
        self._rest: float | None = None  # seconds from there to the next
        self._typical = np.full(len(parts), float(MOST))  # guesses that a model makes before it stops
        self._used = np.zeros(len(parts), dtype=np.int64)

    @property
    def drafting(self) -> str:
        """How often a row went to which."""
        return ", ".join(f"{name} {used}" for name, used in zip(self._names, self._used, strict=True))

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``; proposers with a model are asked for the rows that they get."""
        self._answer(state)
        self._rounds += 1
        most = int(limits.max(initial=0))
        lengths = np.zeros((len(self._parts), len(limits)), dtype=np.int64)
        for number, part in enumerate(self._parts):
            if self._has_model[number]:
                lengths[number] = np.minimum(limits, ceil(self._typical[number]))
                continue
            self._proposals[number] = here = checked(part.propose(state, limits), state, limits)
            # a guess that was drawn may be long or short by its own value: what was asked for counts
            drawn = here.logits is not None
            lengths[number] = np.where(here.lengths > 0, limits, 0) if drawn else here.lengths
        choice = self._choose(lengths, most)
        for number in np.flatnonzero(self._has_model).tolist():
            self._proposals[number] = self._timed(number, state, np.where(choice == number, limits, 0))
        self._remember(state)
        self._choice = choice
        if most:
            self._used += np.bincount(choice[choice >= 0], minlength=len(self._parts))
        whole = _cut(self._proposals[0], choice == 0)
        for number, proposal in enumerate(self._proposals[1:], start=1):
            own = choice == number
            if own[choice >= 0].all():
                whole = _cut(proposal, own)
            elif own.any():
                whole = merged(proposal, whole, own, state.vocabulary)
        self._left = self._clock() if self._clock else None
        return whole

    def _choose(self, lengths: np.ndarray, most: int) -> np.ndarray:
        """(B,) the proposer with most expected tokens a second, of those that would guess ``lengths`` (N, B)."""
        gains = self.record.kept(lengths)
        rates = (1 + gains) / (1 + self._prices[:, None] * lengths)
        choice = np.where(lengths.any(axis=0), np.where(lengths > 0, rates, -1.0).argmax(axis=0), -1)
        if not most:
            return choice
        for number in np.flatnonzero(self._when_used):
            if (choice == number).any():
                self._idle[number], self._wait[number] = 0, FIRST_WAIT
                continue
            if not lengths[number].any():
                continue
            self._idle[number] += 1
            if self._idle[number] > self._wait[number]:
                self._idle[number], self._wait[number] = 0, min(2 * self._wait[number], LONGEST_WAIT)
                return np.where(lengths[number] > 0, number, choice)
        return choice

    def _timed(self, number: int, state: State, limits: np.ndarray) -> Proposal:
        """What the model of that ``number`` proposes; what it costs is noted."""
        part = self._parts[number]
        if not limits.any():
            return checked(part.propose(state, limits), state, limits)
        # a prompt to be fed, or much to catch up on, would pass for the price of a guess
        telling = self._rounds - self._last[number] <= LAG
        self._last[number] = self._rounds
        start = self._clock() if self._clock else 0.0
        proposal = checked(part.propose(state, limits), state, limits)
        if self._clock and self._rest and telling and proposal.tokens.shape[1]:
            price = (self._clock() - start) / proposal.tokens.shape[1] / self._rest
            self._prices[number] += RECENT * (price - self._prices[number])
        return proposal

    def _remember(self, state: State) -> None:
        """Keep the guesses of those without a model, to be judged by the text to come."""
        for number, proposal in enumerate(self._proposals):
            if self._when_used[number] or not proposal.tokens.shape[1]:
                continue
            tokens = proposal.tokens.numpy()
            for row in np.flatnonzero(proposal.lengths):
                guess = tokens[row, : proposal.lengths[row]].copy()  # the memory may be written into again
                self._waiting.append(_Waiting(number, int(row), int(state.lengths[row]), guess))

    def _answer(self, state: State) -> None:
        """Judge the guesses that the committed text has answered."""
        still = []
        for one in self._waiting:
            text = state.host_tokens[one.row, one.start : state.lengths[one.row]][: len(one.guess)]
            same = text == one.guess[: len(text)]
            kept = int(same.argmin()) if not same.all() else len(text)
            if kept == len(text) < len(one.guess):
                if state.live[one.row]:
                    still.append(one)
                continue
            self.record.add(one.part, one.row, len(one.guess), kept)
        self._waiting = still

    def observe(self, round_: Round) -> None:
        """Show each its part of the round, and judge the models that guessed."""
        if self._clock and self._left is not None:  # before the reader of a stream has the round
            seconds = self._clock() - self._left
            self._rest = seconds if self._rest is None else self._rest + RECENT * (seconds - self._rest)
        for number, part in enumerate(self._parts):
            own = self._choice == number
            if self._when_used[number]:
                asked = own & (round_.lengths > 0)
                if asked.any():
                    self._typical[number] += RECENT * (round_.lengths[asked].mean() - self._typical[number])
                for row in np.flatnonzero(asked):
                    self.record.add(number, int(row), int(round_.lengths[row]), int(round_.accepted[row]))
            show(part, own, self._proposals[number], round_)


class Record:
    """How many guesses of each proposer were kept, position by position, row by row; old ones fade."""

    def __init__(self, parts: int, rows: int) -> None:
        """Know nothing yet."""
        self._tried = np.zeros((parts, rows, MOST))
        self._kept = np.zeros((parts, rows, MOST))

    def add(self, part: int, row: int, length: int, kept: int) -> None:
        """Of ``length`` guesses of ``part`` for ``row`` the first ``kept`` came true."""
        tried, right = self._tried[part, row], self._kept[part, row]
        tried *= FADE
        right *= FADE
        tried[: min(length, kept + 1)] += 1
        right[:kept] += 1

    def kept(self, lengths: np.ndarray) -> np.ndarray:
        """(N, B) guesses expected to be kept of ``lengths`` (N, B); of long ones the first ``MOST`` count."""
        chances = survival(self._kept, self._tried, PRIOR, PRIOR_WEIGHT)
        kept: np.ndarray = (chances * (np.arange(MOST) < lengths[..., None])).sum(axis=2)
        return kept


def _cut(proposal: Proposal, rows: np.ndarray) -> Proposal:
    """``proposal`` for ``rows`` (B,) bool alone."""
    if rows[proposal.lengths > 0].all():
        return proposal
    return Proposal(proposal.tokens, np.where(rows, proposal.lengths, 0), proposal.logits)
