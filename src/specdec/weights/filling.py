"""Which tokens of a pass mean something: large linear layers compute no others.

A pass over a batch is a rectangle: rows that feed fewer tokens than the widest are filled up on the right, and
rows that have ended are fed as well. Where a pass is computing rather than reading, what fills up costs as much as
what counts. While a pass of ours runs, it says here which tokens are real; a large linear layer, plain, packed or
quantised, multiplies with those, and what fills up gets the numbers of the real token before it. Nobody looks at
them, and what they leave in the slots is overwritten before it is read.

Knows no model. Read next: ``graphs.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

_here = threading.local()

READING = 8  # tokens: passes over no more are reading, and one token less saves nothing
MOVING = 1 << 22  # multiplications that must be saved in a layer to be worth moving its tokens together


def leaving_out_filling(fed: np.ndarray, width: int, live: np.ndarray) -> AbstractContextManager[None]:
    """While this lasts, large linear layers in this thread compute only what is real of passes over (B, W) ids.

    The first ``fed[b]`` (B,) of ``width`` tokens are real in a row b that is ``live`` (B,) bool.
    """
    return nullcontext() if len(fed) * width <= READING else _LeavingOut(fed, width, live)


class _LeavingOut(AbstractContextManager[None]):
    def __init__(self, fed: np.ndarray, width: int, live: np.ndarray) -> None:
        self._picks: tuple[tuple[int, int], int, Tensor, Tensor] | None = None
        real = ((np.arange(width) < fed[:, None]) & live[:, None]).reshape(-1)
        picked = np.flatnonzero(real)
        if 0 < len(picked) < len(real):
            back = np.maximum(np.cumsum(real) - 1, 0)
            self._picks = (
                (len(fed), width),
                len(real) - len(picked),
                torch.from_numpy(picked),
                torch.from_numpy(back),
            )

    def __enter__(self) -> None:
        self._before = getattr(_here, "picks", None)
        _here.picks = self._picks

    def __exit__(self, *_: object) -> None:
        _here.picks = self._before


def leaves_out() -> bool:
    """Whether something only fills up the pass that is under way in this thread."""
    return getattr(_here, "picks", None) is not None


def on_real(states: Tensor, size: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """``multiply(states)``, (..., N) from (..., K), a matrix of ``size`` numbers, without what only fills up."""
    picks = None if torch.compiler.is_compiling() else getattr(_here, "picks", None)
    # an accelerator is reading in passes of such widths
    if picks is None or states.shape[:-1] != picks[0] or picks[1] * size < MOVING or states.device.type != "cpu":
        return multiply(states)
    _, _, picked, back = picks
    out = multiply(states.flatten(0, 1)[picked])
    return out[back].view(*states.shape[:-1], -1)
