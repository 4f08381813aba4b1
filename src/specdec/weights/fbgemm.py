"""Matrices in the order of FBGEMM, torch's kernels for x86 processors with AVX2, in half precision and eight bits.

Half precision serves bfloat16 and float16 on processors without instructions for them, where torch's own kernels
take several times as long for a few rows as for one: numbers lie in 16 bits, are multiplied in float32 and added
up in float32, as a processor with such instructions does. Eight bits serve drafts. Knows nothing of layers and
models. Read next: ``packed.py`` and ``quantized.py``, which use it.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# a matrix goes into float16 multiplied by a power of two that brings its largest number near 2 ** 15
TOP = 15
# a matrix with a larger share of numbers that float16 rounds is not taken: its range is too wide
ROUNDED = 1e-3
COARSE = 63  # steps of an activation's first part; 127 would overflow the 16 bits that AVX2 adds two products in
FINE = 126  # and of a coarse step in its second part


_by_number: weakref.WeakValueDictionary[int, _Matrix] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@functools.cache
def available() -> bool:
    """Whether this processor and this torch have the kernels."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    try:
        unit = Int8Matrix(torch.ones(8, 8, dtype=torch.int8), torch.ones(8))
        half = HalfMatrix.of(torch.ones(8, 8, dtype=torch.bfloat16))
        ones = torch.ones(1, 8)
        return half is not None and bool((unit.multiply(ones) - half.multiply(ones)).abs().max() < 1e-2)
    except (AttributeError, RuntimeError):  # pragma: no cover
        return False  # a torch that has let go of them


class _Matrix:
    """What both matrices are to graphs: a number."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._enter()

    def _enter(self) -> None:
        self._number = next(_numbers)
        _by_number[self._number] = self

    def __deepcopy__(self, memo: Any) -> Any:
        return self  # nothing in it ever changes

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._enter()

    def multiply(self, states: Tensor) -> Tensor:
        """(..., N) in float32 from states (..., K)."""
        if torch.compiler.is_compiling():
            out: Tensor = _opaque(states, self._number, self._rows)
            return out
        return self._multiply(states)

    def _multiply(self, states: Tensor) -> Tensor:
        raise NotImplementedError


class HalfMatrix(_Matrix):
    """A matrix (N, K) of bfloat16 or float16 in 16 bits a number.

    float16 has more digits than bfloat16 and less range. Scaled by a power of two, the numbers down to 2 ** -32 of
    the largest fit exactly; the few smaller ones are rounded by 2 ** -40 of the largest at most, far below what a
    sum in float32 can see, and kept aside for ``dense``.
    """

    def __init__(self, packed: Any, shift: int, like: Tensor) -> None:
        """See ``of``."""
        super().__init__(len(like))
        self._packed = packed
        self._scale = math.ldexp(1.0, -shift)
        self._dtype = like.dtype
        self._where = self._kept = torch.empty(0)
        rounded = (self._unpacked() != like).view(-1).nonzero()[:, 0]
        self._where, self._kept = rounded, like.reshape(-1)[rounded]
        self.nbytes = like.numel() * 2

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
        with _engine():
            packed = torch.ops.quantized.linear_prepack_fp16(weight.float() * math.ldexp(1.0, shift), None)
        made = cls(packed, shift, weight)
        return made if made._where.numel() <= ROUNDED * weight.numel() else None

    def _multiply(self, states: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(states.float(), self._packed)
        return out if self._scale == 1.0 else out.mul_(self._scale)

    def linear(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """(..., N) in the dtype of states (..., K), rounded once."""
        out = self.multiply(states)
        return (out if bias is None else out + bias).to(states.dtype)

    def dense(self) -> Tensor:
        """The matrix as it was, bit for bit."""
        plain = self._unpacked()
        plain.view(-1)[self._where] = self._kept
        return plain

    def _unpacked(self) -> Tensor:
        plain: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return plain.mul_(self._scale).to(self._dtype)


class Int8Matrix(_Matrix):
    """A matrix (N, K) of eight bits a number, multiplied with activations of fourteen.

    The kernel multiplies eight bits with seven. Activations in seven bits would cost a draft some of its guesses
    (a few channels are a hundred times the others), so they are the sum of two numbers: the nearest of 127 steps,
    and what is left over in steps of a 126th. Both are rows of one product, and for the few rows of a draft's pass
    a product takes the time that reading the matrix takes.
    """

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        """Pack.

        Args:
            numbers: (N, K) int8, -127 ... 127.
            scales: (N,) what one step is worth in each row.
        """
        super().__init__(len(numbers))
        self.nbytes = numbers.numel()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with _engine(), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch gives notice that its quantised tensors will go; see ``available``
            matrix = torch._make_per_channel_quantized_tensor(numbers, scales.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(matrix, None)

    def _multiply(self, states: Tensor) -> Tensor:
        rows = states.float().numpy()  # in numpy: a row is short, and torch takes three times as long for it
        largest = np.maximum(np.abs(rows).max(axis=1, keepdims=True, initial=0.0), 1e-30)
        parts = np.empty((2, *rows.shape), np.float32)
        coarse, fine = parts
        np.multiply(rows, COARSE / largest, out=fine)
        np.rint(fine, out=coarse)
        fine -= coarse
        fine *= FINE
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            torch.from_numpy(parts).flatten(0, 1), 1.0, COARSE + 1, self._packed
        ).view(2, len(rows), -1)
        out = torch.add(product[0], product[1], alpha=1 / FINE)
        return out.mul_(torch.from_numpy(largest / COARSE))


@contextmanager
def _engine() -> Iterator[None]:
    """Pack for these kernels, whichever the user has chosen; what is packed keeps its own."""
    chosen = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = chosen


@torch.library.custom_op("specdec::packed_matrix", mutates_args=())
def _opaque(states: Tensor, number: int, rows: int) -> Tensor:
    """What a graph calls: packed matrices are no tensors, so graphs know them by number."""
    return _by_number[number].multiply(states)


@_opaque.register_fake
def _(states: Tensor, number: int, rows: int) -> Tensor:
    return states.new_empty((*states.shape[:-1], rows), dtype=torch.float32)
