"""One processor over several positions of ragged rows, in as few calls as what it asks about the history allows.

``scores`` are (B, n, V): position i of row b comes behind the first ``lengths[b] + i`` of its ``tokens``.
Processors take (B, L) ids of one length and (B, V) scores. Knows no kinds of them. Read next: ``stepwise.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidInput
from specdec.state import span
from specdec.transfer import to_device


def by_length(
    processor: Any, scores: Tensor, tokens: Tensor, lengths: np.ndarray, wanted: np.ndarray, *, alone: bool
) -> Tensor:
    """One call for each distinct history length of the first ``wanted[b]`` positions of every row.

    ``alone``: it looks at each row by itself, so a call is about the rows of that length. Otherwise about all rows;
    those without a position of that length are shown another one, whose result is not used.
    """
    if not wanted.any():
        return scores
    count = scores.shape[1]
    low, high = span(lengths[wanted > 0])
    if low == high:
        given = [(tokens[:, : low + i].contiguous(), copied(scores[:, i])) for i in range(count)]
        return torch.stack([whole(processor(ids, rows), processor, rows) for ids, rows in given], dim=1)
    row, place = np.nonzero(np.arange(count) < wanted[:, None])
    order = np.argsort(lengths[row] + place, kind="stable")
    columns, sizes = np.unique(lengths[row] + place, return_counts=True)
    here, there = (torch.split(to_device(part[order], scores.device), sizes.tolist()) for part in (row, place))
    rows, places = here, there
    if not alone:
        rows = (torch.arange(len(lengths), device=scores.device),) * len(columns)
        places = tuple(to_device((columns[:, None] - lengths).clip(0, count - 1), scores.device))
    out = scores.clone()
    for number, length in enumerate(columns):
        shown, at = rows[number], here[number]
        part = scores[shown, places[number]]
        made = whole(processor(tokens[shown, :length], part), processor, part)
        out = out.to(torch.promote_types(out.dtype, made.dtype))
        out[at, there[number]] = (made if alone else made[at]).to(out.dtype)
    return out


def copied(scores: Tensor) -> Tensor:
    """``scores``, of which a view was taken, as a tensor of their own: a processor may write into what it gets."""
    return scores.clone(memory_format=torch.contiguous_format)


def whole(made: Any, processor: Any, scores: Tensor) -> Tensor:
    """``made``, which ``processor`` returned for ``scores`` (B, V): a score for every id, or an error by name."""
    if isinstance(made, Tensor) and made.shape == scores.shape:
        return made
    came = f"a tensor of shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
    raise InvalidInput(
        f"the logits processor {type(processor).__name__} returned {came}; wanted is a tensor of shape "
        f"{tuple(scores.shape)}, a score for every id: -inf for one that must not come"
    )


def by_floor(processor: Any, floor: int, scores: Tensor, lengths: np.ndarray) -> Tensor:
    """One call for all positions behind fewer than ``floor`` tokens, of a processor that leaves the others alone.

    It asks nothing else about the history, so that it is shown none.
    """
    batch, count, vocabulary = scores.shape
    short = lengths[:, None] + np.arange(count) < floor
    if not short.any():
        return scores
    flat = scores.reshape(batch * count, vocabulary)
    if short.all():
        made: Tensor = processor(_nothing(flat), flat)
        return made.view(batch, count, vocabulary)
    at = to_device(np.flatnonzero(short), scores.device)
    rows = flat[at]
    return flat.index_copy(0, at, processor(_nothing(rows), rows)).view(batch, count, vocabulary)


def _nothing(rows: Tensor) -> Tensor:
    """Ids (R, 0) before ``rows``."""
    return torch.empty(len(rows), 0, dtype=torch.long, device=rows.device)


def by_presence(
    processor: Any, ignored: int | Tensor, scores: Tensor, tokens: Tensor, lengths: np.ndarray
) -> Tensor:
    """One call for all positions, of a processor that asks which tokens there are and neither where nor how often.

    What a position does not see yet, and the first ``ignored`` tokens of every row, or (B,) of each, are shown as
    the first id beyond the vocabulary, which such a processor skips.
    """
    batch, count, vocabulary = scores.shape
    width = int(lengths.max()) + count - 1
    seen = to_device(lengths[:, None] + np.arange(count), scores.device)
    column = torch.arange(width, device=scores.device)
    first = ignored[:, None, None].to(scores.device) if isinstance(ignored, Tensor) else ignored
    unseen = (column >= seen[..., None]) | (column < first)
    ids = tokens[:, None, :width].expand(-1, count, -1).masked_fill(unseen, vocabulary)
    flat = processor(ids.reshape(batch * count, width), scores.reshape(batch * count, vocabulary))
    processed: Tensor = flat.view(batch, count, vocabulary)
    return processed
