"""Matrices of 16 bits a number for processors that have no instructions for them: FBGEMM's half-precision kernels.

Without such instructions torch takes several times as long for a few rows of bfloat16 as for one, and a
verification costs what it should save. FBGEMM, torch's kernels for x86 processors with AVX2, reads 16 bits,
multiplies and adds up in float32, and has the next row nearly free. Knows nothing of layers and models.
Read next: ``passing.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from specdec.weights import graphs

# a matrix goes into float16 multiplied by a power of two that brings its largest number near 2 ** 15
TOP = 15
# a matrix with a larger share of numbers that float16 rounds is not taken: its range is too wide
ROUNDED = 1e-3


@functools.cache
def available() -> bool:
    """Whether this processor and this torch have the kernels."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    try:
        ones = torch.ones(8, 8, dtype=torch.bfloat16, device="cpu")
        made = HalfMatrix.of(ones)
        return made is not None and bool((made.linear(ones, None) == 8).all())
    except (AttributeError, RuntimeError):  # pragma: no cover
        return False  # a torch that has let go of them


class HalfMatrix:
    """A matrix (N, K) of bfloat16 or float16.

    float16 has more digits than bfloat16 and less range. Scaled by a power of two, the numbers down to 2 ** -31 of
    the largest fit exactly; the few smaller ones are rounded by 2 ** -39 of the largest at most, far below what a
    sum in float32 can see, and kept aside for ``dense``.
    """

    def __init__(self, weight: Tensor, shift: int, scaled: Tensor, rounded: Tensor) -> None:
        """See ``of``: the matrix, how far it was shifted, the result in float32, and where float16 rounds that."""
        with _engine():
            self._packed = torch.ops.quantized.linear_prepack_fp16(scaled, None)
        self._scale = math.ldexp(1.0, -shift)
        self._dtype = weight.dtype
        self._where, self._kept = rounded, weight.view(-1)[rounded]
        self.number = graphs.number(self)

    @classmethod
    def of(cls, weight: Tensor) -> HalfMatrix | None:
        """``weight`` packed, or None where it has no place in float16."""
        weight = weight.detach().contiguous()
        largest = float(weight.abs().max())
        if not math.isfinite(largest):
            return None
        shift = 0
        if weight.dtype != torch.float16 and largest:
            shift = min(TOP - math.frexp(largest)[1], 100)
        scaled = weight.float().mul_(math.ldexp(1.0, shift))
        rounded = (scaled.half() != scaled).view(-1).nonzero()[:, 0]
        return cls(weight, shift, scaled, rounded) if len(rounded) <= ROUNDED * weight.numel() else None

    def linear(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """(..., N) in the dtype of states (..., K), rounded once."""
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(states.float(), self._packed)
        if self._scale != 1.0:
            out.mul_(self._scale)
        return (out if bias is None else out + bias).to(states.dtype)

    as_given = linear  # there is nothing to fill up (``blocks.py``)

    def dense(self) -> Tensor:
        """The matrix as it was, bit for bit."""
        unpacked: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        plain = unpacked.mul_(self._scale).to(self._dtype)
        plain.view(-1)[self._where] = self._kept
        return plain


@contextmanager
def _engine() -> Iterator[None]:
    """Pack for these kernels, whichever the user has chosen; what is packed keeps its own."""
    chosen = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = chosen
