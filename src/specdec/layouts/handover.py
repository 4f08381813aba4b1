"""Caches that the caller sees: how much a given one holds, and leaving one as plain ``generate()`` would.

A cache that the caller passed in is the caller's: plain ``generate()`` goes on writing into that very object, so
do we, once, when the call is over. Knows no model. Read next: ``picking.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from specdec.errors import InvalidInput
from specdec.layouts import NEVER
from specdec.layouts.forget import layers_of


def cached_columns(cache: Any) -> int:
    """Columns that ``cache`` holds; 0 where its layers do not count them (recurrent states)."""
    layers = [layer for layer in layers_of(cache) if isinstance(layer, CacheLayerMixin)]
    return max((int(layer.get_seq_length()) for layer in layers), default=0)


def static_columns(cache: Any) -> int:
    """Columns that ``cache`` has room for; ``NEVER`` where it grows, or keeps a window only."""
    return min((layer.max_cache_len for layer in layers_of(cache) if type(layer) is StaticLayer), default=NEVER)


def is_callers(cache: Any) -> bool:
    """``generate()`` marks a cache that its caller passed in."""
    return bool(getattr(cache, "_is_user_defined", False))


def end_recording(cache: Any) -> None:
    """Layers that recorded their past, so that it could be taken back, keep their window only again."""
    for layer in layers_of(cache):
        if getattr(layer, "record_past", False):
            layer.record_past = False


def newest(layer: Any, columns: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, n, size) that ``layer`` still has of the first ``columns``."""
    if isinstance(layer, StaticLayer):
        return layer.keys[:, :, :columns], layer.values[:, :, :columns]
    return layer.keys, layer.values


def give_back(layer: Any, keys: Tensor, values: Tensor, columns: int) -> None:
    """Put the first ``columns`` of ``keys`` and ``values`` (B, heads, room, size) into a layer of transformers."""
    keys, values = keys[:, :, :columns], values[:, :, :columns]
    if isinstance(layer, StaticLayer):
        room = layer.max_cache_len
        if columns > room and not isinstance(layer, StaticSlidingWindowLayer):
            raise InvalidInput(
                f"the static cache given has {room} columns and the text came to fill {columns}; make it with a "
                "larger max_cache_len, or lower max_new_tokens"
            )
        for buffer, states in ((layer.keys, keys), (layer.values, values)):
            buffer[:, :, :columns] = states[:, :, -room:]
        layer.cumulative_length.fill_(columns)
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.cumulative_length_int = columns
        return
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = columns
        keys, values = (t[:, :, -layer.sliding_window + 1 :] for t in (keys, values))
    # the buffers have columns to spare, in which guesses stand, and may be lent to the next call
    layer.keys, layer.values = keys.clone(), values.clone()


def write_into(given: Any, cache: Any) -> Any:
    """The caller's own object with the content of ``cache``, which may be a copy of it."""
    if not is_callers(given):
        return cache
    vars(given).update(vars(cache))
    return given
