"""Slots: the fast layout. A buffer of columns in which every row writes at its own place.

Rejected tokens are not removed but overwritten: nothing moves, nothing is concatenated, rows never wait for one
another, and shapes change only when the buffer grows by a block. The prompt is fed into transformers' own
cache and copied in. Causality hides stale columns: a query at column j sees columns up to j only, and those
were all written by this row. Each model builds its own masks; ``masks.py`` gives every row its own query
offset. Positions continue from those of the prompt.

Exact where positions come from ``position_ids`` and layers keep plain keys and values: 228 of 295 architectures
measured; the self-check finds out. Knows nothing of proposals. Read next: ``masks.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from specdec.layouts import masks
from specdec.layouts.columns import Columns
from specdec.layouts.handover import cached_columns, give_back, is_callers, newest
from specdec.layouts.picking import rows_from_the_end

BLOCK = 64
# layers of plain keys and values
KINDS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class Slots:
    """See the file's text."""

    name = "slots"

    def __init__(self, columns: Columns) -> None:
        """Take over from ``columns``, whose cache holds exactly the prompt.

        Raises:
            ValueError: the cache has layers that are no plain keys and values, or no mask can be given.
        """
        masks.install()
        self._plain = columns
        self._model = columns.model
        self.forwards = columns.forwards
        if getattr(self._model.config, "_attn_implementation", None) not in masks.SUPPORTED:
            raise ValueError(f"slots need an attention of {masks.SUPPORTED}")
        self._width = columns.fed
        native = columns.cache
        own = native.self_attention_cache if isinstance(native, EncoderDecoderCache) else native
        if not isinstance(own, Cache) or not own.layers:
            raise ValueError("slots need a transformers cache of layers")
        held = cached_columns(native)
        self._hidden = held - self._width
        layers = [_slot_layer(layer, held) for layer in own.layers]
        self._cache = SlotCache(layers)
        for layer in own.layers:
            if not isinstance(layer, (DummyLayer, StaticLayer)) and not is_callers(native):
                layer.keys = layer.values = None  # the prompt shall not be held twice
        self._handed: Any = self._cache
        if isinstance(native, EncoderDecoderCache):
            self._handed = EncoderDecoderCache(self._cache, native.cross_attention_cache)
            self._handed.is_updated = dict(native.is_updated)
        kwargs = columns.describes
        self._mask_key = "decoder_attention_mask" if columns.encoder_decoder else "attention_mask"
        self._position_key = "decoder_position_ids" if columns.encoder_decoder else "position_ids"
        self._prompt_mask = kwargs.get(self._mask_key)
        positions = kwargs.get(self._position_key)
        self._last_position = None if positions is None else positions[..., -1:]
        self._starts = np.zeros(0, dtype=np.int64)
        self.outputs: Any = None
        self._wanted = (self._starts, 0)  # what ``pick`` takes: rows counted from the last one
        self._mask: Tensor | None = None
        self._ids_key = "decoder_input_ids" if columns.encoder_decoder else "input_ids"
        self._reuses = _prepares_as_usual(self._model)
        self._prepared: dict[int, dict[str, Any]] = {}

    def prefill(self, prompt: Tensor) -> Tensor:
        """Prompts are fed natively, before the slots exist."""
        raise RuntimeError("slots take over behind the prompt; this is a bug in specdec")

    def forward(self, tokens: Tensor, lengths: np.ndarray, first: np.ndarray, count: int) -> Tensor:
        """See ``Layout.forward``."""
        if not len(self._starts):
            self._starts = np.full_like(lengths, self._width)
        starts = np.minimum(self._starts, lengths - 1)
        lowest, longest = int(starts.min()), int(starts.max())
        width = int((lengths - starts).max())
        self._grow(tokens.shape[0], longest + width + self._hidden)
        if lowest == longest:
            columns = torch.arange(lowest, lowest + width, device=tokens.device).expand(tokens.shape[0], -1)
            ids = tokens[:, lowest : lowest + width]
        else:
            offset = torch.from_numpy(starts).to(tokens.device, non_blocking=True)
            columns = offset[:, None] + torch.arange(width, device=tokens.device)
            ids = tokens.gather(1, columns)
        self._cache.place(
            columns + self._hidden if self._hidden else columns, lowest + self._hidden, longest + self._hidden
        )
        inputs = self._inputs(ids, columns)
        skipped = int((first - starts).min())  # nobody wants their scores
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = width - skipped
        self.outputs = self._model(**inputs, return_dict=True)
        self.forwards += 1
        self._starts = lengths.copy()
        self._wanted = (first - starts - width, count)
        return self.pick(self.outputs.logits)

    def pick(self, states: Tensor) -> Tensor:
        """See ``Layout.pick``."""
        return rows_from_the_end(states, *self._wanted)

    def _inputs(self, ids: Tensor, columns: Tensor) -> dict[str, Any]:
        """What the model is given for ``ids`` (B, W) at ``columns`` (B, W), as it prepares that itself.

        transformers' own preparation passes everything but ids and positions on unchanged, so for a width that
        was prepared before only these two are exchanged. A model with a preparation of its own is always asked.
        """
        width = ids.shape[1]
        ids, positions = ids.contiguous(), self._positions(columns)
        prepared = self._prepared.get(width)
        if prepared is not None:
            return {**prepared, self._ids_key: ids, self._position_key: positions}
        kwargs = self._plain.describe_more(width)
        kwargs["past_key_values"] = self._handed
        kwargs[self._mask_key] = self._mask
        kwargs[self._position_key] = positions
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=width, **kwargs
        )
        if self._reuses:
            self._prepared[width] = inputs
            return dict(inputs)
        return inputs

    def rewind(self, kept: np.ndarray, live: np.ndarray) -> None:
        """See ``Layout.rewind``: what is forgotten will be overwritten."""
        if len(self._starts):
            self._starts = np.minimum(self._starts, kept)

    def settle(self, columns: int) -> None:
        """Nothing moves here, so nothing has to be settled."""

    def hand_over(self, columns: int) -> Any:
        """See ``Layout.hand_over``."""
        native = self._plain.cache
        own = native.self_attention_cache if isinstance(native, EncoderDecoderCache) else native
        for layer, slots in zip(own.layers, self._cache.layers, strict=True):
            if isinstance(slots, SlotLayer):
                give_back(layer, slots.keys, slots.values, columns + self._hidden)
        return native

    def reach(self, lengths: np.ndarray, live: np.ndarray) -> np.ndarray:
        """See ``Layout.reach``: rows never wait for one another."""
        return np.full_like(lengths, np.iinfo(np.int64).max)

    def _positions(self, columns: Tensor) -> Tensor:
        """Positions of ``columns`` (B, W): those of the prompt go on; without any, columns are counted."""
        if self._last_position is None:
            return columns + self._hidden
        positions: Tensor = self._last_position + 1 + (columns - self._width)
        return positions

    def _grow(self, batch: int, columns: int) -> None:
        """Room for ``columns`` columns, in blocks: attention cost follows the room."""
        if columns <= self._cache.room:
            return
        room = -(-columns // BLOCK) * BLOCK
        self._prepared.clear()  # they hold the mask
        self._cache.grow(room)
        prompt = self._prompt_mask
        if prompt is None:
            device = self._model.device
            self._mask = torch.ones(batch, room, dtype=torch.int64, device=device)
        else:
            self._mask = torch.nn.functional.pad(prompt, (0, room - prompt.shape[1]), value=1)


class SlotCache(Cache):  # type: ignore[misc]
    """A cache whose rows stand at columns of their own."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.room = 0
        self._offset: Tensor | None = None

    def place(self, columns: Tensor, lowest: int, longest: int) -> None:
        """The next forward writes at ``columns`` (B, W), rows beginning between ``lowest`` and ``longest``."""
        self._offset = columns[:, 0]
        uniform = longest if lowest == longest else None
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.columns, layer.start, layer.length = columns, uniform, longest

    def grow(self, room: int) -> None:
        """Make every layer ``room`` columns wide."""
        self.room = room
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.grow(room)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """(B,) the column of the first query of each row; ``masks.py`` understands it."""
        return self._offset


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values (B, heads, room, head size), written at given columns."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.columns: Tensor | None = None
        self.start: int | None = None
        self.length = int(keys.shape[-2])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The prompt is there already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, heads, W, head size) at the round's columns; return the whole buffer."""
        width = key_states.shape[-2]
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if self.start is not None:
                buffer[:, :, self.start : self.start + width] = states
            else:
                where = self.columns[:, None, :, None].expand(states.shape)  # type: ignore[index]
                buffer.scatter_(2, where, states)
        return self.keys, self.values

    def grow(self, room: int) -> None:
        """Fill up with zeros to ``room`` columns."""
        missing = room - self.keys.shape[-2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, missing))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, missing))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole buffer, from column 0."""
        return int(self.keys.shape[-2]), 0

    def get_seq_length(self) -> int:
        """Columns of the longest row; exact for rows that stand together."""
        return self.length

    def get_max_length(self) -> int:
        """The buffer grows."""
        return -1


def _slot_layer(layer: Any, width: int) -> Any:
    """A slot layer with the prompt's keys and values of ``layer``."""
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
    return SlotLayer(keys, values)


def _prepares_as_usual(model: Any) -> bool:
    """Whether ``model`` has transformers' own preparation of inputs, which looks at nothing but its arguments."""
    names = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    usual = (getattr(type(model), name) is getattr(GenerationMixin, name) for name in names)
    return all(usual) and not set(names) & vars(model).keys() and not model.is_remote_code()
