"""Thin products: the linear layers of a CPU model while it is fed a few tokens by us.

A pass over k + 1 guesses, or over one token of some rows, multiplies every large matrix with a few rows. In float32
torch hands that to a BLAS, and some of these take two to four times as long for two to some thirty rows as for one,
where oneDNN reads the same plain matrix at the speed of memory. Which is the faster one is a fact of the machine:
it is timed once a process for each size of matrix, about a tenth of a second, and oneDNN's is taken where it
clearly wins. Nothing is packed and nothing copied; the sums differ in their last bits, as those of passes over
several tokens do anyway. What only fills up a pass (``filling.py``) is left out here as well.

The layers' ``forward`` is put in place for a pass and taken away behind it, so hooks run as ever. One row of one
token, prompts, compiled models, gradients and autocast go torch's way. Knows no model. Read next: ``packed.py``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec.weights.filling import on_real

LEAST = 1 << 19  # numbers of a matrix: smaller ones stay in the processor's caches, and calls cost more than sums
MOST_ROWS = 64  # more are a prompt, which is computing: another question than the one that is timed
TRIED_ROWS, TRIED_NUMBERS, TRIES = 4, 1 << 24, 5  # numbers: more than caches hold, as in a pass
CLEARLY = 0.9  # of the other's time

_wins: dict[tuple[int, ...], bool] = {}  # oneDNN's kernel, by the matrix' size and the number of threads


class ThinProducts(AbstractContextManager[None]):
    """While this lasts, large linear layers of ``model`` multiply few rows the fast way; for one pass at a time."""

    def __init__(self, model: Any) -> None:
        """Find the layers, and time their sizes if this process has not yet."""
        self._layers: list[tuple[dict[str, Any], Any]] = []
        modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
        if any(map(_is_compiled, modules)):
            return  # its graph would be made anew
        for module in modules:
            if type(module) is torch.nn.Linear and "forward" not in vars(module) and _is_large(module.weight):
                if module.weight.dtype == torch.float32:
                    wins(module.weight)
                self._layers.append((vars(module), partial(_forward, module)))

    def over(self, tokens: int) -> AbstractContextManager[None]:
        """What to enter for a pass over so many tokens of all rows."""
        return self if self._layers and 1 < tokens <= MOST_ROWS else nullcontext()

    def __enter__(self) -> None:
        for own, forward in self._layers:
            own.setdefault("forward", forward)

    def __exit__(self, *_: object) -> None:
        for own, forward in self._layers:
            if own.get("forward") is forward:  # another thread may have a pass of its own under way
                del own["forward"]


def product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., N) from ``states`` (..., K) and a plain ``weight`` (N, K): ``functional.linear``, or faster."""
    rows = states.numel() // max(states.shape[-1], 1)
    if weight.dtype == torch.float32 and 1 < rows <= MOST_ROWS and _is_large(weight) and wins(weight):
        return _onednn(states, weight, bias)
    return functional.linear(states, weight, bias)


def wins(weight: Tensor) -> bool:
    """Whether oneDNN's kernel is clearly the faster one, on this machine, for a few rows and such a matrix."""
    size = (*weight.shape, torch.get_num_threads())
    if size not in _wins:
        _wins[size] = torch.backends.mkldnn.is_available() and _race(weight)  # type: ignore[no-untyped-call]
    return _wins[size]


@torch.no_grad()
def _race(weight: Tensor) -> bool:
    part = weight[: max(TRIED_NUMBERS // weight.shape[1], 1)]
    states = torch.ones(TRIED_ROWS, weight.shape[1])
    kernels: list[Any] = [functional.linear, _onednn]
    best = [float("inf")] * len(kernels)
    for _ in range(1 + TRIES):  # what is called for the first time is slow, which the least of some leaves out
        for place, kernel in enumerate(kernels):
            start = perf_counter()
            kernel(states, part, None)
            best[place] = min(best[place], perf_counter() - start)
    return best[1] < CLEARLY * best[0]


def _onednn(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return out


def _forward(module: torch.nn.Linear, input: Tensor) -> Tensor:
    """In the place of ``Linear.forward``."""
    weight, bias = module.weight, module.bias
    usual = input.dtype != weight.dtype or type(input) is not Tensor or input.device != weight.device
    if usual or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return functional.linear(input, weight, bias)
    return on_real(input, weight.numel(), lambda states: product(states, weight, bias))


def _is_large(weight: Any) -> bool:
    is_plain = type(weight) is torch.nn.Parameter and weight.device.type == "cpu" and weight.is_contiguous()
    return is_plain and weight.numel() >= LEAST and weight.is_floating_point()


def _is_compiled(module: torch.nn.Module) -> bool:
    """By its owner: the module, or the ``forward`` it was given."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in vars(module)["_modules"]
    return compiled or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
