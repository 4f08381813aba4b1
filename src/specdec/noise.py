"""Random numbers for a call: fresh ones from one seed, kept apart for the draft and for the verifier.

A sampling call draws one seed from torch's global generator, as visibly as plain ``generate()`` draws its
tokens: ``torch.manual_seed`` reproduces a run, and two calls differ. Greedy calls draw nothing.
Imports nothing of ours. Read next: ``processing.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 0x9E3779B97F4A7C15  # between the seeds of two decodings: nobody counts seeds so


def draw_seed() -> int:
    """One seed from torch's global generator."""
    return int(torch.randint(0, 2**62, (1,)))


def seed_of(seed: int | list[int] | None, decoding: int) -> int | list[int] | None:
    """``seed`` for that ``decoding`` of a call: some models decode several times, and no noise shall come twice."""
    if isinstance(seed, list):
        return [one + decoding * STEP for one in seed]
    return None if seed is None else seed + decoding * STEP


class Noise:
    """A stream of random numbers on one device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        """Start the stream of ``seed``."""
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(seed % 2**63)
        self._device = device

    def uniforms(self, *shape: int) -> Tensor:
        """Uniform on [0, 1), in float64, so that tokens of very small chance are met as often as they should."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64  # which Apple's devices lack
        return torch.rand(shape, generator=self._generator, device=self._device, dtype=dtype)
