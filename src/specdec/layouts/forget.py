"""Forgetting the newest columns of a transformers cache, more than once if need be.

``Cache.crop`` does two things to a sliding-window or convolution layer that records its past: it removes
columns, and it drops what the next forward will not need. The second makes a later, longer crop impossible,
and a draft needs just that: rows of different lengths step back between draft steps, and back to the
committed tokens afterwards. So the two are apart here: ``drop`` removes, ``trim`` drops the rest for good.
Knows no model. Read next: ``handover.py``.
"""

from __future__ import annotations

from typing import Any

from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import (
    BaseQuantizedLayer,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    StaticSlidingWindowLayer,
)


def can_drop(cache: Any) -> bool:
    """Whether the layers of ``cache`` forget all that they keep: some models add what does not go with the keys."""
    own = own_cache(cache)
    if own is not None and type(own).__module__ != Cache.__module__:
        return False
    kinds = list(map(type, layers_of(cache)))
    # behind its window it has overwritten what a crop should bring back, and a short check sees nothing of that
    if any(issubclass(kind, StaticSlidingWindowLayer) for kind in kinds):
        return False
    # DeepSeek-V4 keeps sums of every few columns too, and inherits a ``crop`` that knows nothing of them
    return all("crop" in vars(kind) or _is_known(kind) for kind in kinds)


def drop(cache: Any, columns: int) -> None:
    """Remove the newest ``columns`` of every layer; past states stay recorded."""
    for layer in layers_of(cache) if columns else ():
        _drop(layer, columns)


def level(cache: Any, columns: int) -> None:
    """Remove what layers hold beyond the first ``columns``; those that do not count them stay as they are."""
    for layer in layers_of(cache):
        if isinstance(layer, CacheLayerMixin) and not isinstance(layer, LinearAttentionCacheLayerMixin):
            surplus = int(layer.get_seq_length()) - columns
            if surplus > 0:
                _drop(layer, surplus)


def trim(cache: Any) -> None:
    """Drop the past that no forward from here on will need; what is left cannot be removed any more."""
    for layer in layers_of(cache):
        if type(layer) is not StaticLayer:
            layer.crop(0)


def own_cache(cache: Any) -> Any:
    """The decoder's part of an encoder-decoder cache, or the cache itself."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def layers_of(cache: Any) -> list[Any]:
    """The layers of the decoder's part; none where it is no cache of transformers."""
    layers: list[Any] = own_cache(cache).layers if isinstance(cache, Cache) else []
    return layers


def _is_known(kind: type) -> bool:
    """One of transformers' common layers; those that quantise cannot be cropped."""
    return kind.__module__ == Cache.__module__ and not issubclass(kind, BaseQuantizedLayer)


def _drop(layer: Any, columns: int) -> None:
    if type(layer) is DynamicSlidingWindowLayer and layer.is_initialized:
        _shorten(layer, columns)
    elif type(layer) is StaticLayer:
        layer.cumulative_length.sub_(columns)
    elif isinstance(layer, LinearAttentionCacheLayerMixin):
        _drop_linear(layer, columns)
    else:
        layer.crop(-columns)


def _drop_linear(layer: Any, columns: int) -> None:
    if not layer.is_croppable:
        raise RuntimeError("a recurrent state cannot be cropped; it needs a snapshot")
    for index, state in layer.conv_states.items():
        if state is not None:
            layer.conv_states[index] = state[..., :-columns]
    if getattr(layer, "keys", None) is not None:
        _shorten(layer, columns)


def _shorten(layer: Any, columns: int) -> None:
    """Keys and values without the newest ``columns``."""
    layer.keys, layer.values = layer.keys[..., :-columns, :], layer.values[..., :-columns, :]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length -= columns
