"""What the forwards cost: operations and bytes of a run, and the time of a pass against its width.

Counted from parameters and forwards, not from hardware counters: keys and values, activations and attention
scores are left out, which is right for short contexts. Read next: ``summary.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from measure import Clock, Forward, Run
from models import Weights, last_only
from torch import Tensor

from specdec.layouts.facts import CACHE


def operations(run: Run, target: Weights, draft: Weights | None) -> float | None:
    """Multiplications and additions a new token, the prompt excluded; None where a model's are not known."""
    fed = [(target, run.target), (draft, run.draft)]
    total = 0.0
    for weights, forwards in fed:
        tokens = sum(f.rows * f.width for f in forwards)
        if tokens and (weights is None or weights.parameters is None):
            return None
        if tokens:
            total += 2 * weights.parameters * max(tokens - forwards[0].rows * run.prompt, 0)
    return total / max(run.emitted, 1)


def bytes_read(run: Run, target: Weights, draft: Weights | None) -> float:
    """Bytes of weights read by all forwards but the first of each model, which feeds the prompt."""
    count = target.bytes * len(run.target[1:])
    return count + (draft.bytes * len(run.draft[1:]) if draft is not None else 0)


def bandwidth(run: Run, target: Weights, draft: Weights | None) -> float | None:
    """Bytes of weights a second inside the forwards that ``bytes_read`` counts."""
    seconds = sum(f.seconds for f in run.target[1:] + run.draft[1:])
    return bytes_read(run, target, draft) / seconds if seconds else None


@torch.no_grad()
def cost_curve(
    model: Any, inputs: dict[str, Tensor], widths: Iterable[int] = range(1, 17), repeats: int = 5
) -> dict[int, float]:
    """Seconds of a forward of ``width`` tokens a row behind the prompt ``inputs``: {width: median of ``repeats``}.

    Widths are measured in turn, so that a drift of the machine hits all alike.

    Raises:
        ValueError: the model's cache cannot be put back to the prompt.
    """
    clock = Clock(inputs["input_ids"].device)
    cache = model(**inputs, use_cache=True, **last_only(model))[CACHE]
    if not getattr(cache, "is_croppable", True):
        raise ValueError(f"the cache of {type(model).__name__} cannot be cropped")
    rows = len(inputs["input_ids"])
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    for turn in range(repeats + 1):
        for width in seconds:
            ids = inputs["input_ids"][:, -1:].expand(rows, width)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, width), value=1)
            positions = (mask.cumsum(1) - 1)[:, -width:]
            clock.wait()
            start = clock.mark()
            model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache})
            end = clock.mark()
            clock.wait()
            cache.crop(-width)
            if turn:  # the first one warms up
                seconds[width].append(clock.between(start, end))
    return {width: statistics.median(times) for width, times in seconds.items()}


def outside_per_round(target: Sequence[Forward], draft: Sequence[Forward]) -> list[float]:
    """Seconds of each round that were spent outside the models; a round ends with a forward of the target."""
    out = []
    for before, after in pairwise(target):
        inside = after.seconds + sum(f.seconds for f in draft if before.end <= f.begin < after.begin)
        out.append(after.end - before.end - inside)
    return out
