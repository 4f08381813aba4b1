"""Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"; the n-gram drafts of vLLM and transformers).

The last n tokens of a row are looked for earlier in the same row, longest n first, latest occurrence first;
what followed there is guessed. No model, no probabilities: the guess is judged as certain (one-hot), which is
exact for any guess. Rows look into their own text only. Read next: ``suffix.py``.
"""

from __future__ import annotations

import numpy as np

from specdec.proposers import existing
from specdec.records import Proposal
from specdec.state import State
from specdec.whole import at_least


class NGram:
    """Guess what followed the last occurrence of the row's last few tokens."""

    def __init__(self, longest: int = 4, shortest: int = 1) -> None:
        """Match the last ``longest`` tokens, then fewer, down to ``shortest`` >= 1."""
        shortest = at_least(1, "NGram: shortest", shortest)
        longest = at_least(shortest, "NGram: longest", longest, f"a whole number >= shortest={shortest}")
        self._sizes = range(longest, shortest - 1, -1)

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        guesses: list[list[int]] = [[] for _ in limits]
        for row in np.flatnonzero(limits):
            text = state.host_tokens[row, state.starts[row] : state.lengths[row]]
            guess = self.follow(text, int(limits[row])).tolist()
            guesses[row] = existing(guess, state.vocabulary)
        return Proposal.certain(guesses, state.device)

    def follow(self, text: np.ndarray, limit: int) -> np.ndarray:
        """Up to ``limit`` tokens that followed the latest earlier occurrence of the end of ``text`` (L,)."""
        for size in self._sizes:
            if len(text) <= size:
                continue
            # an earlier occurrence ends before the last token, so that something follows it
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            found = np.flatnonzero((windows == text[-size:]).all(axis=1))
            if len(found):
                # the latest one with enough behind it, else the one with the most
                enough = found[found + size + limit <= len(text)]
                start = int(enough[-1] if len(enough) else found[0]) + size
                return text[start : start + limit]
        return text[:0]
