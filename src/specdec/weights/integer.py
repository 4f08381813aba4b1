"""Eight bits on both sides: a matrix of whole numbers times activations that are rounded to whole numbers.

Where a processor adds up products of bytes in one instruction (VNNI, AMX), oneDNN multiplies them at the speed of
memory for many rows; torch's kernel for eight-bit weights alone does so for one (docs/weights.md). The tokens of a
pass share one scale, which goes into the kernel: for the one or two that each row of a batch feeds to a draft that
is as good as one each (docs/decisions.md); a prompt is left to other weights. For drafts only: tokens hear of their
neighbours. Knows no layer. Read next: ``head.py``.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec.weights import graphs

FEW = 2  # tokens of a row in a pass: of a draft's step, and one that it has not seen yet
ZERO = 128  # the byte that stands for 0
LARGEST = 127  # of a byte's distance from it
LEAST = 1e-12  # of a largest activation, which is divided by
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")

_here = threading.local()  # .rounded: what was rounded last in this thread


@functools.cache
def available() -> bool:
    """Whether this processor has the instructions; without them sums of products of bytes may overflow."""
    asked: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # not in every torch
    known = asked()
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(mkldnn and any(known.get(name) for name in INSTRUCTIONS))


def few(states: Tensor) -> bool:
    """Whether ``states`` (..., W, K) are few tokens of every row, but some, which may share a scale."""
    numbers = states.numel()
    return 0 < numbers <= FEW * states.shape[-1] or (numbers > 0 and states.ndim > 2 and states.shape[-2] <= FEW)


class Bytes:
    """A matrix (N, K) of whole numbers in the order that oneDNN chooses, and a scale for each of its rows.

    Attributes:
        number: what graphs call it by (``graphs.py``).
    """

    def __init__(self, quantized: Tensor, scales: Tensor) -> None:
        """Take whole numbers from -127 to 127 and ``scales`` (N,)."""
        self._packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        self._scales = scales.float()
        self._zeros = torch.zeros(len(scales), dtype=torch.int32)
        self.number = graphs.number(self)

    def linear(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """(..., N) from states (..., K), in their dtype."""
        return self._times(states, bias, *_rounded(states))

    def beside_others(self, states: Tensor) -> Tensor:
        """The same where other matrices are likely to multiply the same ``states``: they are rounded once."""
        made, version, rounded = getattr(_here, "rounded", (_nothing, 0, None))
        # a tensor that keeps no count of what is written into it may be another by now
        counts = not states.is_inference()
        if rounded is None or not counts or made() is not states or version != states._version:
            rounded = _rounded(states)
            if counts:
                _here.rounded = weakref.ref(states), states._version, rounded
        return self._times(states, None, *rounded)

    def dense(self) -> Tensor:
        """(N, K) the whole numbers."""
        numbers: Tensor = self._packed.to_dense().t()
        return numbers

    def _times(self, states: Tensor, bias: Tensor | None, numbers: Tensor, scale: float) -> Tensor:
        matrix = self._packed, self._scales, self._zeros, None
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            numbers, scale, ZERO, *matrix, 1.0, 0, states.dtype, "none", [], ""
        )
        out = out if bias is None else out.add_(bias)
        return out.view(*states.shape[:-1], -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bytes:
        return self  # nobody writes to it

    def __reduce__(self) -> Any:
        return Bytes, (self.dense().contiguous(), self._scales)


def _rounded(states: Tensor) -> tuple[Tensor, float]:
    """Bytes (R, K) for ``states`` (..., K), and what one step of them stands for."""
    rows = states.reshape(-1, states.shape[-1])
    low, high = torch.aminmax(rows)
    scale = max(-low.item(), high.item(), LEAST) / LARGEST
    return torch.add(_half(), rows, alpha=1 / scale).to(torch.uint8), scale


@functools.cache
def _half() -> Tensor:
    """What is added before whole numbers are cut off, as they are not rounded: (1,), which makes sums float32."""
    return torch.full((1,), ZERO + 0.5, dtype=torch.float32, device="cpu")


def _nothing() -> None:
    """What was rounded last, as long as nothing was."""
