"""Which tokens of a pass mean something: large linear layers compute no others.

A pass over a batch is a rectangle: rows that feed fewer tokens than the widest are filled up on the right, and
rows that have ended are fed as well. Where a pass is computing rather than reading, what fills up costs as much as
what counts. A pass of ours says which tokens are real (``passing.py``); a large linear layer, plain, packed or
quantised, multiplies with those, and what fills up gets the numbers of the real token before it. Nobody looks at
them, and what they leave in the slots is overwritten before it is read.

Knows no model. Read next: ``graphs.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.weights.passing import Real, under_way

READING = 8  # tokens: passes over no more are reading, and one token less saves nothing
MOVING = 1 << 22  # multiplications that must be saved in a layer to be worth moving its tokens together
# as many times that where a processor multiplies tiles of 16 rows (AMX), so that further ones are nearly free: one
# row more took 0.01 ms for 14 million numbers, moving 0.1 to 0.15 ms
TILES = 32


def real_tokens(fed: np.ndarray, width: int, live: np.ndarray) -> Real | None:
    """What is real in a pass over (B, W) ids: the first ``fed[b]`` (B,) of a row b that is ``live`` (B,) bool.

    None where nothing fills up, or the pass is too small for it to matter.
    """
    if len(fed) * width <= READING:
        return None
    real = ((np.arange(width) < fed[:, None]) & live[:, None]).reshape(-1)
    picked = np.flatnonzero(real)
    if not 0 < len(picked) < len(real):
        return None
    back = np.maximum(np.cumsum(real) - 1, 0)
    return Real((len(fed), width), len(real) - len(picked), torch.from_numpy(picked), torch.from_numpy(back))


@functools.cache
def has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 in tiles."""
    asked: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # not in every torch
    return bool(asked().get("amx_bf16"))


def on_real(states: Tensor, size: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """``multiply(states)``, (..., N) from (..., K), a matrix of ``size`` numbers, without what only fills up."""
    passing = None if torch.compiler.is_compiling() else under_way()
    real = None if passing is None else passing.real
    # an accelerator is reading in passes of such widths
    if real is None or states.shape[:-1] != real.shape or not states.is_cpu:
        return multiply(states)
    if real.spared * size < MOVING * (TILES if states.dtype == torch.bfloat16 and has_tiles() else 1):
        return multiply(states)
    out = multiply(states.flatten(0, 1)[real.picked])
    return out[real.back].view(*states.shape[:-1], -1)
