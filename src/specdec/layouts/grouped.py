"""Grouped-query attention over slots without copies of keys and values.

With grouped heads (GQA, 2305.13245) several query heads read the same keys. Where there is a mask and more than
one query, transformers' "sdpa" first copies every key and value once for each query head of its group; for 5 tokens
against 512 columns that costs 8 times the attention itself on a CPU. Here the heads of a group are laid behind one
another as further queries of their key head, and the mask is repeated with them: the same sums, nothing copied.

"sdpa" is wrapped once, when the first slot cache is made; the wrapper acts in passes of our own only
(``weights/passing.py``), every other call goes to the original untouched. Knows no cache and no mask
function. Read next: ``compiled.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from specdec.weights.passing import under_way


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
        passing = None if torch.compiler.is_compiling() else under_way()
        made = None if passing is None else passing.masks
        if attention_mask is None or dropout or made is None or not _by_groups(query, key, attention_mask, kwargs):
            found: tuple[Tensor, None] = original(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return found
        return grouped_attention(query, key, value, _repeated(attention_mask, query, key, made), scaling), None

    attend._specdec_original = original  # type: ignore[attr-defined]
    return attend


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


def _by_groups(query: Tensor, key: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this call has groups and gains by them; transformers packs a single query itself."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[1]
    if queries == 1 or heads == keys or heads % keys or mask.ndim != 4 or mask.shape[1] != 1:
        return False
    if any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap")):
        return False
    # a CPU shares out whole key heads
    return query.device.type != "cpu" or batch * keys >= torch.get_num_threads()


def _repeated(
    mask: Tensor, query: Tensor, key: Tensor, made: dict[tuple[int, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """``mask`` (B, 1, Q, S) once for each head of a group, to be added; ``made`` once a pass for all layers."""
    groups = query.shape[1] // key.shape[1]
    known = made.get((id(mask), groups))
    if known is None:
        added = mask
        if mask.dtype == torch.bool:
            added = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        # with the mask itself, so that its id is not given to another while this pass lasts
        known = made[id(mask), groups] = mask, added.repeat(1, 1, groups, 1)
    return known[1]
