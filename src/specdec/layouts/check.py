"""The self-check: does a layout give the scores of one-token steps, on this model and this batch?

Right after the prompt was fed, two tokens are fed one after the other, the model's own way; then the layout
under trial feeds the same tokens with wrong guesses behind them, rows of different lengths, forgets what is
wrong and feeds again. Its scores must agree with those of the one-token steps. Four short forwards, once per
model and kind of batch; the verdict is kept as long as the model lives. What a short check cannot see is in
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
from specdec.layouts.snapshot import Snapshots

# float32: the good cases of 295 architectures stay below 7e-5, the bad ones start at 6.9e-4
FLOAT32_TOLERANCE = 2e-4
# half precision: root mean square of the difference over that of the scores; kernels of other widths reach .02
HALF_TOLERANCE = 0.06

Candidate = Callable[[Columns], Layout]
_VERDICTS: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()


def choose(plain: Columns, prompt: Tensor, scores: Tensor, candidates: dict[str, Candidate]) -> Layout:
    """The first of ``candidates`` that passes, ready to go on behind the prompt.

    Args:
        plain: the layout that has just fed the prompt.
        prompt: (B, P) ids.
        scores: (B, 1, V) of the prompt's last column.
        candidates: name -> maker of the layout from ``plain``; the last one is taken untried.
    """
    model = plain.model
    last = list(candidates)[-1]
    verdicts = _VERDICTS.setdefault(model, {})
    key = _key(model, prompt, plain.describes, tuple(candidates))
    if key not in verdicts and len(candidates) > 1:
        verdicts[key] = _first_that_passes(plain, prompt, scores, candidates)
    return candidates[verdicts.get(key, last)](plain)


def _first_that_passes(plain: Columns, prompt: Tensor, scores: Tensor, candidates: dict[str, Candidate]) -> str:
    at_prompt = Snapshots()
    at_prompt.take(plain.cache)
    modules = _module_states(plain.model)
    batch, width = prompt.shape
    tokens = torch.nn.functional.pad(prompt, (0, 5))
    try:
        truth = []
        following = scores[:, -1].argmax(dim=-1)
        for column in (width, width + 1):
            tokens[:, column] = following
            lengths = np.full(batch, column + 1, dtype=np.int64)
            rows = plain.forward(tokens, lengths, lengths - 1, 1)
            plain.settle(column + 1)
            truth.append(rows[:, 0].clone())
            following = rows[:, 0].argmax(dim=-1)
        for name, make in list(candidates.items())[:-1]:
            _restore(plain, at_prompt, modules, width)
            layout: Layout = plain
            try:
                layout = make(plain)
                passed = _agrees(layout, tokens, width, truth)
            except Exception:
                # whatever a model does with inputs that it was not made for, it has failed the trial
                passed = False
            plain.forwards = max(plain.forwards, layout.forwards)
            if passed:
                return name
        return list(candidates)[-1]
    finally:
        _restore(plain, at_prompt, modules, width)


def _agrees(layout: Layout, tokens: Tensor, width: int, truth: list[Tensor]) -> bool:
    """Two ragged forwards with wrong guesses, and the way back between them."""
    batch = tokens.shape[0]
    live = np.ones(batch, dtype=bool)
    odd = np.arange(batch) % 2  # odd rows are one token ahead
    odd_rows = torch.from_numpy(odd.astype(bool)).to(tokens.device)
    wrong = torch.where(tokens > 0, tokens - 1, tokens + 1)
    right = tokens
    tokens = tokens.clone()
    tokens[:, width + 1] = torch.where(odd_rows, right[:, width + 1], wrong[:, width])
    tokens[:, width + 2] = wrong[:, width + 1]
    first = np.full(batch, width, dtype=np.int64)
    rows = layout.forward(tokens, first + 3, first, 3)
    if not _close(rows[:, 0], truth[0]):
        return False
    if odd.any() and not _close(rows[odd_rows, 1], truth[1][odd_rows]):
        return False
    layout.rewind(first + 1 + odd, live)
    # one token a row now: some models build another mask for that (led, udop)
    tokens[:, width + 1] = right[:, width + 1]
    rows = layout.forward(tokens, first + 2 + odd, first + 1 + odd, 1)
    return _close(rows[~odd_rows, 0], truth[1][~odd_rows])


def _close(scores: Tensor, truth: Tensor) -> bool:
    if scores.shape != truth.shape:
        return False
    half = scores.dtype in (torch.bfloat16, torch.float16)
    finite = torch.isfinite(truth)
    truth, difference = truth[finite].double(), (scores - truth)[finite].double()
    if not bool(torch.isfinite(difference).all()):
        return False
    if half:
        spread = (truth - truth.mean()).square().mean().sqrt()
        return bool(difference.square().mean().sqrt() <= HALF_TOLERANCE * spread)
    scale = max(1.0, float(truth.abs().max()) / 8)
    return bool(difference.abs().max() <= FLOAT32_TOLERANCE * scale)


def _restore(plain: Columns, at_prompt: Snapshots, modules: list[Any], width: int) -> None:
    plain.go_back(at_prompt.put_back(), width)
    for module, name, value in modules:
        setattr(module, name, value.clone())


def _module_states(model: Any) -> list[tuple[Any, str, Tensor]]:
    """Tensors that modules keep as plain attributes (recurrent_gemma's state is no part of its cache)."""
    return [
        (module, name, value.clone())
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


def _key(model: Any, prompt: Tensor, kwargs: dict[str, Any], names: tuple[str, ...]) -> Any:
    """What the verdict depends on beside the model object itself."""
    return (
        names,
        getattr(model.config, "_attn_implementation", None),
        model.dtype,
        prompt.device.type,
        prompt.shape[0] > 1,
        kwargs.get("attention_mask") is not None,
        bool(kwargs.get("use_cache", True)),
    )
