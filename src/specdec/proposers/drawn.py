"""What a guess was drawn from: functions over a draft's scores. Knows no model. Read next: ``foresight.py``."""

from __future__ import annotations

import torch
from torch import Tensor


def chance_of(scores: Tensor, guess: Tensor) -> Tensor:
    """(...) the draft's own probability of its guesses (...), by its scores (..., V)."""
    # on a CPU softmax takes half of logsumexp's time
    chances = scores.softmax(dim=-1, dtype=torch.float32)
    return chances.gather(-1, guess.clamp(min=0)[..., None]).squeeze(-1).nan_to_num(0)


def sound(scores: Tensor, bad: Tensor) -> Tensor:
    """Scores (..., V) of a draft, of which ``bad`` (...) are no distribution: there it is certain of token 0."""
    scores = scores.masked_fill(bad[..., None], -torch.inf)
    scores[..., 0] = scores[..., 0].masked_fill(bad, 0)
    return scores


def certain(guess: Tensor, vocabulary: int) -> Tensor:
    """Scores (..., V) with all weight on ``guess`` (...); the verifier finds an id that does not exist."""
    rows = torch.full((*guess.shape, vocabulary), -torch.inf, device=guess.device)
    return rows.scatter_(-1, guess.clamp(0, vocabulary - 1)[..., None], 0.0)


def mixed(guess: Tensor, scores: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """``guess`` (...) and its ``scores`` (..., V), or where ``known`` (...) is not -1 that, as a certain guess."""
    rows = certain(known, scores.shape[-1]).to(scores.dtype)
    return torch.where(known < 0, guess, known), torch.where(known[..., None] < 0, scores, rows)
