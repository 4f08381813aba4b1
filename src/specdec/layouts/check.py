"""The self-check: does a layout give the scores of one-token steps, on this model and this batch?

Behind the prompt two tokens are fed one after the other, the model's own way: the first two rounds of a call, which
so cost nothing. Then the layout under trial goes back to the prompt and feeds the same tokens with wrong guesses
behind them, rows of different lengths, forgets what is wrong and feeds again. Its scores must agree with those of
the one-token steps. Two short forwards (three for a batch of one row), once per model and kind of batch; the
verdict is kept as long as the model lives. A draft makes its steps up, two forwards more. What a short check cannot
see is in ``facts.py``. Knows nothing of proposals. Read next: ``verdicts.py``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import FAULTS
from specdec.layouts import Layout
from specdec.layouts.columns import Columns
from specdec.layouts.snapshot import Snapshots
from specdec.layouts.verdicts import kept_for
from specdec.transfer import to_device

# float32: the good cases of 295 architectures stay below 7e-5, the bad ones start at 6.9e-4
FLOAT32_TOLERANCE = 2e-4
# half precision: root mean square of the difference over that of the scores; kernels of other widths reach .035.
# What all scores of a row share is left out, no softmax sees it: SmolLM2 in bfloat16 shifts by .13 and parts by .03
HALF_TOLERANCE = 0.06
FAR = 50.0  # below the best score: nothing there is ever drawn
KEPT = (Tensor, int, float, bool, str, list, dict, type(None))
MODULE_PARTS = {name for name in vars(torch.nn.Module()) if name.startswith("_")}

Candidate = Callable[[Columns], Layout]
_VERDICTS: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()
LARGE = 1 << 16  # numbers
STEPS, FED = 2, 3  # one-token steps that a layout is compared with; columns behind the prompt that it is fed


class Trial:
    """Which of several layouts goes on behind a prompt; told of one-token steps until it has seen enough."""

    def __init__(self, plain: Columns, prompt: Tensor, candidates: dict[str, Candidate]) -> None:
        """Stand behind ``prompt`` (B, P), which ``plain`` has just fed.

        Args:
            plain: the layout that takes one-token steps.
            prompt: (B, P) ids.
            candidates: name -> maker of the layout from ``plain``, in order of preference; the last one is taken
                untried.
        """
        self._plain, self._prompt, self._candidates = plain, prompt, candidates
        self._verdicts = _VERDICTS.setdefault(plain.model, {})
        self._key = kept_for(plain, prompt, tuple(candidates))
        self._last = list(candidates)[-1]
        self._truth: list[Tensor] = []
        self.at_prompt: _Mark | None = None  # the way back behind the prompt

    def known(self) -> Layout | None:
        """The layout, where nothing has to be tried; else None, and the steps that follow must be seen."""
        if len(self._candidates) == 1 or self._key in self._verdicts:
            return self._candidates[self._verdicts.get(self._key, self._last)](self._plain)
        self.at_prompt = _Mark(self._plain)
        return None

    def see(self, scores: Tensor) -> bool:
        """Scores (B, 1, V) of the next one-token step; True once they are enough."""
        if len(self._truth) < STEPS:
            self._truth.append(scores[:, 0].clone())
        return len(self._truth) == STEPS

    def decide(self, tokens: Tensor) -> Layout:
        """The first layout that agrees with the steps seen; its cache may hold wrong columns behind them.

        Args:
            tokens: (B, capacity) the rows; what the steps fed stands behind the prompt.
        """
        return self._decided(tokens)[1]

    def _decided(self, tokens: Tensor) -> tuple[str, Layout]:
        assert self.at_prompt is not None
        now, sure = _Mark(self._plain), True
        tokens = tokens[:, : self._prompt.shape[1] + STEPS].clone()
        found: tuple[str, Layout] | None = None
        for name, make in list(self._candidates.items())[:-1]:
            self.at_prompt.put_back()
            layout: Layout = self._plain
            try:
                layout = make(self._plain)
                passed = _agrees(layout, tokens, self._prompt.shape[1], self._truth)
            except FAULTS as error:
                # whatever a model does with inputs that it was not made for, it has failed the trial; a full memory
                # says nothing of the next call
                passed, sure = False, sure and not isinstance(error, torch.OutOfMemoryError)
            self._plain.forwards = max(self._plain.forwards, layout.forwards)
            if passed:
                found = name, layout
                break
        if found is None:
            now.put_back()
            found = self._last, self._candidates[self._last](self._plain)
        if sure:
            self._verdicts[self._key] = found[0]
        return found

    def decide_at_once(self, scores: Tensor) -> Layout:
        """The layout, ready to go on behind the prompt: the steps are made up and forgotten.

        Args:
            scores: (B, 1, V) of the prompt's last column.
        """
        assert self.at_prompt is not None
        tokens = torch.nn.functional.pad(self._prompt, (0, STEPS))
        for column in range(self._prompt.shape[1], tokens.shape[1]):
            tokens[:, column] = scores[:, -1].argmax(dim=-1)
            lengths = np.full(len(tokens), column + 1, dtype=np.int64)
            scores = self._plain.forward(tokens, lengths, lengths - 1, 1)
            self._plain.settle(column + 1)
            self.see(scores)
        name, _ = self._decided(tokens)
        self.at_prompt.put_back()
        return self._candidates[name](self._plain)


class _Mark:
    """A model's past as it is now, and the way back to it."""

    def __init__(self, plain: Columns) -> None:
        self._plain = plain
        self._states = Snapshots()
        self._states.take(plain.cache)
        self._described = plain.mark()
        self._modules = _ModuleStates(plain.model)

    def put_back(self) -> None:
        self._plain.go_back(self._described, self._states.put_back())
        self._modules.put_back()


def _agrees(layout: Layout, tokens: Tensor, width: int, truth: list[Tensor]) -> bool:
    """Two ragged forwards with wrong guesses, and the way back between them."""
    batch = tokens.shape[0]
    tokens = torch.nn.functional.pad(tokens, (0, FED - STEPS))
    live = np.ones(batch, dtype=bool)
    odd = np.arange(batch) % 2  # odd rows are one token ahead
    odd_rows = to_device(odd.astype(bool), tokens.device)
    wrong = torch.where(tokens > 0, tokens - 1, tokens + 1)
    right, tokens = tokens, tokens.clone()
    tokens[:, width + 1] = torch.where(odd_rows, right[:, width + 1], wrong[:, width])
    tokens[:, width + 2] = wrong[:, width + 1]
    first = np.full(batch, width, dtype=np.int64)
    rows = layout.forward(tokens, first + 3, first, 3)
    if not close(rows[:, 0], truth[0]):
        return False
    if odd.any() and not close(rows[odd_rows, 1], truth[1][odd_rows]):
        return False
    layout.rewind(first + 1 + odd, live)
    # one token a row now: some models build another mask for that (led, udop)
    tokens[:, width + 1] = right[:, width + 1]
    rows = layout.forward(tokens, first + 2 + odd, first + 1 + odd, 1)
    if not close(rows[~odd_rows, 0], truth[1][~odd_rows]):
        return False
    if odd.any():
        return True
    # one row alone: what it says behind a right guess was not looked at yet
    layout.rewind(first, live)
    rows = layout.forward(tokens, first + 3, first, 3)
    return close(rows[:, 0], truth[0]) and close(rows[:, 1], truth[1])


def close(scores: Tensor, truth: Tensor) -> bool:
    """Whether ``scores`` are ``truth`` up to what kernels of another shape may change."""
    if scores.shape != truth.shape:
        return False
    half = scores.dtype in (torch.bfloat16, torch.float16)
    scores, truth = scores.double(), truth.double()
    finite = torch.isfinite(truth)
    if not bool(torch.isfinite(scores[finite]).all()):
        return False
    # ids that a model rules out with -1e9 or the like would make any difference look small
    best = truth.where(finite, -torch.inf).amax(dim=-1, keepdim=True)
    near = finite & (truth > best - FAR)
    if bool((scores > best - FAR / 2)[truth <= best - FAR].any()):  # -inf as well
        return False
    difference = (scores - truth).where(near, 0)
    if half:
        shared = difference.sum(dim=-1, keepdim=True) / near.sum(dim=-1, keepdim=True).clamp(min=1)
        difference = (difference - shared)[near]
        spread = truth[near].std(correction=0)
        return bool(difference.square().mean().sqrt() <= HALF_TOLERANCE * spread)
    scale = max(1.0, float(truth[near].abs().max()) / 8) if near.any() else 1.0
    return bool(difference.abs().max() <= FLOAT32_TOLERANCE * scale)


class _ModuleStates:
    """What modules keep as plain attributes and buffers, and the way back to it.

    recurrent_gemma's state is no part of its cache; a model of the user's may count its steps. Matrices of whole
    numbers are quantised weights, and not copied.
    """

    def __init__(self, model: Any) -> None:
        self._held = [
            (place, name, value, _copied(value))
            for module in model.modules()
            for place in (vars(module), vars(module).get("_buffers", {}))
            for name, value in list(place.items())  # passes of other threads may change it meanwhile
            if isinstance(value, KEPT) and name not in MODULE_PARTS and not _is_weight(value)
        ]

    def put_back(self) -> None:
        """The same objects again, with what they held; those that nothing has changed are not touched."""
        for place, name, value, copied in self._held:
            if isinstance(value, Tensor) and not _same(value, copied):
                value.data.copy_(copied)
            elif isinstance(value, list) and not _identical(value, copied):
                value[:] = copied
            elif isinstance(value, dict) and not _identical([*value, *value.values()], [*copied, *copied.values()]):
                value.clear()
                value.update(copied)
            if place.get(name) is not value:
                place[name] = value


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and value.numel() >= LARGE and not value.is_floating_point()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit but for NaN, which is equal to itself here; what cannot be compared is left alone."""
    try:
        return one.shape == other.shape and torch.allclose(one.detach(), other, rtol=0.0, atol=0.0, equal_nan=True)
    except (RuntimeError, NotImplementedError):  # offloaded, or of a kind of its own
        return True


def _identical(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
