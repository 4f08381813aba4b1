"""Look-ups in ragged rows: the indexing that the rules share, so that they can read as mathematics.

It does not know what the numbers mean. Shapes: B rows of the batch, K guesses at most, V tokens in
the vocabulary. Guesses past a row's own length are padding and may hold anything, ids outside the
vocabulary included. Read next: `draw.py`.
"""

import torch
from torch import Tensor


def drafted(draft_lengths: Tensor, width: int) -> Tensor:
    """Which of the `width` places hold a real guess: (B,) lengths to a (B, width) mask."""
    return torch.arange(width, device=draft_lengths.device) < draft_lengths[:, None]


def of_tokens(rows: Tensor, tokens: Tensor) -> Tensor:
    """The entry of each row (B, K, V) at its token (B, K); a foreign id reads some other entry."""
    inside = tokens.clamp(0, rows.shape[-1] - 1)
    return rows.gather(-1, inside[..., None]).squeeze(-1)


def at_position(rows: Tensor, positions: Tensor) -> Tensor:
    """The row (B, V) that stands at `positions` (B,) in each stack of rows (B, N, V)."""
    index = positions[:, None, None].expand(-1, 1, rows.shape[-1])
    return rows.gather(1, index).squeeze(1)
