"""transformers' top-p and top-k on a CPU without sorting whole rows: the same sets.

transformers sorts every row in full, a vocabulary of 152,000 in 13 ms. The nucleus is nearly always among a few
hundred scores, so:

* the highest scores are selected and their tail masses taken in float64. transformers' float32 sum over the
  sorted row can differ from that by no more than rounding; with the bound of ``_rounding`` no score of the few
  hundred is near enough to the border to fall on its other side, or
* the values are sorted without their ids, and transformers' own arithmetic is repeated on them bit by bit.

Both say how many scores stay. Where the border runs between equal scores, which of them stay is a whim of the
sort (it is not stable), so there, for rows that are no distribution, and on other devices transformers' own class
is called.

Two more of its warpers raise where a row is no distribution, as a draft's may be; such rows pass them untouched.
Knows no model. Read next: ``structured/__init__.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import threshold
from transformers.generation import logits_process as hf

SELECTED = (256, 4096)  # highest scores looked at, before everything is sorted
LEAST = 4 * SELECTED[0]  # entries of a row below which sorting costs nothing


def warp(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    """``processor(ids, scores)`` for scores (N, V), faster where this file knows how."""
    if type(processor) in JUDGING:
        return _where_sound(processor, ids, scores)
    known = NARROWED.get(type(processor))
    if known is None or scores.device.type != "cpu" or scores.dtype != torch.float32 or scores.shape[1] < LEAST:
        warped: Tensor = processor(ids, scores)
        return warped
    out = scores.clone()
    best = scores.amax(dim=1)
    for row, peak in zip(out, best.tolist(), strict=True):
        if not np.isfinite(peak) or not known(processor, row):
            row[:] = processor(ids[:1], row[None])[0]
    return out


def _where_sound(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    """Rows that are no distribution stay as they are: plain ``generate()`` would not have got there.

    A draft with few tokens may know none that a grammar allows; nothing may be allowed behind a guess.
    """
    bad = (~(scores > -torch.inf).any(dim=1) | scores.isnan().any(dim=1))[:, None]
    return torch.where(bad, scores, processor(ids, scores.masked_fill(bad, 0.0)))


def _top_k(processor: Any, row: Tensor) -> bool:
    """Keep what is no lower than the k-th highest score."""
    lowest = float(row.topk(min(processor.top_k, len(row))).values[-1])
    if lowest > -np.inf:
        _cut(row, lowest, processor.filter_value)
    return True


def _top_p(processor: Any, row: Tensor) -> bool:
    """Keep the smallest set of highest scores that has mass ``top_p``."""
    border, least = 1 - processor.top_p, processor.min_tokens_to_keep
    values = row.numpy()
    probs = row.softmax(dim=0)
    total = float(probs.sum(dtype=torch.float64))
    for count in SELECTED:
        if count >= len(row) or least >= count:
            break
        highest, places = row.topk(count)
        kept = _kept(probs[places].double().numpy(), total, len(row), border)
        if kept is not None:
            return _keep(row, highest.numpy(), max(kept, least), processor.filter_value)
    ascending = torch.from_numpy(np.sort(values))
    removed = int((ascending.softmax(dim=-1).cumsum(dim=-1) <= border).sum())
    return _keep(row, ascending.numpy()[::-1], max(len(row) - removed, least), processor.filter_value)


def _kept(highest: np.ndarray, total: float, vocabulary: int, border: float) -> int | None:
    """How many of the ``highest`` probabilities (M,) stay, None if that is not certain.

    The r-th highest stays if it and all lower ones together have more than ``border``.
    """
    tails = 1 - np.append(0, np.cumsum(highest)) / total
    slack = _rounding(len(highest), vocabulary, max(tails[-1], 0)) * np.maximum(tails, border) + 2e-7
    if tails[-1] + slack[-1] >= border or (np.abs(tails - border) <= slack).any():
        return None
    return int((tails > border).sum())


def _rounding(selected: int, vocabulary: int, rest: float) -> float:
    """Bound on the relative error of a float32 softmax over a sorted row, ``rest`` being outside the selected.

    Eight lanes at least, each added up in ascending order: while the rest is added no partial sum exceeds it.
    """
    return float((vocabulary * rest + selected) / 8 + 64) * 2.0**-24


def _keep(row: Tensor, descending: np.ndarray, kept: int, filter_value: float) -> bool:
    """Keep the ``kept`` highest of ``row`` in place; False if some of equal scores stay and others go."""
    lowest = descending[kept - 1]
    stay = kept - int((descending[:kept] > lowest).sum())
    if not lowest > -np.inf or stay < int((row.numpy() == lowest).sum()):
        return False
    _cut(row, float(lowest), filter_value)
    return True


def _cut(row: Tensor, lowest: float, filter_value: float) -> None:
    """Replace what is below ``lowest``, in place; unlike ``masked_fill`` this is vectorised on a CPU."""
    below = float(np.nextafter(np.float32(lowest), np.float32(-np.inf)))
    threshold(row, below, filter_value, inplace=True)


JUDGING = (hf.EtaLogitsWarper, hf.TopHLogitsWarper)  # they raise where a row is no distribution
NARROWED = {hf.TopKLogitsWarper: _top_k, hf.TopPLogitsWarper: _top_p}
