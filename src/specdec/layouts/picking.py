"""Which rows of a forward pass were asked for: rows of a batch stand at different columns.

Knows no model and no cache. Read next: ``slots.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.state import span
from specdec.transfer import to_device


def rows_from_the_end(states: Tensor, first: np.ndarray, count: int) -> Tensor:
    """``count`` rows of ``states`` (B, W, ...) from ``first`` (B,) on, counted from behind: -1 is the last.

    So a pass that gave scores of its last columns only is no other case. Rows that have ended are behind or have
    gone ahead; outside, the edge is repeated.
    """
    width = states.shape[1]
    if width == count == 1:
        return states
    lowest, highest = (width + edge for edge in span(first))
    if lowest == highest:
        if lowest == 0 and width == count:
            return states
        if lowest >= 0 and lowest + count <= width:
            return states[:, lowest : lowest + count]
    at = to_device(first + width, states.device)[:, None]
    at = (at + torch.arange(count, device=states.device)).clamp(0, width - 1)
    at = at.view(*at.shape, *[1] * (states.ndim - 2))
    return states.gather(1, at.expand(-1, -1, *states.shape[2:]))
