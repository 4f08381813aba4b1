"""The short way: in a pass of ours, packed layers go to their kernel at once.

A packed weight is a tensor subclass, so that it is the plain matrix to whoever reads it, and ``linear`` finds its
kernel through torch's protocol for these. Between two large matrices nothing of that Python is in the processor's
near caches any more: in passes of a few tokens it took 2 to 7 % of the time (docs/decisions.md). So every packed
layer gets a ``forward`` for the pass that has looked up everything beforehand. Same kernel, same bits. Knows no
model. Read next: ``filling.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec.weights.filling import on_real
from specdec.weights.packed import PackedWeight
from specdec.weights.passing import under_way


def direct(module: Any, *, fills: bool) -> Callable[[Tensor], Tensor]:
    """A ``forward`` for a packed ``module`` in passes of ours.

    Args:
        module: a layer whose weight is a ``PackedWeight``.
        fills: rows may be filled up to full blocks (``blocks.py``).
    """
    return partial(forward, module, fills)


def forward(module: torch.nn.Linear, fills: bool, input: Tensor) -> Tensor:
    """In the place of ``Linear.forward``."""
    parameters: dict[str, Any] = module._parameters
    weight, bias, passing = parameters["weight"], parameters["bias"], under_way()
    # another thread's pass has put this here, or the weight has been unpacked since, or the call is an unusual one
    usual = passing is None or type(weight) is not PackedWeight or type(input) is not Tensor
    usual = usual or input.dtype is not weight.kind or not input.is_cpu or not input.numel()
    if usual or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return functional.linear(input, weight, bias)
    multiply: Callable[[Tensor, Tensor | None], Tensor] = weight.form.linear if fills else weight.form.as_given
    if passing is None or passing.real is None:
        return multiply(input, bias)
    return on_real(input, weight.numbers, lambda states: multiply(states, bias))
