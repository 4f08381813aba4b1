"""Thin products: the linear layers of a CPU model while it is fed a few tokens by us.

A pass over k + 1 guesses, or over one token of some rows, multiplies every large matrix with a few rows. In
float32 torch hands that to a BLAS, and some of these take two to four times as long for two to some thirty rows as
for one, where oneDNN reads the same plain matrix at the speed of memory. Which is the faster one is a fact of the
machine: it is timed once a process for each size of matrix, about a fifth of a second, and oneDNN's is taken from
the number of rows on where it clearly wins: two on one processor, four on another. Nothing is packed and nothing
copied; the sums differ in their last bits, as those of passes over several tokens do anyway. What only fills up a
pass (``filling.py``) is left out here as well.

One token of one row is the target's as plain ``generate()`` computes it, to the bit. A draft owes nobody its bits:
its single rows go the faster way as well, packed ones in full blocks (``blocks.py``).

Packed layers go to their kernels the short way (``direct.py``).

The layers' ``forward`` is put in place for a pass and taken away behind it, so hooks run as ever. Prompts, compiled
models, gradients and autocast go torch's way. Knows no model. Read next: ``direct.py``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec.weights import blocks, direct, race
from specdec.weights.filling import on_real
from specdec.weights.packed import PackedWeight
from specdec.weights.passing import UNTOLD, Layer, Pass, Real, under_way

MOST_ROWS = 64  # more are a prompt, which is computing: another question than the one that is timed
TRIED_ROWS, TRIED_NUMBERS = 4, 1 << 24  # numbers: more than caches hold, as in a pass

_wins: dict[tuple[int, ...], bool] = {}  # oneDNN's kernel, by the matrix' size, the rows and the threads


class ThinProducts:
    """The fast way to multiply few rows with the large linear layers of ``model``; for one pass at a time."""

    def __init__(self, model: Any, *, is_draft: bool = False) -> None:
        """Find the layers, and time their sizes if this process has not yet."""
        self._every: list[Layer] = []  # what only fills up a pass can be left out of all, whatever the dtype
        self._faster: list[list[Layer]] = [[] for _ in range(1 + TRIED_ROWS)]  # by rows; the last: and more
        self._packed: list[Any] = []
        self._direct: dict[bool, list[Layer]] = {}  # the short way to these, by whether rows are filled up
        modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
        if not any(map(_is_compiled, modules)):  # whose graph would be made anew
            for module in modules:
                if type(module) is not torch.nn.Linear or not is_as_made(module):
                    continue
                if isinstance(module.weight, PackedWeight):
                    self._packed.append(module)
                elif _is_large(module.weight):
                    self._every.append((vars(module), partial(_forward, module)))
                    for rows in range(1 if is_draft else 2, 1 + TRIED_ROWS):
                        if wins(module.weight, rows):
                            self._faster[rows].append(self._every[-1])
        large = [module.weight for module in self._packed if getattr(module.weight.form, "is_large", False)]
        self._kinds = {weight.kind for weight in large}  # of which rows may be filled up
        # only layers that are exchanged above, or whose weights are no plain ones, ask whose pass it is
        weights = [weight for module in modules for weight in module.parameters(recurse=False)]
        asks = self._faster[1] or any(type(weight) is not torch.nn.Parameter for weight in weights)
        self._of_draft = is_draft and bool(asks)

    def over(
        self, tokens: int, real: Real | None = None, *, by_groups: bool = False
    ) -> AbstractContextManager[Any]:
        """What to enter for a pass over so many tokens of all rows; see ``Pass``."""
        layers = self._faster[min(tokens, TRIED_ROWS)]
        if real is not None:
            layers = self._every
        if self._packed:
            layers = [*layers, *self._at_once(tokens)]
        if tokens > MOST_ROWS:
            layers = []
        # within another pass, as when a hook generates, what was said of that one must not be heard in this
        if layers or real is not None or by_groups or self._of_draft or under_way() is not None:
            return Pass(layers, of_draft=self._of_draft, real=real, by_groups=by_groups)
        return UNTOLD

    def _at_once(self, tokens: int) -> list[Layer]:
        """The packed layers for a pass over so many tokens."""
        fills = any(blocks.fills(kind, tokens) for kind in self._kinds)
        if fills not in self._direct:
            self._direct[fills] = [(vars(module), direct.direct(module, fills=fills)) for module in self._packed]
        return self._direct[fills]

    def compiled(self) -> AbstractContextManager[Any]:
        """What to enter for a pass of a graph, which has its layers as they are."""
        return Pass(of_draft=self._of_draft) if self._of_draft or under_way() is not None else UNTOLD


def product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., N) from ``states`` (..., K) and a plain ``weight`` (N, K): ``functional.linear``, or faster."""
    rows = states.numel() // max(states.shape[-1], 1)
    least = 1 if blocks.drafting() else 2
    if least <= rows <= MOST_ROWS and _is_large(weight) and wins(weight, rows):
        return blocks.linear(states, weight, bias)
    return functional.linear(states, weight, bias)


def wins(weight: Tensor, rows: int) -> bool:
    """Whether oneDNN's kernel is clearly the faster one, on this machine, for so many rows and this size."""
    if weight.dtype != torch.float32:  # where torch goes to it by itself, or has none
        return False
    rows = min(rows, TRIED_ROWS)
    if 1 < rows < TRIED_ROWS and not wins(weight, TRIED_ROWS):
        return False  # and two or three need not be timed: torch's kernel gains nothing by further rows
    size = (*weight.shape, rows, torch.get_num_threads())
    if size not in _wins:
        _wins[size] = torch.backends.mkldnn.is_available() and _race(weight, rows)  # type: ignore[no-untyped-call]
    return _wins[size]


def _race(weight: Tensor, rows: int) -> bool:
    part = weight.detach()[: max(TRIED_NUMBERS // weight.shape[1], 1)]
    states = torch.ones(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    usual, other = race.seconds([partial(kernel, states, part) for kernel in (functional.linear, blocks.linear)])
    return other < race.CLEARLY * usual


def _forward(module: torch.nn.Linear, input: Tensor) -> Tensor:
    """In the place of ``Linear.forward``."""
    weight, bias = module.weight, module.bias
    usual = under_way() is None  # another thread's pass has put this here
    usual |= input.dtype != weight.dtype or type(input) is not Tensor or input.device != weight.device
    if usual or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return functional.linear(input, weight, bias)
    return on_real(input, weight.numel(), lambda states: product(states, weight, bias))


def is_as_made(module: torch.nn.Module) -> bool:
    """Nobody has put another ``forward`` into ``module``, apart from a pass of ours, maybe in another thread."""
    own = vars(module).get("forward")
    return own is None or getattr(own, "func", None) in (_forward, direct.forward)


def _is_large(weight: Any) -> bool:
    is_plain = type(weight) is torch.nn.Parameter and weight.device.type == "cpu" and weight.is_contiguous()
    return is_plain and weight.numel() >= race.LEAST and weight.is_floating_point()


def _is_compiled(module: torch.nn.Module) -> bool:
    """By its owner: the module, or the ``forward`` it was given."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
    return compiled or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
