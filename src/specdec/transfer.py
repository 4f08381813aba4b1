"""Between host and device: the copy that waits, and the copies that do not.

A copy to the host waits until the device has done all that it was given; a round makes one. A copy to the device
need not wait, but on CUDA ``tensor.to(device)`` does: it holds the host until the stream has come to it, behind
every pass that a draft has just queued. Knows no model and no text. Read next: ``errors.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Devices whose copies queue: from pinned memory only is that certain, and torch keeps that until the copy is made.
QUEUES = frozenset({"cuda"})
CPU = torch.device("cpu")


def to_host(tensor: Tensor) -> np.ndarray:
    """Where the loop waits for the device, once a round; counted in tests. ``confidence=`` makes drafts wait."""
    array: np.ndarray = tensor.cpu().numpy()
    return array


def together_to_host(*columns: Tensor) -> list[np.ndarray]:
    """(B, n) or (B,) of whole numbers each, by one copy in which they stand side by side; on the CPU by none."""
    if columns[0].is_cpu:
        return [column.numpy() for column in columns]
    wide = [column if column.ndim == 2 else column[:, None] for column in columns]
    packed = to_host(torch.cat(wide, dim=1))
    ends = np.cumsum([column.shape[1] for column in wide])
    parts = np.split(packed, ends[:-1], axis=1)
    return [part if column.ndim == 2 else part[:, 0] for part, column in zip(parts, columns, strict=True)]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """``array`` on ``device``, behind what is queued there; on the CPU the same memory."""
    tensor = torch.from_numpy(array)
    if device == CPU:
        return tensor
    if device.type in QUEUES:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
