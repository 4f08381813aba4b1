"""Verification one position after the other, for processors that may hold state.

Such a processor must see exactly the calls that plain ``generate()`` would make: every step once, with the
tokens that were kept. So all rows stand at the same length, position i is processed only once every live row
has kept its guess i - 1, and the round ends at the first position where a row does not, or has no guess, or ends.
A row that kept its guess where another did not emits that guess as its extra token. Costs a copy to the host a
position.
Knows no model and no cache. Read next: ``verify/__init__.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.processing import Processing
from specdec.records import Proposal
from specdec.sampling import Sampling
from specdec.state import State
from specdec.transfer import to_device


def verify_in_lockstep(
    logits: Tensor, state: State, proposal: Proposal, processing: Processing, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """Judge ``proposal`` position by position.

    Args:
        logits: (B, K + 1, V) of the target, in float32.
        state: all live rows have the same length.
        proposal: rows may have submitted different numbers of guesses.
        processing: its processors are called as plain ``generate()`` calls them, or walk along the rows.
        sampling: draws the tokens.

    Returns:
        accepted (B,), next token (B,), processed scores (B, K + 1, V); rows of scores that no token was
        drawn from are zero.
    """
    length = int(state.lengths[state.live][0])
    guesses = int(proposal.lengths.max(initial=0))
    submitted = to_device(proposal.lengths, state.device)
    scores = torch.zeros_like(logits)
    step = 0
    while True:
        rows = processing.at(length + step, state.tokens, logits[:, step], state.live)
        scores[:, step] = rows
        waiting = step < guesses
        here = slice(step, step + 1) if waiting else slice(0, 0)
        tokens = proposal.tokens[:, here]
        drawn_from = None if proposal.logits is None else proposal.logits[:, here]
        # the row of a bonus is asked for and not used: a kept guess is this position's token
        both = rows[:, None].expand(-1, 2 if waiting else 1, -1)
        lengths = (submitted > step).to(torch.int64)
        positions = state.lengths - state.prompt_length + step
        kept, drawn = sampling.verify(both, tokens, lengths, drawn_from, positions)
        goes_on = kept == 1
        if waiting:
            drawn = torch.where(goes_on & (drawn != -1), tokens[:, 0], drawn)
            if state.eos_ids is not None:  # plain generate() shows padding behind an ended row
                goes_on = goes_on & ~torch.isin(drawn, state.eos_ids)
        if not waiting or not bool((goes_on | ~state.device_live).all()):
            return torch.full_like(state.device_lengths, step), drawn, scores
        step += 1
