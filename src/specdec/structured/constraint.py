"""A grammar as a logits processor: each token is drawn from what the grammar allows at that place.

For speculative decoding it is a ``Stepwise`` processor, whose states are values; for plain ``generate()`` the same
object is an ordinary ``LogitsProcessor``, which remembers the states of the rows it saw last. The grammar begins
behind the prompt. When it is at its end only end-of-sequence is allowed.
Knows no library of grammars, only what it asks of one: ``Grammar`` and ``Matcher``. Read next: ``xgrammar.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from specdec.errors import InvalidInput
from specdec.transfer import to_device

WORD = 32  # bits in an entry of a mask


class Matcher(Protocol):
    """A place in a grammar; a value, which never changes.

    Attributes:
        ended: the text has ended, nothing can follow.
    """

    ended: bool

    def mask(self) -> np.ndarray:
        """(W,) int32: bit t % 32 of entry t // 32 says whether token t may follow. To be kept, not written into."""
        ...

    def after(self, token: int) -> Matcher:
        """The place one token further, for a token that the mask allows."""
        ...

    def forward(self) -> list[int]:
        """Tokens that must follow or very probably will, beyond what the mask says; may be empty."""
        ...


class Grammar(Protocol):
    """A compiled grammar.

    Attributes:
        ends: token ids that end a text.
    """

    ends: tuple[int, ...]

    def start(self) -> Matcher:
        """Before the first token."""
        ...


class Constraint(LogitsProcessor):  # type: ignore[misc]
    """Keep every row of a batch to its grammar.

    Give it to ``generate(logits_processor=[...])``, of ``SpeculativeGenerator`` or of the model itself. It may be
    used again and again. The model's own ``generate()`` does not say when a call begins: a call whose prompt is
    exactly what the last call returned looks as if that went on, and the grammar goes on too; make a new object
    for it, which costs nothing once the grammar is compiled: ``Constraint(old.grammars)``.
    """

    def __init__(self, grammar: Grammar | Constraint | Sequence[Grammar | Constraint | None] | None) -> None:
        """Keep to ``grammar``; or to one each, a sequence with one for each prompt (None: no grammar).

        What ``regex`` and its like return is taken as the grammar that it keeps to.

        Raises:
            InvalidInput: an empty sequence, or something in it that is no grammar.
        """
        given = list(grammar) if isinstance(grammar, Sequence) else [grammar]
        self.grammars: list[Grammar | None] = [_grammar(one) for one in given]
        if not self.grammars:
            raise InvalidInput("an empty list of grammars; give one for all prompts, or one each")
        self._seen: dict[tuple[int, bytes], Matcher | None] = {}  # states by grammar and ids, of the last call

    def start(self, prompt: Tensor) -> list[Matcher | None]:
        """See ``Stepwise.start``; ``num_return_sequences`` shares a grammar among the rows of a prompt."""
        starts = {id(one): None if one is None else one.start() for one in self.grammars}
        return [starts[id(self.grammars[which])] for which in self._numbers(len(prompt))]

    def advance(self, state: Matcher, token: int) -> Matcher | None:
        """See ``Stepwise.advance``; behind the end nothing changes any more."""
        if state.ended:
            return state
        return state.after(token) if allows(state.mask(), token) else None

    def process(self, states: Sequence[Matcher | None], scores: Tensor) -> Tensor:
        """See ``Stepwise.process``; a row without a state is left as it is."""
        return scores.masked_fill(forbidden([None if s is None else s.mask() for s in states], scores), -torch.inf)

    def forward(self, state: Matcher, most: int) -> list[int]:
        """The tokens that the grammar leaves no choice about, or nearly none."""
        found: list[int] = []
        here: Matcher | None = state
        while here is not None and not here.ended and len(found) < most:
            only = single(here.mask())
            ahead = here.forward() if only is None else [only]
            if not ahead:
                break
            for token in ahead:
                here = self.advance(here, token)
                if here is None:
                    return found[:most]
                found.append(token)
        return found[:most]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One step of plain ``generate()``: ids (B, L), scores (B, V)."""
        ids = input_ids.cpu()
        numbers = self._numbers(len(ids))
        rows = list(zip(numbers, ids, strict=True))
        before = [(number, row[:-1].numpy().tobytes()) for number, row in rows]
        if ids.shape[1] and all(key in self._seen for key in before):
            states = []
            for key, row in zip(before, ids, strict=True):
                state = self._seen[key]
                states.append(None if state is None else self.advance(state, int(row[-1])))
        else:
            states = self.start(ids)
        self._seen = {(n, row.numpy().tobytes()): state for (n, row), state in zip(rows, states, strict=True)}
        return self.process(states, scores)

    def _numbers(self, rows: int) -> list[int]:
        """Which grammar each row has."""
        if rows % len(self.grammars):
            raise InvalidInput(f"{len(self.grammars)} grammars for {rows} rows; give one for all, or one a prompt")
        return [row * len(self.grammars) // rows for row in range(rows)]


def _grammar(given: Any) -> Grammar | None:
    if isinstance(given, Constraint) and len(given.grammars) == 1:
        return given.grammars[0]
    if given is not None and (isinstance(given, Constraint) or not hasattr(given, "start")):
        raise InvalidInput(
            f"a {type(given).__name__} among the grammars; give for each prompt what regex(...) or the like "
            "returns, or None"
        )
    found: Grammar | None = given
    return found


def forbidden(masks: Sequence[np.ndarray | None], scores: Tensor) -> Tensor:
    """(N, V) bool, what ``masks`` (one (W,) int32 a row) do not allow; tokens they do not know are forbidden."""
    vocabulary = scores.shape[1]
    words = max((len(mask) for mask in masks if mask is not None), default=0)
    packed = np.zeros((len(masks), words), dtype=np.int32)
    for row, mask in enumerate(masks):
        packed[row] = -1 if mask is None else np.pad(mask, (0, words - len(mask)))
    if scores.device.type == "cpu":
        bits = np.unpackbits(~packed.view(np.uint8), axis=1, count=min(words * WORD, vocabulary), bitorder="little")
        out = torch.from_numpy(bits.view(np.bool_))
    else:
        shifts = torch.arange(WORD, dtype=torch.int32, device=scores.device)
        there = to_device(packed, scores.device)
        out = ((there[..., None] >> shifts) & 1 == 0).flatten(1)[:, :vocabulary]
    missing = vocabulary - out.shape[1]
    if missing:
        unknown = to_device(np.array([mask is not None for mask in masks]), scores.device)
        out = torch.cat([out, unknown[:, None].expand(-1, missing)], dim=1)
    return out


def allows(mask: np.ndarray, token: int) -> bool:
    """Whether ``mask`` (W,) lets ``token`` follow."""
    word, bit = divmod(token, WORD)
    return 0 <= word < len(mask) and bool(int(mask[word]) >> bit & 1)


def single(mask: np.ndarray) -> int | None:
    """The only token that ``mask`` (W,) allows; None where there are several, or none."""
    places = np.flatnonzero(mask)
    if len(places) != 1:
        return None
    bits = int(mask[places[0]]) & 0xFFFFFFFF
    return int(places[0]) * WORD + bits.bit_length() - 1 if bits.bit_count() == 1 else None


def mask_of(tokens: Sequence[int], words: int) -> np.ndarray:
    """(``words``,) int32 mask with the bits of ``tokens``."""
    mask = np.zeros(words, dtype=np.uint32)
    for token in tokens:
        mask[token // WORD] |= np.uint32(1 << token % WORD)
    return mask.view(np.int32)


def refused(what: str, error: Any) -> InvalidInput:
    """A library refused a grammar."""
    return InvalidInput(f"the {what} cannot be used: {error}")
