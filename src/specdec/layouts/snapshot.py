"""Snapshots: a cache as it was at one column, for states that no crop brings back.

``crop`` of transformers leaves a recurrent state advanced, without an error (huggingface/transformers#49036),
so we keep what a layer held before the guesses and put it back. Recurrent and convolution states are written
in place and must be copied; keys and values are replaced by every update, except in static layers, so holding on
to the old tensors is enough. A cache of a kind unknown to us is copied whole. Knows no model.
Read next: ``forget.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

REPLACED_BY_UPDATE = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)
STATIC = (StaticLayer, StaticSlidingWindowLayer)


class Snapshots:
    """A copy of a cache at one column, and the way back to it."""

    def __init__(self) -> None:
        """Nothing is taken yet."""
        self.taken = False
        self._cache: Any = None
        self._layers: list[Any] = []
        self._states: list[dict[str, Any]] = []

    def take(self, cache: Any) -> None:
        """Keep the states of ``cache`` as they are now."""
        self._layers = _known_layers(cache)
        self._cache = cache if self._layers else copy.deepcopy(cache)
        self._states = [_held(layer, vars(layer)) for layer in self._layers]
        self.taken = True

    def drop(self) -> None:
        """The states of now are the ones to go on with."""
        self._cache, self._layers, self._states, self.taken = None, [], [], False

    def put_back(self) -> Any:
        """Go back to where the copy was taken, and keep it; returns the cache to go on with."""
        if not self._layers:
            return copy.deepcopy(self._cache)
        for layer, states in zip(self._layers, self._states, strict=True):
            for name, value in _held(layer, states).items():
                here = getattr(layer, name, None)
                if type(layer) in STATIC and isinstance(here, torch.Tensor):
                    here.copy_(value)  # compiled code knows it by its address
                else:
                    setattr(layer, name, value)
        return self._cache


def _known_layers(cache: Any) -> list[Any]:
    """All layers of ``cache`` if we know how each of them is written; else none."""
    # the cross-attention part of a cache is not always fixed (blt keeps its patches there)
    parts = [cache]
    if isinstance(cache, EncoderDecoderCache):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    if not all(type(part) in (Cache, DynamicCache, StaticCache) for part in parts):
        return []
    layers = [layer for part in parts for layer in part.layers]
    known = (
        type(layer) in (*REPLACED_BY_UPDATE, *STATIC)
        or (isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, StaticLayer))
        for layer in layers
    )
    return layers if all(known) else []


def _held(layer: Any, attributes: dict[str, Any]) -> dict[str, Any]:
    """``attributes`` of a layer, copied where the layer writes into them."""
    if type(layer) in REPLACED_BY_UPDATE:
        return dict(attributes)
    if type(layer) in STATIC:
        return {name: _copy(value) for name, value in attributes.items()}
    return {name: value if name in ("keys", "values") else _copy(value) for name, value in attributes.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value
