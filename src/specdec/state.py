"""The committed tokens of a batch: what is final, how long each row is, which rows have ended.

Row b's first ``lengths[b]`` columns are exactly the ``input_ids[b]`` that plain ``generate()`` would have at
that step, left padding included. The tokens live twice: on the device, where the rounds happen, and on the
host, where proposers without a model and stop conditions read them. The two are kept together by the one
copy a round makes: the host reads the verdict, settles what is final, and writes it to both. On a CPU the two are
one memory. Knows no model and no rule of verification. Read next: ``clock.py``.
"""

from __future__ import annotations

from itertools import compress

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidScores
from specdec.records import Proposal, Round, States
from specdec.transfer import to_device, to_host, together_to_host

ROOM = 4096  # columns made for tokens to come
FOREVER = 1 << 40  # columns: a limit beyond it is none


class State:
    """Committed tokens, lengths and live rows of a batch of B rows.

    Attributes:
        device: where the rounds happen.
        tokens: (B, capacity) int64 on the device; columns from a row's length on hold its guesses or pad.
        host_tokens: (B, capacity) the same on the host; only the committed part is to be relied on.
        lengths: (B,) committed columns on the host; neither it nor ``live`` is ever written into.
        eos_ids: (n,) ids that end a row, or None.
        end_ids: the same on the host.
        settled: (B,) committed columns that nothing takes back: ``lengths``, except where a proposer has rounds
            of its own (``proposers/cascade.py``), whose text the target has yet to judge.
        live: (B,) bool, rows that have not ended.
        prompt_length: columns of the prompt, padding included.
        vocabulary: entries of the target's scores, once the prompt was fed.
        starts: (B,) the first column of a row's prompt that is no padding.
        max_length: columns at which every row ends; at least one more than the prompt's.
        reserve: columns that there are behind the longest row, whatever its length: a round's guesses and two more.
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
        # as in plain generate(), a limit is judged behind a token: one is written, however low the limit
        self.max_length = min(max(max_length, self.prompt_length + 1), FOREVER)
        self.pad_id = pad_id
        self.starts = starts
        self.reserve = min(max_guesses, self.max_length - self.prompt_length) + 2
        capacity = min(self.max_length, self.prompt_length + ROOM) + self.reserve
        self.tokens = torch.full((batch, capacity), pad_id, dtype=torch.int64, device=prompt.device)
        self.tokens[:, : self.prompt_length] = prompt
        self.device = prompt.device
        self._is_host = prompt.is_cpu
        if self._is_host:
            self.host_tokens: np.ndarray = self.tokens.numpy()
        else:
            self.host_tokens = np.full((batch, capacity), pad_id, dtype=np.int64)
            self.host_tokens[:, : self.prompt_length] = to_host(prompt)
        self.lengths = np.full(batch, self.prompt_length, dtype=np.int64)
        self._settled: np.ndarray | None = None
        self.live = np.ones(batch, dtype=bool)
        self.eos_ids = eos_ids
        self.end_ids = frozenset[int]() if eos_ids is None else frozenset(to_host(eos_ids).reshape(-1).tolist())
        self.vocabulary = 0
        self.host_copies = 0

    @property
    def batch(self) -> int:
        """Number of rows."""
        return int(self.tokens.shape[0])

    @property
    def prompt(self) -> Tensor:
        """(B, P) ids of the prompt on the device, padding included."""
        return self.tokens[:, : self.prompt_length]

    @property
    def device_lengths(self) -> Tensor:
        """``lengths`` on the device."""
        return to_device(self.lengths, self.device)

    @property
    def device_live(self) -> Tensor:
        """``live`` on the device."""
        return to_device(self.live, self.device)

    @property
    def done(self) -> bool:
        """Every row has ended."""
        return not any(self.live.tolist())

    @property
    def settled(self) -> np.ndarray:
        """See the class."""
        return self.lengths if self._settled is None else self._settled

    @property
    def foundation(self) -> int:
        """Columns that nothing takes back in any row that has not ended: nobody needs to look there again."""
        return min(compress(self.settled.tolist(), self.live.tolist()), default=self.tokens.shape[1])

    def follow(self, other: State, since: int) -> None:
        """Hold the text of ``other``, which is known to be the same below column ``since``, as the settled one."""
        upto = int(other.lengths.max())
        self._make_room(upto)
        self.host_tokens[:, since:upto] = other.host_tokens[:, since:upto]
        if not self._is_host:
            self.tokens[:, since:upto] = other.tokens[:, since:upto]
        self.lengths, self.live, self._settled = other.lengths, other.live, other.settled
        self.vocabulary = other.vocabulary

    def only(self, rows: np.ndarray) -> None:
        """Let ``rows`` (B,) bool take part, and the others rest as if they had ended, until told otherwise."""
        self.live = rows

    def room(self) -> np.ndarray:
        """(B,) guesses a row may still submit: the round's extra token must fit as well; 0 for ended rows."""
        room: np.ndarray = np.maximum(self.max_length - 1 - self.lengths, 0) * self.live
        return room

    def ends(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each of ``tokens`` ends a row."""
        return np.isin(tokens, list(self.end_ids))

    def write_guesses(self, proposal: Proposal) -> None:
        """Put the guesses behind the committed tokens, so that a forward pass can be fed from one buffer."""
        width = proposal.tokens.shape[1]
        if width:
            # an id that does not exist is the verifier's to judge; a model must not be fed it
            guesses = proposal.tokens.clamp(0, self.vocabulary - 1)
            if span(proposal.lengths)[0] < width:
                past = to_device(np.arange(width) >= proposal.lengths[:, None], self.device)
                guesses = guesses.masked_fill(past, self.pad_id)
            put(self.tokens, self.lengths, guesses)

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
            InvalidScores: a live row's scores hold NaN or forbid every token, and no live row is behind it.
        """
        # the one copy of the round: everything the host needs
        drafted, passed, following = together_to_host(proposal.tokens, accepted, next_token)
        self.host_copies += 1
        texts: list[list[int]] = []
        live, before = self.live.tolist(), self.lengths.tolist()
        judged = zip(drafted.tolist(), passed.tolist(), following.tolist(), strict=True)
        for row, (guesses, kept, extra) in enumerate(judged):
            tokens = [*guesses[:kept], extra] if live[row] else []
            end = next((place for place, token in enumerate(tokens) if token in self.end_ids), None)
            if end is not None:
                tokens, live[row] = tokens[: end + 1], False
            if tokens == [-1] and before[row] > int(self.lengths[self.live].min()):
                tokens = []  # the others come up to it first: a stop condition may end all rows here
            if -1 in tokens:
                raise _unusable(row, before[row] + tokens.index(-1))
            live[row] = live[row] and before[row] + len(tokens) < self.max_length
            texts.append(tokens)
        width = drafted.shape[1] + 1
        emitted = np.array([tokens + [self.pad_id] * (width - len(tokens)) for tokens in texts], dtype=np.int64)
        counts = np.array([len(tokens) for tokens in texts], dtype=np.int64)
        round_ = Round(
            proposal=proposal,
            drafted=drafted.copy(),  # a proposer may write into its memory again
            lengths=proposal.lengths.copy(),
            accepted=np.minimum(passed, proposal.lengths),
            emitted=emitted,
            counts=counts,
            before=self.lengths,
            scores=scores,
            logits=logits,
            states=states,
        )
        put_on_host(self.host_tokens, self.lengths, emitted)
        if not self._is_host:
            put(self.tokens, self.lengths, to_device(emitted, self.device))
        self.lengths, self.live = self.lengths + counts, np.array(live)
        self._make_room(span(self.lengths)[1])
        return round_

    def _make_room(self, longest: int) -> None:
        """``reserve`` columns behind ``longest``, in blocks: few texts become as long as they may."""
        missing = longest + self.reserve - self.tokens.shape[1]
        if missing <= 0:
            return
        self.tokens = widened(self.tokens, missing + ROOM, self.pad_id)
        if self._is_host:
            self.host_tokens = self.tokens.numpy()
        else:
            self.host_tokens = widened(torch.from_numpy(self.host_tokens), missing + ROOM, self.pad_id).numpy()

    def text(self, pad_id: int | None) -> Tensor:
        """(B, L) the committed tokens of all rows, a copy, with ``pad_id`` behind the end of a row."""
        longest = int(self.lengths.max())
        text = self.tokens[:, :longest].clone()
        if pad_id is not None and pad_id != self.pad_id:
            text.masked_fill_(to_device(np.arange(longest) >= self.lengths[:, None], self.device), pad_id)
        return text

    def end_rows(self, rows: np.ndarray, length: int) -> None:
        """End ``rows`` (B,) bool at ``length`` columns; whatever they had beyond is taken back.

        Used by stop conditions that are judged on the host. Cutting an exact stream leaves it exact.
        """
        for row in np.flatnonzero(rows):
            self.host_tokens[row, length:] = self.pad_id
            self.tokens[row, length:] = self.pad_id
        self.lengths = np.where(rows, np.minimum(self.lengths, length), self.lengths)
        self.live = self.live & ~rows


def _unusable(row: int, column: int) -> InvalidScores:
    """Row ``row`` was to emit -1 at ``column``, because nothing could be drawn."""
    return InvalidScores(
        f"nothing can be drawn for row {row} at column {column}; the target's scores hold NaN or "
        "forbid every token, or a proposer's guesses cannot have come from its own scores. Look at "
        "the model's dtype and at the logits processors, or pass remove_invalid_values=True; of a "
        "proposer of your own, at the ids and the logits it returns"
    )


def widened(buffer: Tensor, columns: int, value: int = 0) -> Tensor:
    """``buffer`` (B, capacity) with so many more ``columns``, which hold ``value``; itself where that is none."""
    return buffer if columns <= 0 else torch.nn.functional.pad(buffer, (0, columns), value=value)


def in_common(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(B,) columns that the rows of two arrays (B, n) have in common from their beginning on."""
    same = np.zeros((len(one), one.shape[1] + 1), dtype=bool)  # behind the last column nothing is the same
    np.equal(one, other, out=same[:, :-1])
    count: np.ndarray = same.argmin(axis=1)
    return count


def span(values: np.ndarray) -> tuple[int, int]:
    """(lowest, highest) of ``values`` (B,); a batch of one row is so common that it has a way of its own."""
    if len(values) == 1:
        only = values.item()
        return only, only
    return int(values.min()), int(values.max())


def put(buffer: Tensor, first: np.ndarray, values: Tensor) -> None:
    """Write ``values`` (B, W) into ``buffer`` (B, capacity), row b from column ``first[b]`` on."""
    if buffer.is_cpu:  # one memory, and numpy is begun sooner
        put_on_host(buffer.numpy(), first, values.numpy())
        return
    width = values.shape[1]
    lowest, highest = span(first)
    if lowest == highest:
        buffer[:, lowest : lowest + width] = values
        return
    columns = to_device(first, buffer.device)[:, None]
    buffer.scatter_(1, columns + torch.arange(width, device=buffer.device), values)


def put_on_host(buffer: np.ndarray, first: np.ndarray, values: np.ndarray) -> None:
    """The same as ``put`` for arrays."""
    width = values.shape[1]
    lowest, highest = span(first)
    if lowest == highest:
        buffer[:, lowest : lowest + width] = values
    else:
        np.put_along_axis(buffer, first[:, None] + np.arange(width), values, axis=1)
