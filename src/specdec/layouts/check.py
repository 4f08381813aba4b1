"""The self-check: does a layout give the scores of one-token steps, on this model and this batch?

Behind the prompt two tokens are fed one after the other, the model's own way: the first two rounds of a call, which
so cost nothing. Then the layout under trial goes back to the prompt and feeds the same tokens with wrong guesses
behind them, rows of different lengths, forgets what is wrong and feeds again. Its scores must agree with those of
the one-token steps. Two short forwards, once per model and kind of batch; the verdict is kept as long as the model
lives. A draft makes its steps up, two forwards more. What a short check cannot see is in
``facts.py``. Knows nothing of proposals. Read next: ``facts.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.layouts import Layout
from specdec.layouts.columns import Columns
from specdec.layouts.forget import own_cache
from specdec.layouts.snapshot import Snapshots
from specdec.transfer import to_device

# float32: the good cases of 295 architectures stay below 7e-5, the bad ones start at 6.9e-4
FLOAT32_TOLERANCE = 2e-4
# half precision: root mean square of the difference over that of the scores; kernels of other widths reach .035.
# What all scores of a row share is left out, no softmax sees it: SmolLM2 in bfloat16 shifts by .13 and parts by .03
HALF_TOLERANCE = 0.06

Candidate = Callable[[Columns], Layout]
_VERDICTS: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()
STEPS = 2  # one-token steps that a layout is compared with


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
        self._key = _key(plain, prompt, tuple(candidates))
        self._last = list(candidates)[-1]
        self._truth: list[Tensor] = []
        self._at_prompt: _Mark | None = None

    def known(self) -> Layout | None:
        """The layout, where nothing has to be tried; else None, and the steps that follow must be seen."""
        if len(self._candidates) == 1 or self._key in self._verdicts:
            return self._candidates[self._verdicts.get(self._key, self._last)](self._plain)
        self._at_prompt = _Mark(self._plain)
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
        assert self._at_prompt is not None
        now = _Mark(self._plain)
        tokens = tokens[:, : self._prompt.shape[1] + STEPS].clone()
        for name, make in list(self._candidates.items())[:-1]:
            self._at_prompt.put_back()
            layout: Layout = self._plain
            try:
                layout = make(self._plain)
                passed = _agrees(layout, tokens, self._prompt.shape[1], self._truth)
            except Exception:
                # whatever a model does with inputs that it was not made for, it has failed the trial
                passed = False
            self._plain.forwards = max(self._plain.forwards, layout.forwards)
            if passed:
                self._verdicts[self._key] = name
                return layout
        self._verdicts[self._key] = self._last
        now.put_back()
        return self._candidates[self._last](self._plain)

    def decide_at_once(self, scores: Tensor) -> Layout:
        """The layout, ready to go on behind the prompt: the steps are made up and forgotten.

        Args:
            scores: (B, 1, V) of the prompt's last column.
        """
        at_prompt = _Mark(self._plain)
        tokens = torch.nn.functional.pad(self._prompt, (0, STEPS))
        for column in range(self._prompt.shape[1], tokens.shape[1]):
            tokens[:, column] = scores[:, -1].argmax(dim=-1)
            lengths = np.full(len(tokens), column + 1, dtype=np.int64)
            scores = self._plain.forward(tokens, lengths, lengths - 1, 1)
            self._plain.settle(column + 1)
            self.see(scores)
        self.decide(tokens)
        at_prompt.put_back()
        return self._candidates[self._verdicts[self._key]](self._plain)


class _Mark:
    """A model's past as it is now, and the way back to it."""

    def __init__(self, plain: Columns) -> None:
        self._plain = plain
        self._states = Snapshots()
        self._states.take(plain.cache)
        self._described = plain.mark()
        self._modules = _module_states(plain.model)

    def put_back(self) -> None:
        self._plain.go_back(self._described, self._states.put_back())
        for module, name, value in self._modules:
            setattr(module, name, value.clone())


def _agrees(layout: Layout, tokens: Tensor, width: int, truth: list[Tensor]) -> bool:
    """Two ragged forwards with wrong guesses, and the way back between them."""
    batch = tokens.shape[0]
    tokens = torch.nn.functional.pad(tokens, (0, 3 - STEPS))
    live = np.ones(batch, dtype=bool)
    odd = np.arange(batch) % 2  # odd rows are one token ahead
    odd_rows = to_device(odd.astype(bool), tokens.device)
    wrong = torch.where(tokens > 0, tokens - 1, tokens + 1)
    right = tokens
    tokens = tokens.clone()
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
    return close(rows[~odd_rows, 0], truth[1][~odd_rows])


def close(scores: Tensor, truth: Tensor) -> bool:
    """Whether ``scores`` are ``truth`` up to what kernels of another shape may change."""
    if scores.shape != truth.shape:
        return False
    half = scores.dtype in (torch.bfloat16, torch.float16)
    finite = torch.isfinite(truth)
    difference = (scores.double() - truth.double()).where(finite, 0)
    if not bool(torch.isfinite(difference).all()):
        return False
    if half:
        shared = difference.sum(dim=-1, keepdim=True) / finite.sum(dim=-1, keepdim=True).clamp(min=1)
        difference = (difference - shared)[finite]
        spread = truth[finite].double().std(correction=0)
        return bool(difference.square().mean().sqrt() <= HALF_TOLERANCE * spread)
    truth = truth[finite].double()
    scale = max(1.0, float(truth.abs().max()) / 8)
    return bool(difference.abs().max() <= FLOAT32_TOLERANCE * scale)


def _module_states(model: Any) -> list[tuple[Any, str, Tensor]]:
    """Tensors that modules keep as plain attributes (recurrent_gemma's state is no part of its cache)."""
    return [
        (module, name, value.clone())
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


def _key(plain: Columns, prompt: Tensor, names: tuple[str, ...]) -> Any:
    """What the verdict depends on beside the model object itself."""
    model, kwargs = plain.model, plain.describes
    cache = own_cache(plain.cache)
    return (
        names,
        getattr(model.config, "_attn_implementation", None),
        model.dtype,
        prompt.device.type,
        prompt.shape[0] > 1,
        kwargs.get("attention_mask") is not None,
        bool(kwargs.get("use_cache", True)),
        frozenset(type(layer).__name__ for layer in getattr(cache, "layers", ())),
    )
