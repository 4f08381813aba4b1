"""The vocabulary of the project as frozen records: Proposal, Round, Stats.

Knows no model, cache or rule. Shapes: B rows, K guesses a row at most, V entries of the vocabulary.
Words are defined in ``docs/glossary.md``. Read next: ``state.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.transfer import to_device


@dataclass(frozen=True, slots=True)
class Proposal:
    """Guesses for the next tokens of every row.

    Args:
        tokens: (B, K) int64 on the target's device. Entries past a row's length are ignored.
        lengths: (B,) int64 numpy array, 0..K: how many guesses each row submits.
        logits: (B, K, V) scores whose softmax is exactly what each guess was drawn from, or None:
            guesses without probabilities are judged as certain (one-hot), which is exact for any
            guess that did not look at the verifier's random numbers.
    """

    tokens: Tensor
    lengths: np.ndarray
    logits: Tensor | None = None

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Proposal:
        """No guess for any of ``batch`` rows: a round with it is one step of plain decoding."""
        tokens = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        return cls(tokens, np.zeros(batch, dtype=np.int64))

    @classmethod
    def certain(cls, guesses: Sequence[Sequence[int]], device: torch.device) -> Proposal:
        """Guesses without probabilities, a list for each row; lists may differ in length and be empty."""
        lengths = np.array([len(row) for row in guesses], dtype=np.int64)
        tokens = np.zeros((len(guesses), int(lengths.max(initial=0))), dtype=np.int64)
        for row, guess in enumerate(guesses):
            tokens[row, : len(guess)] = guess
        return cls(to_device(tokens, device), lengths)


# name of an output of the model -> for each layer (B, K + 1, ...)
States = dict[str, list[Tensor]]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did; all arrays are on the host.

    Args:
        proposal: the guesses as they were submitted.
        drafted: (B, K) the guesses.
        lengths: (B,) guesses submitted a row; 0 for rows that had ended.
        accepted: (B,) guesses that passed verification, cut afterwards or not.
        emitted: (B, K + 1) tokens committed; pad past ``counts``.
        counts: (B,) tokens committed a row: accepted + 1, or less where a stop condition cut.
        before: (B,) committed columns before the round, prompt and padding included.
        scores: (B, K + 1, V) processed target scores on the device, row i drew emitted token i; as the model gave
            them where nothing processes them.
        logits: the scores before processing, or None when nobody asked for them.
        states: hidden states and attentions of the same rows, or None when nobody asked for them.
    """

    proposal: Proposal
    drafted: np.ndarray
    lengths: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray
    counts: np.ndarray
    before: np.ndarray
    scores: Tensor
    logits: Tensor | None = None
    states: States | None = None

    @property
    def hidden(self) -> Tensor | None:
        """The target's last hidden states, as its head reads them, for a proposer that ``wants_hidden``.

        (B, K + 1, D): row i scored emitted token i, so it belongs to the token before. The first round has the
        whole prompt's, (B, P, D), the last of which scored its only token. None when nobody asked for any.
        """
        for name in ("hidden_states", "decoder_hidden_states"):
            if self.states and self.states.get(name):
                return self.states[name][-1]
        return None


@dataclass(slots=True, eq=False)
class Stats:
    """What a call of ``generate()`` did.

    Counts and times tell how well the text could be guessed, and so something of the text itself (2411.01076):
    show them to those who may read it (``docs/private-streaming.md``).

    Attributes:
        rounds: target passes that emitted tokens; the prefill is the first.
        drafted: guesses submitted for rows that had not ended.
        accepted: guesses that passed verification, cut by a stop condition afterwards or not.
        emitted: tokens committed, end-of-sequence included, padding excluded.
        accepted_at: accepted_at[i] guesses at position i (from 0) were accepted, of ``drafted_at[i]``.
        drafted_at: see ``accepted_at``.
        target_forwards: forward passes of the target, self-check and replays included.
        draft_forwards: forward passes of the draft model, 0 for a proposer without one.
        host_copies: copies from device to host that the loop made: one a round, and more where a grammar must
            know the guesses.
        prediction_accepted: tokens of the call's ``prediction`` that appeared in the text.
        prediction_rejected: tokens of the prediction that did not; both 0 without one.
        layout: how the target's batch kept its keys and values.
        draft_layout: the same for the draft model, "" where there is none; "shared slots" where it is part of the
            target and keeps nothing of its own.
        drafting: what a draft says of itself: how one with another tokenizer was used and why so, what a level of
            a cascade kept of the one below, how often a mixture used which; "" for any other.
        row_drafted, row_accepted, row_emitted: the same counts per row, (B,).
        decodings: how often the target's ``generate()`` decoded: once, but for long recordings (Whisper), which it
            takes piece by piece; the counts per row are then those of the first decoding, the second, and so on.
        seconds_drafting, seconds_scoring, seconds_verifying, seconds: wall-clock time of the host;
            on a GPU the work is asynchronous and the time falls to whoever waits.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    drafted_at: list[int] = field(default_factory=list)
    target_forwards: int = 0
    draft_forwards: int = 0
    host_copies: int = 0
    prediction_accepted: int = 0
    prediction_rejected: int = 0
    layout: str = ""
    draft_layout: str = ""
    drafting: str = ""
    row_drafted: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    row_accepted: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    row_emitted: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    decodings: int = 1
    seconds_drafting: float = 0.0
    seconds_scoring: float = 0.0
    seconds_verifying: float = 0.0
    seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0.0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Emitted / (rounds x rows): tokens a row got from a round, the extra token included."""
        rows = max(len(self.row_emitted), 1) / self.decodings
        return self.emitted / (self.rounds * rows) if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Emitted / seconds."""
        return self.emitted / self.seconds if self.seconds else 0.0

    @property
    def seconds_other(self) -> float:
        """Seconds outside drafting, scoring and verifying."""
        spent = self.seconds_drafting + self.seconds_scoring + self.seconds_verifying
        return max(self.seconds - spent, 0.0)

    def count(self, round_: Round) -> None:
        """Add one round to the counts."""
        if not len(self.row_emitted):
            rows = len(round_.counts)
            self.row_drafted, self.row_accepted, self.row_emitted = (
                np.zeros(rows, dtype=np.int64) for _ in range(3)
            )
        self.rounds += 1
        self.row_drafted += round_.lengths
        self.row_accepted += round_.accepted
        self.row_emitted += round_.counts
        drafted, accepted = round_.lengths.tolist(), round_.accepted.tolist()
        missing = [0] * (max(drafted, default=0) - len(self.drafted_at))
        self.drafted_at += missing
        self.accepted_at += missing
        for row_drafted, row_accepted in zip(drafted, accepted, strict=True):
            for position in range(row_drafted):
                self.drafted_at[position] += 1
            for position in range(row_accepted):
                self.accepted_at[position] += 1
        self.drafted += sum(drafted)
        self.accepted += sum(accepted)
        self.emitted += sum(round_.counts.tolist())

    def add(self, other: Stats) -> None:
        """Add what a later decoding of the same call did; its layouts and what its draft said count."""
        for name in ("accepted_at", "drafted_at"):
            pairs = zip_longest(getattr(self, name), getattr(other, name), fillvalue=0)
            setattr(self, name, [one + another for one, another in pairs])
        for name in ("row_drafted", "row_accepted", "row_emitted"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        for name in self.__slots__:
            value = getattr(other, name)
            if isinstance(value, (int, float)):
                setattr(self, name, getattr(self, name) + value)
            elif isinstance(value, str):
                setattr(self, name, value)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON; the derived rates included."""
        names = [n for n in self.__slots__ if not n.startswith("row_")]
        out: dict[str, Any] = {name: getattr(self, name) for name in names}
        out["acceptance_rate"] = self.acceptance_rate
        out["tokens_per_round"] = self.tokens_per_round
        out["tokens_per_second"] = self.tokens_per_second
        for name in ("row_drafted", "row_accepted", "row_emitted"):
            out[name] = getattr(self, name).tolist()
        return out
