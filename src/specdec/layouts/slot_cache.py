"""The cache of the slots: buffers of columns that rows write at places of their own.

What a model sees of the slots is this ``Cache`` of transformers. Where the next pass writes is said once, in
``place``, for all layers. Knows nothing of lengths and guesses. Read next: ``masks.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from specdec.layouts.handover import newest

# layers of plain keys and values
KINDS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class Place:
    """Where the next forward writes; all layers look at the same one.

    Attributes:
        columns: (B, W).
        rows: (B, 1), counted from 0.
        start: the first column where all rows begin at the same one, else None.
        length: the highest first column.
    """

    def __init__(self) -> None:
        self.columns = torch.zeros(0, 0, dtype=torch.int64)
        self.rows = torch.zeros(0, 1, dtype=torch.int64)
        self.start: int | None = None
        self.length = 0


class SlotCache(Cache):  # type: ignore[misc]
    """A cache whose rows stand at columns of their own.

    Attributes:
        where: where the next forward writes.
        room: columns that there are.
        eager: passes over it go through no graphs.
    """

    def __init__(self, layers: list[Any], where: Place) -> None:
        """Hold ``layers``, all slots among them made with the place ``where``."""
        super().__init__(layers=layers)
        self.where = where
        self.room = 0
        self.eager = False

    def place(self, columns: Tensor, lowest: int, longest: int) -> None:
        """The next forward writes at ``columns`` (B, W), rows beginning between ``lowest`` and ``longest``."""
        where = self.where
        where.columns, where.length = columns, longest
        if len(where.rows) != len(columns) or where.rows.device != columns.device:
            where.rows = torch.arange(len(columns), device=columns.device)[:, None]
        where.start = longest if lowest == longest else None

    def place_by_data(self) -> None:
        """Say the same in tensors only, so that a graph made for one place serves every place."""
        self.where.start, self.where.length = None, self.room

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, W, room) of the next forward."""
        batch, width = self.where.columns.shape
        return batch, width, self.room

    @property
    def device(self) -> torch.device:
        """Where the next forward writes."""
        return self.where.columns.device

    def buffers(self) -> list[Tensor]:
        """Keys and values of every layer."""
        return [one for layer in self.layers if isinstance(layer, SlotLayer) for one in (layer.keys, layer.values)]

    def move(self, buffers: list[Tensor]) -> None:
        """Go on in ``buffers``, which hold the same."""
        layers = [layer for layer in self.layers if isinstance(layer, SlotLayer)]
        for layer, keys, values in zip(layers, buffers[::2], buffers[1::2], strict=True):
            layer.hold(keys, values)

    def grow(self, room: int, reserve: int) -> None:
        """Make every layer ``room`` columns wide; where that needs a copy, ``reserve`` columns are made."""
        self.room = room
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.grow(room, reserve)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """(B,) column of the first query of each row; ``masks.py`` understands it."""
        return self.where.columns[:, 0]


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values (B, heads, room, head size), written at given columns."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, where: Place) -> None:
        super().__init__()
        self.hold(keys, values)
        self.where = where
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The prompt is there already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, heads, W, head size) at the round's columns; return the whole buffer."""
        width, start = key_states.shape[-2], self.where.start
        if start is None:  # a layer may be on another device than the ids
            rows, columns = (one.to(key_states.device) for one in (self.where.rows, self.where.columns))
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if start is not None:
                buffer[:, :, start : start + width] = states
            else:
                # not scatter_: compiled, that copies the whole buffer
                buffer[rows, :, columns] = states.transpose(1, 2).to(buffer.dtype)  # autocast mixes them
        return self.keys, self.values

    def grow(self, room: int, reserve: int) -> None:
        """See ``SlotCache.grow``; new columns are zeros."""
        keys, values = self._reserved
        missing = reserve - keys.shape[-2]
        if room > keys.shape[-2]:
            keys, values = (torch.nn.functional.pad(one, (0, 0, 0, missing)) for one in (keys, values))
        self.hold(keys, values)
        self.keys, self.values = keys[:, :, :room], values[:, :, :room]

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Go on in these."""
        self.keys, self.values = self._reserved = keys, values

    def let_go(self) -> None:
        """Hold nothing any more."""
        self.hold(self.keys.new_empty(0), self.values.new_empty(0))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole buffer, from column 0."""
        return int(self.keys.shape[-2]), 0

    def get_seq_length(self) -> int:
        """Columns of the longest row; exact for rows that stand together."""
        return self.where.length

    def get_max_length(self) -> int:
        """The buffer grows."""
        return -1


def slot_layer(layer: Any, width: int, where: Place) -> Any:
    """A slot layer with the prompt's keys and values of ``layer``, written at the place ``where``."""
    if isinstance(layer, DummyLayer):
        return layer
    if type(layer) not in KINDS:
        raise ValueError(f"a {type(layer).__name__} does not fit into slots")
    if layer.keys is None:
        return DummyLayer()
    # a sliding layer has kept its last columns only
    keys, values = newest(layer, width)
    missing = width - keys.shape[-2]
    keys, values = (torch.nn.functional.pad(t, (0, 0, missing, 0)) for t in (keys, values))
    return SlotLayer(keys, values, where)
