"""Grouped-query attention over slots without copies of keys and values.

With grouped heads (GQA, 2305.13245) several query heads read the same keys. Where there is a mask and more than
one query, transformers' "sdpa" first copies every key and value once for each query head of its group; for 5 tokens
against 512 columns that costs 8 times the attention itself on a CPU. Here the heads of a group are laid behind one
another as further queries of their key head, and the mask is repeated with them: the same sums, nothing copied.

"sdpa" is wrapped once, when the first slot cache is made; the wrapper acts in passes of our own only
(``weights/passing.py``) and in our own graphs, every other call goes to the original untouched. Knows no cache and
no mask function. Read next: ``compiled.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from specdec.weights.passing import under_way

# what a graph asks while it is traced, and is guarded by: the processor's threads while a graph of ours runs, or 0
_threads = 0
_running, _lock = 0, Lock()


@contextmanager
def in_graphs() -> Iterator[None]:
    """Graphs that are traced or run meanwhile, in whichever thread, attend by groups."""
    global _threads, _running
    with _lock:
        _threads, _running = torch.get_num_threads(), _running + 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            _threads = _threads if _running else 0


def install() -> None:
    """Wrap "sdpa"; a second call does nothing."""
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not hasattr(original, "_specdec_original"):
        AttentionInterface.register("sdpa", _wrapped(original))


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        made, threads = _under_way()
        if (
            attention_mask is None
            or dropout
            or made is None
            or not _by_groups(query, key, attention_mask, kwargs, threads)
        ):
            found: tuple[Tensor, None] = original(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return found
        return grouped_attention(query, key, value, _repeated(attention_mask, query, key, made), scaling), None

    attend._specdec_original = original  # type: ignore[attr-defined]
    return attend


def _under_way() -> tuple[dict[tuple[int, int], tuple[Tensor, Tensor]] | None, int]:
    """Masks made so far in a pass or graph of ours, None in any other, and the processor's threads."""
    if torch.compiler.is_compiling():
        return {} if _threads else None, _threads
    passing = under_way()
    made = None if passing is None else passing.masks
    return made, 0 if made is None else torch.get_num_threads()


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attention of every query head to the key head of its group.

    Args:
        query: (B, G * N, Q, D), G heads of queries to each of N heads of keys, group by group.
        key: (B, N, S, D).
        value: (B, N, S, E).
        mask: (B or 1, 1, G * Q, S) added to the scores.
        scaling: of the scores; None is 1 / sqrt(D).

    Returns:
        (B, Q, G * N, E).
    """
    batch, heads, queries, size = query.shape
    keys = key.shape[1]
    laid = query.reshape(batch, keys, heads // keys * queries, size)
    out = scaled_dot_product_attention(laid, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, queries, value.shape[-1]).transpose(1, 2).contiguous()


def _by_groups(query: Tensor, key: Tensor, mask: Tensor, kwargs: dict[str, Any], threads: int) -> bool:
    """Whether this call has groups and gains by them; outside graphs transformers packs a single query itself."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[1]
    if heads == keys or heads % keys or mask.ndim != 4 or mask.shape[1] != 1:
        return False
    if queries == 1 and not torch.compiler.is_compiling():
        return False
    if any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap")):
        return False
    # a CPU shares out whole key heads
    return query.device.type != "cpu" or batch * keys >= threads


def _repeated(
    mask: Tensor, query: Tensor, key: Tensor, made: dict[tuple[int, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """``mask`` (B, 1, Q, S) once for each head of a group, to be added; ``made`` once a pass for all layers."""
    groups = query.shape[1] // key.shape[1]
    if torch.compiler.is_compiling():  # which makes what is equal once
        return _added(mask, groups, query.dtype)
    known = made.get((id(mask), groups))
    if known is None:
        # with the mask itself, so that its id is not given to another while this pass lasts
        known = made[id(mask), groups] = mask, _added(mask, groups, query.dtype)
    return known[1]


def _added(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.repeat(1, 1, groups, 1)
