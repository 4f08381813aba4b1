"""Where a greedy text parts from plain's, and how near the target's two best scores are there.

A small gap is a tie that another kernel broke the other way (docs/numerics.md); a large one would be a fault.
"""

from __future__ import annotations

from typing import Any

import torch
from models import last_only
from torch import Tensor


@torch.no_grad()
def divergences(target: Any, inputs: dict[str, Tensor], plain: Tensor, other: Tensor) -> list[dict[str, Any]]:
    """First difference of each row: {row, token (new ones, from 0), gap (of the scores; 0: equal)}."""
    found = []
    prompt = inputs["input_ids"].shape[1]
    length = min(plain.shape[1], other.shape[1])
    for row in range(len(plain)):
        differs = (plain[row, :length] != other[row, :length]).nonzero()
        if not len(differs):
            continue
        place = int(differs[0])
        mask = torch.nn.functional.pad(inputs["attention_mask"][row : row + 1], (0, place - prompt), value=1)
        ids = plain[row : row + 1, :place].to(mask.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        scores = target(ids, attention_mask=mask, position_ids=positions, **last_only(target)).logits[0, -1]
        best = scores.float().topk(2).values
        found.append({"row": row, "token": place - prompt, "gap": round(float(best[0] - best[1]), 4)})
    return found
