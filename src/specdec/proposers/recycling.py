"""Token Recycling (2408.08696): what the target itself scored best after each token, the last time it stood there.

Verification scores every guess, also those that are thrown away. For each token the best successor is kept, one
table a row, and the draft follows the chain of successors from the row's last token; before anything was
scored, a token is followed by what followed it in the prompt. (The paper keeps k successors and guesses a tree;
a chain needs the first one only.) The table lives on the target's device: nothing is copied, and only the CPU,
where reading costs nothing, looks where the chain breaks off. A table lives as long as a call and belongs to
its row: no row is guessed for from another one's text.
Knows nothing of verification. Read next: ``drafting.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.proposers import Call, Proposer
from specdec.records import Proposal, Round
from specdec.state import State
from specdec.transfer import to_device
from specdec.verify import highest


class Recycling:
    """Guess the chain of the best successors that the target has shown."""

    def begin(self, call: Call) -> Proposer:
        """A table for every row of one call: B x V x 8 bytes."""
        return _Run(call)


class _Run:
    """The successors of one call.

    A successor is held as age * V + token, so that the newest of several is the largest number, in whatever
    order a device writes them; -1 where nothing is known.
    """

    def __init__(self, call: Call) -> None:
        self._prompt = call.prompt
        # embeddings may be given instead of ids: what stood there is then no id
        self._last = call.prompt[:, -1] if call.prompt.shape[1] else call.prompt.new_full((len(call.prompt),), -1)
        self._one_by_one = call.processing.in_lockstep
        self._table = torch.zeros(0, dtype=torch.int64)
        self._age = 0

    def observe(self, round_: Round) -> None:
        """Learn from every scored position, those behind a refused guess included."""
        if not len(self._table):
            self._from_prompt(round_.scores.shape[-1])
        guessed = round_.proposal.tokens[:, : round_.scores.shape[1] - 1]
        before = torch.cat([self._last[:, None], guessed], dim=1)
        # positions that were not verified: beyond a row's guesses, or behind the end of a lockstep round
        known = round_.accepted if self._one_by_one else round_.lengths
        step = torch.arange(before.shape[1], device=before.device)
        real = step <= to_device(known, before.device)[:, None]
        self._learn(before, highest(round_.scores[:, : before.shape[1]]), real)

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        last = state.tokens.gather(1, state.device_lengths[:, None] - 1)
        self._last = last[:, 0]
        most = int(limits.max(initial=0))
        if most == 0:
            return Proposal.empty(state.batch, state.device)
        if not len(self._table):
            self._from_prompt(state.vocabulary)
        chain, known = [], []
        for _ in range(most):
            found = self._table.gather(1, last)
            known.append(found >= 0)
            # behind the end of the chain any id will do: a guess like another
            last = found.clamp(min=0) % state.vocabulary
            chain.append(last)
        tokens = torch.cat(chain, dim=1)
        if tokens.device.type != "cpu":
            return Proposal(tokens, limits)
        lengths = np.minimum(limits, torch.cat(known, dim=1).long().cumprod(dim=1).sum(dim=1).numpy())
        return Proposal(tokens[:, : int(lengths.max())], lengths)

    def _from_prompt(self, vocabulary: int) -> None:
        """What followed each token in the prompt, the last time."""
        self._table = self._prompt.new_full((len(self._prompt), vocabulary), -1)
        self._learn(
            self._prompt[:, :-1], self._prompt[:, 1:], torch.ones_like(self._prompt[:, 1:], dtype=torch.bool)
        )

    def _learn(self, before: Tensor, after: Tensor, real: Tensor) -> None:
        """Token ``after`` (B, n) follows ``before`` (B, n), where ``real``; later columns are newer."""
        vocabulary = self._table.shape[1]
        real = real & (before >= 0) & (before < vocabulary) & (after >= 0) & (after < vocabulary)
        ages = self._age + torch.arange(before.shape[1], device=before.device)
        self._age += before.shape[1]
        value = torch.where(real, ages * vocabulary + after, -1)
        self._table.scatter_reduce_(1, before.clamp(0, vocabulary - 1), value, "amax")
