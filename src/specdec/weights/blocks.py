"""Full blocks: a packed kernel is given more rows than it is asked for, where that takes less time.

oneDNN multiplies a few rows at once; on AVX-512 six of them took 0.82 of the time of one and 0.75 of two's, with
matrices that caches do not hold. So rows are filled up with zeros to the number that is clearly faster, which is
timed once a process for each dtype and number of threads.

Two rows and more had the same bits beside more of them, wherever that was looked at (docs/weights.md). A single row
is another kernel's, in another order: in 16 bits the very bits of the plain matrix, which are those of plain
``generate()``. It is therefore filled up in passes of a draft alone (``passing.py``), which owes nobody its bits.

In float32 torch's own kernel for plain matrices is another library's, and on some processors the faster one: there
packing would cost time, which is timed as well. Knows no model. Read next: ``thin.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from specdec.weights import graphs
from specdec.weights.passing import under_way
from specdec.weights.race import CLEARLY, LEAST, seconds

MOST = 8  # rows: more are two blocks at least
FEW = 5  # rows: of a pass over four guesses
TRIED = (1 << 14, 1 << 11)  # a matrix that caches do not hold


class Blocked:
    """A matrix (N, K) in the order that oneDNN chooses."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = reorder(weight)
        self.is_large = weight.numel() >= LEAST
        if self.is_large:
            fastest(weight.dtype, torch.get_num_threads())  # now, and not in the first pass
        self.number = graphs.number(self)

    def linear(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """(..., N) from states (..., K)."""
        if not self.is_large:
            return self.as_given(states, bias)
        return in_blocks(states, lambda states: self.as_given(states, bias))

    def as_given(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """The same, with no more rows than are given."""
        return linear(states, self._packed, bias)

    def dense(self) -> Tensor:
        """The matrix as it was, bit for bit."""
        plain: Tensor = self._packed.to_dense()
        return plain


def drafting() -> bool:
    """Whether a draft's pass is under way in this thread."""
    passing = under_way()
    return passing is not None and passing.of_draft


def in_blocks(states: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """``multiply(states)``, (..., N) from (..., K), with as many rows as are fastest."""
    rows = states.numel() // states.shape[-1]
    if rows > MOST or (rows == 1 and not drafting()):
        return multiply(states)
    full = fastest(states.dtype, torch.get_num_threads())[rows]
    if full == rows:
        return multiply(states)
    filled = torch.nn.functional.pad(states.reshape(rows, -1), (0, 0, 0, full - rows))
    # a copy, so that who keeps the product does not keep what fills up
    return multiply(filled)[:rows].clone().view(*states.shape[:-1], -1)


def fills(dtype: torch.dtype, most: int) -> bool:
    """Whether ``in_blocks`` may fill up ``most`` rows or fewer."""
    known = fastest(dtype, torch.get_num_threads())
    return most <= MOST and known[: 1 + most] != tuple(range(1 + most))


@functools.cache
def fastest(dtype: torch.dtype, threads: int) -> tuple[int, ...]:
    """How many rows to multiply for 0, 1, ... ``MOST`` of them, with so many threads, the present ones."""
    packed = reorder(torch.ones(TRIED, dtype=dtype, device="cpu"))
    states = torch.ones(MOST, TRIED[1], dtype=dtype, device="cpu")
    times = seconds([functools.partial(linear, states[:rows], packed) for rows in range(1, 1 + MOST)])
    best = 1 + times.index(min(times))
    return 0, *(
        best if rows < best and times[best - 1] < CLEARLY * times[rows - 1] else rows for rows in range(1, 1 + MOST)
    )


@functools.cache
def pays(dtype: torch.dtype, threads: int) -> bool:
    """Whether one row or a few take a packed matrix clearly less time than a plain one, and neither takes more."""
    plain = torch.ones(TRIED, dtype=dtype, device="cpu")
    packed, shares = reorder(plain), []
    for rows in (1, FEW):
        states = torch.ones(rows, TRIED[1], dtype=dtype, device="cpu")
        ways = [functools.partial(torch.nn.functional.linear, states, plain)]
        ways += [functools.partial(linear, states, matrix) for matrix in (plain, packed)]
        torchs, thin, blocked = seconds(ways)
        # a plain target's single row is torch's, to the bit; of a few the faster way is taken (``thin.py``)
        shares.append(blocked / (torchs if rows == 1 else min(torchs, thin)))
    return min(shares) < CLEARLY and max(shares) < 1 / CLEARLY


def reorder(weight: Tensor) -> Tensor:
    """A matrix (N, K) in the order that oneDNN chooses."""
    # a hint to oneDNN; from 1 to 40 rows it chose the same order for all layers tried
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 16)
    return packed


def linear(states: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., N) from states (..., K) and a matrix (N, K), in that order or plain."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    return out
