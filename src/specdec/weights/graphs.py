"""Packed matrices in compiled graphs: a graph knows them by number, and multiplies by calling back.

They are no tensors that a compiler could look into: FBGEMM's are objects, and oneDNN's Inductor takes only where it
has packed them itself. Knows nothing of layers and models. Read next: ``quantized.py``.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from specdec.errors import UnsupportedModel

_numbers = itertools.count()
_by_number: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def number(matrix: Any) -> int:
    """What graphs call ``matrix`` by, as long as somebody holds it. It has ``linear(states, bias)``."""
    new = next(_numbers)
    _by_number[new] = matrix
    return new


def _linear(states: Tensor, bias: Tensor | None, number: int, rows: int) -> Tensor:
    matrix = _by_number.get(number)
    if matrix is None:
        raise UnsupportedModel("a compiled graph's packed weights are gone, or another process'; compile it again")
    out: Tensor = matrix.linear(states, bias)
    return out


def _shape(states: Tensor, bias: Tensor | None, number: int, rows: int) -> Tensor:
    return states.new_empty((*states.shape[:-1], rows))


# not ``torch.library.custom_op``, whose own Python around every call took as long as a graph saved
_library: Any = torch.library.Library("specdec", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("packed_linear(Tensor states, Tensor? bias, int number, int rows) -> Tensor")
_library.impl("packed_linear", _linear, "CPU")
torch.library.register_fake("specdec::packed_linear", _shape, lib=_library)


def packed_linear(states: Tensor, bias: Tensor | None, number: int, rows: int) -> Tensor:
    """(..., ``rows``) from states (..., K) and the matrix of that number."""
    out: Tensor = torch.ops.specdec.packed_linear(states, bias, number, rows)
    return out
