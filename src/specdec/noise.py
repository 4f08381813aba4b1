"""Random numbers for a call: fresh ones from one seed, kept apart for the draft and for the verifier.

A sampling call draws one seed from torch's global generator, as visibly as plain ``generate()`` draws its
tokens: ``torch.manual_seed`` reproduces a run, and two calls differ. Greedy calls draw nothing.
Imports nothing of ours. Read next: ``verify/__init__.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def draw_seed() -> int:
    """One seed from torch's global generator."""
    return int(torch.randint(0, 2**62, (1,)))


class Noise:
    """A stream of random numbers on one device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        """Start the stream of ``seed``."""
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(seed % 2**63)
        self._device = device
        # numpy's ziggurat takes a fifth of the time of torch's exponentials, and draws them in float64
        self._ziggurat = np.random.Generator(np.random.SFC64(seed % 2**63)) if device.type == "cpu" else None

    def uniforms(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Uniform on [0, 1)."""
        return torch.rand(shape, generator=self._generator, device=self._device, dtype=dtype)

    def exponentials(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Exponential with mean 1."""
        if self._ziggurat is not None:
            return torch.from_numpy(self._ziggurat.standard_exponential(shape)).to(dtype)
        out = torch.empty(shape, device=self._device, dtype=dtype)
        return out.exponential_(generator=self._generator)
