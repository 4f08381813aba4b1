"""Copying from the longest match (SAM-Decoding, 2411.10666; the store: SuffixDecoding, 2411.04975).

The longest end of a row's text that stood somewhere before is found by a suffix automaton in amortised O(1) a
token, however long the text; what followed there is guessed, and the longer the match, the more. Beside its own
text a row may look into a ``Store`` of earlier outputs of the same tenant; the longer match wins, the row's own
at a tie. No model, no probabilities: guesses are judged as certain, which is exact for any guess.
Knows nothing of how the automaton works. Read next: ``automaton.py``.
"""

from __future__ import annotations

from math import inf

import numpy as np

from specdec.errors import InvalidInput
from specdec.proposers import Call, Proposer, existing, one_a_row
from specdec.proposers.automaton import NOTHING, SuffixAutomaton
from specdec.proposers.store import Reader, Store
from specdec.records import Proposal, Stats
from specdec.state import State
from specdec.transfer import to_host
from specdec.whole import at_least, real

FEW = 4  # guesses that the shortest match is worth


class Suffix:
    """Guess what followed the longest earlier occurrence of the row's end."""

    def __init__(
        self, *, shortest: int = 1, per_match: float = 2.0, store: Store | None = None, tenant: str | None = None
    ) -> None:
        """Match at least ``shortest`` tokens, in the row's own text and in ``store``.

        Args:
            shortest: matches below this many tokens guess nothing; >= 1.
            per_match: >= 0; a match of m tokens guesses at most 4 + m * per_match. The longer a match, the
                longer it goes on, as a rule.
            store: outputs of earlier calls to look into, and where this call's outputs go. None: a row
                sees its own text only.
            tenant: whose texts those are, for calls that do not say so themselves (``tenant=``).

        Raises:
            InvalidInput: a number out of range, no ``Store``, or a tenant without one.
        """
        self._shortest = at_least(1, "Suffix: shortest", shortest)
        guesses = real(per_match)
        if guesses is None or not 0 <= guesses < inf:
            raise InvalidInput(f"Suffix: per_match={per_match!r}; give a number >= 0")
        if tenant is not None and store is None:
            raise InvalidInput(f"Suffix(tenant={tenant!r}) without a store; give store=Store() as well")
        if store is not None and not isinstance(store, Store):
            raise InvalidInput(f"Suffix: store is a {type(store).__name__}; give store=Store()")
        self._per_match = guesses
        self._store = store
        self._tenant = tenant

    def begin(self, call: Call) -> Proposer:
        """Automata for the rows of one call."""
        batch = call.prompt.shape[0]
        said: list[str | None] = [self._tenant] if call.tenants is None else [*call.tenants]
        tenants = one_a_row(said, batch, "tenant")
        if self._store is not None and None in tenants:
            raise InvalidInput(
                "a Store must know whose text it keeps: pass generate(tenant='...'), one for the call or a "
                "list with one a row, or Suffix(store=..., tenant='...')"
            )
        return _Run(self._shortest, self._per_match, self._store, tenants, _sources(call))


class _Run:
    """Every row's text as an automaton, and its place in the store."""

    def __init__(
        self,
        shortest: int,
        per_match: float,
        store: Store | None,
        tenants: list[str | None],
        sources: list[list[int]],
    ) -> None:
        self._shortest = shortest
        self._per_match = per_match
        self._store = store
        self._tenants = tenants
        self._own = [SuffixAutomaton([*source, NOTHING] if source else ()) for source in sources]
        self._readers: list[Reader | None] = [
            store.read(tenant) if store is not None and tenant is not None else None for tenant in tenants
        ]
        self._fed = np.full(len(sources), -1, dtype=np.int64)

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        guesses: list[list[int]] = [[] for _ in limits]
        for row in np.flatnonzero(limits):
            guess = self._guess(int(row), state, int(limits[row]))
            guesses[row] = existing(guess, state.vocabulary)
        return Proposal.certain(guesses, state.device)

    def _guess(self, row: int, state: State, limit: int) -> list[int]:
        """Guesses for ``row``, after it has read what was committed since it was last asked."""
        own, reader = self._own[row], self._readers[row]
        start = state.starts[row] if self._fed[row] < 0 else self._fed[row]
        settled = state.settled[row]
        new = state.host_tokens[row, start:settled].tolist()
        self._fed[row] = settled
        own.extend(new)
        if reader is not None:
            reader.follow(new)
        place = own.end
        loose = state.host_tokens[row, settled : state.lengths[row]].tolist()
        for token in loose:  # text that may be taken back is looked up, not taken in
            place = own.advance(*place, token)
        if loose and reader is not None:
            reader = reader.copy()
            reader.follow(loose)
        in_own, in_store = place[1], 0 if reader is None else reader.matched
        if max(in_own, in_store) < self._shortest:
            return []
        limit = min(limit, FEW + int(max(in_own, in_store) * self._per_match))
        if reader is not None and in_store > in_own:
            found = reader.guess(limit)
            if found:
                return found
        if in_own < self._shortest:
            return []
        return own.continuation(place[0], limit) if loose else own.repetition(limit)

    def finish(self, state: State, stats: Stats) -> None:
        """Put what the call wrote into the store; prompts are not kept."""
        if self._store is None:
            return
        for row, tenant in enumerate(self._tenants):
            if tenant is not None:
                self._store.add(tenant, state.host_tokens[row, state.prompt_length : state.lengths[row]])


def _sources(call: Call) -> list[list[int]]:
    """What an encoder read, for a decoder that may copy from it; nothing where there is no encoder."""
    batch = call.prompt.shape[0]
    ids = call.inputs.get("input_ids")
    if not call.target.config.is_encoder_decoder or ids is None or ids.shape[:1] != (batch,) or ids.ndim != 2:
        return [[] for _ in range(batch)]
    mask = call.inputs.get("attention_mask")
    read = np.ones(ids.shape, dtype=bool) if mask is None else to_host(mask != 0)
    return [row[seen].tolist() for row, seen in zip(to_host(ids), read, strict=True)]
