"""Jump-forward: what a grammar leaves no choice about is guessed without asking a draft.

After ``{"`` a JSON Schema may know the next five tokens. A processor whose state is a value says so
(``Stepwise.forward``, SGLang's jump-forward, 2312.07104; DOMINO, 2403.06988). The tokens are guesses all the same:
the grammar may allow the same text in other pieces, and the target decides. They depend on committed tokens
only, so the law is untouched. A draft model feeds them with its own guesses (``draft_model.py``); for every other
proposer they come first, and it guesses for the rows where the grammar has no idea.
Knows no grammar. Read next: ``draft_model.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specdec.processing import Processing
from specdec.proposers import Call, Nothing, Proposer, begun, existing
from specdec.proposers.fallback import Behind
from specdec.records import Proposal
from specdec.state import State


class Jump:
    """Guess what the call's processors foresee."""

    def __init__(self, processing: Processing) -> None:
        """Ask ``processing``."""
        self._processing = processing

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        known = self._processing.foresee(state.tokens, state.lengths, limits)
        return Proposal.certain([existing(ids, state.vocabulary) for ids in known], state.device)


def begun_behind(proposer: Any, call: Call) -> Proposer:
    """``proposer`` at the start of a call, with what the processors foresee before it."""
    run: Proposer = begun(proposer, call)
    if not call.processing.foresees or getattr(run, "foresees", False):
        return run
    jump = Jump(call.processing)
    return jump if isinstance(run, Nothing) else Behind(jump, run)
