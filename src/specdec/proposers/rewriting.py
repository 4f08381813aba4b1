"""Text between two tokenizers: the committed text in the draft's ids, and the draft's text in the target's.

Tokenizers are neither injective nor does the encoding of a text begin with that of its beginning. So the ids of
a row's last few tokens may change when text is added; a ``DraftRow`` encodes a short tail again each round and
settles what lies before it. In the other direction (``follow``) the draft's text is encoded together with the
last committed tokens, and what follows them is a guess only if they come out as they are committed: string-level
exact match of Timor et al. 2502.05202, section 3. The target's own tokens are never encoded again.

Knows no model. A wrong answer here costs a guess, never the output's law. Read next: ``draft_past.py``.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from specdec.proposers.vocabulary import ROLES, Shared, Vocabulary, split_unfinished

# ids of a row's end that are encoded again; twice as many are there before some are settled
TAIL = 8
# a tail this long that cannot be cut (a normaliser changed its text) is settled as a whole
LONGEST_TAIL = 64
# committed tokens in front of a text when the target's tokenizer encodes it; the first number that fits is used
LOOK_BEHIND = (16, 4, 1)


class Translator:
    """What the target's ids say to the draft: text, in which shared special tokens are the draft's own."""

    def __init__(self, target: Vocabulary, draft: Vocabulary, shared: Shared) -> None:
        """Translate with the pairs of ``shared``."""
        self.target, self.draft, self.shared = target, draft, shared
        self._said = list(target.pieces.of)
        special = np.isin(shared.target_ids, list(target.pieces.special))
        for one, other in zip(shared.target_ids[special], shared.draft_ids[special], strict=True):
            self._said[one] = draft.pieces.of[other]
        self._begin = target.pieces.roles.get(ROLES[1])

    @cached_property
    def _byte_ids(self) -> dict[bytes, int]:
        """The draft's ids for a few bytes, by these; made when a text first ends inside a character."""
        return {piece: one for one, piece in enumerate(self.draft.pieces.of) if 0 < len(piece) < 4}

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """What the target's ``ids`` (n,) say to the draft."""
        said = self._said
        return b"".join(said[one] for one in ids.tolist() if 0 <= one < len(said))

    def prompts(self, rows: list[np.ndarray]) -> tuple[list[list[int]], list[bytes]]:
        """Each prompt in the draft's ids, at least one, and bytes at its end that finish no character."""
        texts, rest = [], []
        for ids in rows:
            if len(ids) and ids[0] == self._begin:
                ids = ids[1:]
            text, unfinished = split_unfinished(self.bytes_of(ids))
            if self.target.pieces.starts_with_space:
                text = text.removeprefix(" ")
            texts.append(text)
            rest.append(unfinished)
        roles = self.draft.pieces.roles
        filler = next((roles[name] for name in ("bos_token_id", "eos_token_id") if name in roles), 0)
        return [ids or [filler] for ids in self.draft.encode_start(texts)], rest

    def unfinished_ids(self, rest: bytes) -> list[int] | None:
        """The draft's ids for bytes that finish no character; None if it has none."""
        if rest in self._byte_ids:
            return [self._byte_ids[rest]]
        parts = [self._byte_ids.get(rest[i : i + 1]) for i in range(len(rest))]
        return [one for one in parts if one is not None] if None not in parts else None

    def follow(self, committed: list[np.ndarray], texts: list[bytes]) -> list[list[int]]:
        """The target's ids that ``texts`` add to its committed ids; [] where they do not come out unchanged.

        Args:
            committed: the last ids of each row, at most ``LOOK_BEHIND[0]`` are looked at.
            texts: what the draft wrote behind them.
        """
        out: list[list[int]] = [[] for _ in texts]
        waiting = [row for row, text in enumerate(texts) if text]
        for size in LOOK_BEHIND:
            windows = {row: _window(self.target, committed[row][-size:].tolist()) for row in waiting}
            joined = [split_unfinished(self.target.pieces.join(windows[row]) + texts[row])[0] for row in waiting]
            failed = []
            for row, ids in zip(waiting, self.target.encode(joined), strict=True):
                window = windows[row]
                if window and ids[: len(window)] == window:
                    out[row] = ids[len(window) :]
                else:
                    failed.append(row)
            waiting = failed
            if not waiting:
                break
        return out


class DraftRow:
    """One row's committed text in the draft's ids: ``settled`` ids that never change again, and a tail.

    Attributes:
        settled: how many ids (columns, with padding) will not change.
        tail: the ids behind them; never empty, so that there is one to be fed.
        known: False if the end of the text cannot be said in the draft's ids: then nothing can be guessed.
    """

    def __init__(self, settled: int, unfinished: bytes) -> None:
        """Begin behind a prompt of ``settled`` columns with ``unfinished`` bytes at its end."""
        self.settled = settled
        self.tail: list[int] = [0]
        self.known = False
        self._data = unfinished

    def add(self, data: bytes) -> str:
        """Add committed ``data``; the text to encode."""
        self._data += data
        return split_unfinished(self._data)[0]

    def encoded(self, ids: list[int], translator: Translator) -> list[int]:
        """Take the ``ids`` of the text that ``add`` returned; returns ids to be settled, which leave the tail."""
        rest = split_unfinished(self._data)[1]
        unfinished = translator.unfinished_ids(rest)
        pieces = translator.draft.pieces
        head: list[int] = []
        if len(ids) > 2 * TAIL:
            head, remaining = ids[:-TAIL], ids[-TAIL:]
            said = pieces.join(head)
            if self._data.startswith(said) and _begins_a_character(self._data[len(said) :]):
                self._data, ids = self._data[len(said) :], remaining
            elif len(ids) > LONGEST_TAIL:
                head, ids, self._data = ids, [], rest
            else:
                head = []
        self.settled += len(head)
        self.tail = ids + (unfinished or [])
        self.known = bool(self.tail) and unfinished is not None
        if not self.tail:
            self.tail = [0]
        return head


def _window(vocabulary: Vocabulary, ids: list[int]) -> list[int]:
    """The end of ``ids`` that begins with a whole character."""
    pieces = vocabulary.pieces
    for start, one in enumerate(ids):
        if 0 <= one < len(pieces.of) and pieces.of[one] and _begins_a_character(pieces.of[one]):
            return ids[start:]
    return []


def _begins_a_character(data: bytes) -> bool:
    return not data or data[0] & 0xC0 != 0x80
