"""What a guess was drawn from: functions over a draft's scores. Knows no model. Read next: ``foresight.py``."""

from __future__ import annotations

import torch
from torch import Tensor


def chance_of(scores: Tensor, guess: Tensor) -> Tensor:
    """(B,) the draft's own probability of its guesses (B,)."""
    # on a CPU softmax takes half of logsumexp's time
    return scores.softmax(dim=1, dtype=torch.float32).gather(1, guess.clamp(min=0)[:, None])[:, 0].nan_to_num(0)


def sound(scores: Tensor, bad: Tensor) -> Tensor:
    """Where a draft's scores are no distribution (NaN) it has guessed token 0, and says that it was certain."""
    scores = scores.masked_fill(bad[:, None], -torch.inf)
    scores[:, 0] = scores[:, 0].masked_fill(bad, 0)
    return scores


def certain(guess: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """``guess`` (B,) and scores (B, V) with all weight on it."""
    rows = torch.full((len(guess), vocabulary), -torch.inf, device=guess.device)
    return guess, rows.scatter_(1, guess.clamp(max=vocabulary - 1)[:, None], 0.0)


def mixed(guess: Tensor, scores: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """``guess`` (B,) and its ``scores`` (B, V), or where ``known`` (B,) is not -1 that, as a certain guess."""
    sure, rows = certain(known.clamp(min=0), scores.shape[1])
    return torch.where(known < 0, guess, sure), torch.where(known[:, None] < 0, scores, rows.to(scores.dtype))
