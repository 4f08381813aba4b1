"""Which rows of a forward pass were asked for: rows of a batch stand at different columns.

Knows no model and no cache. Read next: ``slots.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def rows_from(states: Tensor, first: np.ndarray, count: int) -> Tensor:
    """``count`` rows of ``states`` (B, W, V) from ``first`` (B,) on; outside they repeat the edge.

    Rows that have ended are behind or have gone ahead, and get whatever stands there.
    """
    lowest = int(first.min())
    if lowest == int(first.max()):
        if lowest == 0 and states.shape[1] == count:
            return states
        if lowest >= 0 and lowest + count <= states.shape[1]:
            return states[:, lowest : lowest + count]
    at = torch.from_numpy(first).to(states.device)[:, None]
    at = (at + torch.arange(count, device=states.device)).clamp(0, states.shape[1] - 1)
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
