"""Verification by comparison: keep the guesses that are what the target itself would have said.

For a target whose token at every place is settled before the guesses are looked at: its argmax
(greedy), its argmax under noise shared with the draft (`coupled.py`), or one sample per place.
Every token that comes out is the target's own, so there is no residual, no replacement and no bonus
as separate cases: the next token is the target's choice at the first place where the guess differs.
Rows of probability 1 on a single token, put through `verify`, give the same.

It does not know how the choices were made. Read next: `op.py`.
"""

import torch
from torch import Tensor

from specdec.verify.rows import drafted
from specdec.verify.token import leading_successes


def match(choices: Tensor, draft_tokens: Tensor, draft_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the leading guesses that are the target's choices; the next token is the choice after.

    Args:
        choices: (B, K + 1) int64 the target's own token at each place; -1 where its row had no
            distribution.
        draft_tokens: (B, K) int64 the guesses; anything past the length.
        draft_lengths: (B,) how many of them are real.

    Returns:
        accepted (B,) int64, and next_token (B,) int64, which is -1 if the choice it comes from is.
    """
    # on a CPU the few numbers are read one by one sooner than a dozen operations are begun
    on_host = choices.is_cpu and not torch.compiler.is_compiling()
    return (match_on_host if on_host else match_on_device)(choices, draft_tokens, draft_lengths)


def match_on_host(choices: Tensor, draft_tokens: Tensor, draft_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """See `match`."""
    accepted, following = (choices.numpy()[:, 0].copy() for _ in range(2))
    rows = zip(choices.tolist(), draft_tokens.tolist(), draft_lengths.tolist(), strict=True)
    for row, (own, guesses, length) in enumerate(rows):
        kept = 0
        while kept < length and own[kept] == guesses[kept] != -1:
            kept += 1
        accepted[row], following[row] = kept, own[kept]
    # begun sooner than ``new_tensor``
    return torch.from_numpy(accepted), torch.from_numpy(following)


def match_on_device(choices: Tensor, draft_tokens: Tensor, draft_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """See `match`."""
    width = draft_tokens.shape[1]
    # A choice of -1 agrees with nothing, so the kept guesses end before it and it comes out as the
    # next token.
    agrees = (choices[:, :width] == draft_tokens) & (choices[:, :width] >= 0)
    accepted = leading_successes(agrees & drafted(draft_lengths, width))
    return accepted, choices.gather(1, accepted[:, None]).squeeze(1)
