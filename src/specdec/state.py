"""The committed tokens of a batch: what is final, how long each row is, which rows have ended.

Row b's first ``lengths[b]`` columns are exactly the ``input_ids[b]`` that plain ``generate()`` would have at
that step, left padding included. The tokens live twice: on the device, where the rounds happen, and on the
host, where proposers without a model and stop conditions read them. The two are kept together by the one
copy a round makes. Knows no model and no rule of verification. Read next: ``proposers/__init__.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidScores
from specdec.records import Proposal, Round, States


class State:
    """Committed tokens, lengths and live rows of a batch of B rows.

    Attributes:
        tokens: (B, capacity) int64 on the device; columns from a row's length on hold its guesses or pad.
        host_tokens: (B, capacity) the committed part of the same on the host.
        lengths: (B,) committed columns on the host; ``device_lengths`` is the same on the device.
        eos_ids: (n,) ids that end a row, or None.
        live: (B,) bool, rows that have not ended; ``device_live`` is the same on the device.
        prompt_length: columns of the prompt, padding included.
        vocabulary: entries of the target's scores, once the prompt was fed.
        starts: (B,) the first column of a row's prompt that is no padding.
        max_length: columns at which every row ends.
        host_copies: copies from device to host made so far.
    """

    def __init__(
        self,
        prompt: Tensor,
        *,
        max_length: int,
        max_guesses: int,
        eos_ids: Tensor | None,
        pad_id: int,
        starts: np.ndarray,
    ) -> None:
        """Start with ``prompt`` (B, P) committed; rows end at ``eos_ids`` (n,) or at ``max_length`` columns."""
        batch, self.prompt_length = prompt.shape
        self.max_length = max_length
        self.pad_id = pad_id
        self.starts = starts
        capacity = max_length + max_guesses + 2
        self.tokens = torch.full((batch, capacity), pad_id, dtype=torch.int64, device=prompt.device)
        self.tokens[:, : self.prompt_length] = prompt
        self.host_tokens = np.full((batch, capacity), pad_id, dtype=np.int64)
        self.host_tokens[:, : self.prompt_length] = to_host(prompt)
        self.lengths = np.full(batch, self.prompt_length, dtype=np.int64)
        self.device_lengths = torch.full((batch,), self.prompt_length, dtype=torch.int64, device=prompt.device)
        self.live = np.ones(batch, dtype=bool)
        self.device_live = torch.ones(batch, dtype=torch.bool, device=prompt.device)
        self.eos_ids = eos_ids
        self.vocabulary = 0
        self.host_copies = 0

    @property
    def batch(self) -> int:
        """Number of rows."""
        return int(self.tokens.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the rounds happen."""
        return self.tokens.device

    @property
    def done(self) -> bool:
        """Every row has ended."""
        return not self.live.any()

    def room(self) -> np.ndarray:
        """(B,) guesses a row may still submit: the round's extra token must fit as well; 0 for ended rows."""
        room: np.ndarray = np.where(self.live, np.maximum(self.max_length - self.lengths - 1, 0), 0)
        return room

    def write_guesses(self, proposal: Proposal) -> None:
        """Put the guesses behind the committed tokens, so that a forward pass can be fed from one buffer."""
        width = proposal.tokens.shape[1]
        if width:
            columns = self.device_lengths[:, None] + torch.arange(width, device=self.device)
            submitted = torch.from_numpy(proposal.lengths).to(self.device, non_blocking=True)
            real = torch.arange(width, device=self.device) < submitted[:, None]
            # an id that does not exist is the verifier's to judge; a model must not be fed it
            real = real & (proposal.tokens >= 0) & (proposal.tokens < self.vocabulary)
            self.tokens.scatter_(1, columns, torch.where(real, proposal.tokens, self.pad_id))

    def commit(
        self,
        proposal: Proposal,
        accepted: Tensor,
        next_token: Tensor,
        scores: Tensor,
        logits: Tensor | None,
        states: States | None = None,
    ) -> Round:
        """Make a round's outcome final: kept guesses and one more token, cut at end-of-sequence, per row.

        Args:
            proposal: the guesses of the round.
            accepted: (B,) guesses that passed verification.
            next_token: (B,) replacement or bonus; -1 marks a row whose scores were unusable.
            scores: passed on to the round.
            logits: passed on to the round.
            states: passed on to the round.

        Raises:
            InvalidScores: a live row's scores hold NaN or forbid every token.
        """
        width = proposal.tokens.shape[1] + 1
        step = torch.arange(width, device=self.device)
        padded = torch.nn.functional.pad(proposal.tokens, (0, 1))
        emitted = torch.where(step < accepted[:, None], padded, next_token[:, None])
        counts = accepted + 1
        ended = torch.zeros_like(self.device_live)
        if self.eos_ids is not None:
            is_end = torch.isin(emitted, self.eos_ids) & (step < counts[:, None])
            # the first end inside the block cuts there; a block without one is left whole
            first = torch.where(is_end, step, width).amin(dim=1)
            ended = first < width
            counts = torch.minimum(counts, first + 1)
        counts = torch.where(self.device_live, counts, 0)
        emitted = torch.where(step < counts[:, None], emitted, self.pad_id)
        self.tokens.scatter_(1, self.device_lengths[:, None] + step, emitted)
        self.device_lengths = self.device_lengths + counts
        self.device_live = self.device_live & ~ended & (self.device_lengths < self.max_length)
        round_ = self._read(proposal, accepted, emitted, counts, scores, logits, states)
        bad = self.live & (round_.emitted == -1).any(axis=1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            column = int(self.lengths[row] + (round_.emitted[row] == -1).argmax())
            raise InvalidScores(
                f"nothing can be drawn for row {row} at column {column}; the target's scores hold NaN or "
                "forbid every token, or a proposer's guesses cannot have come from its own scores. Look at "
                "the model's dtype and at the logits processors, or pass remove_invalid_values=True; of a "
                "proposer of your own, at the ids and the logits it returns"
            )
        rows, steps = np.nonzero(np.arange(width) < round_.counts[:, None])
        self.host_tokens[rows, self.lengths[rows] + steps] = round_.emitted[rows, steps]
        self.lengths = self.lengths + round_.counts
        self.live = self._live_after
        return round_

    def _read(
        self,
        proposal: Proposal,
        accepted: Tensor,
        emitted: Tensor,
        counts: Tensor,
        scores: Tensor,
        logits: Tensor | None,
        states: States | None,
    ) -> Round:
        """The one copy of the round: everything the host needs in a single tensor."""
        width = emitted.shape[1]
        columns = [emitted, proposal.tokens]
        flags = [counts, accepted, self.device_live.to(torch.int64)]
        packed = to_host(torch.cat([*columns, torch.stack(flags, dim=1)], dim=1))
        self.host_copies += 1
        self._live_after = packed[:, -1].astype(bool)
        submitted = np.where(self.live, proposal.lengths, 0)
        return Round(
            proposal=proposal,
            drafted=packed[:, width : 2 * width - 1],
            lengths=submitted,
            accepted=np.minimum(packed[:, -2], submitted),
            emitted=packed[:, :width],
            counts=packed[:, -3],
            before=self.lengths.copy(),
            scores=scores,
            logits=logits,
            states=states,
        )

    def end_rows(self, rows: np.ndarray, length: int) -> None:
        """End ``rows`` (B,) bool at ``length`` columns; whatever they had beyond is taken back.

        Used by stop conditions that are judged on the host. Cutting an exact stream leaves it exact.
        """
        for row in np.flatnonzero(rows):
            self.host_tokens[row, length:] = self.pad_id
            self.tokens[row, length:] = self.pad_id
        self.lengths = np.where(rows, np.minimum(self.lengths, length), self.lengths)
        self.live = self.live & ~rows
        self.device_lengths = torch.from_numpy(self.lengths.copy()).to(self.device)
        self.device_live = torch.from_numpy(self.live.copy()).to(self.device)


def to_host(tensor: Tensor) -> np.ndarray:
    """The only place where the loop waits for the device; counted in tests."""
    array: np.ndarray = tensor.cpu().numpy()
    return array
