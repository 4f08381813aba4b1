"""Masks with a query offset of its own for every row.

transformers builds a model's masks (full, sliding, chunked, prefix, one a layer type) from index functions; the
only thing it cannot say is that rows stand at different columns. So the two functions that turn an index
function into a mask, "sdpa" and "eager", are wrapped once, when the first slot cache is made: a query offset
that is a tensor with one entry a row is handled here, every other call goes to the original untouched.
Knows no cache and no model. Read next: ``grouped.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface, and_masks, padding_mask_function

SUPPORTED = ("sdpa", "eager")


def install() -> None:
    """Wrap the mask functions of ``SUPPORTED``; a second call does nothing."""
    for name in SUPPORTED:
        original = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(original, "_specdec_original"):
            AttentionMaskInterface.register(name, _wrapped(original, name))


def _wrapped(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        offset = kwargs.get("q_offset")
        if not isinstance(offset, Tensor) or offset.ndim != 1:
            return original(*args, **kwargs)
        allowed = ragged_mask(
            kwargs["q_length"],
            kwargs["kv_length"],
            offset,
            kwargs["mask_function"],
            kwargs.get("attention_mask"),
            by_vmap=kwargs.get("use_vmap", False),
        )
        if name == "sdpa":
            return allowed
        dtype = kwargs.get("dtype", torch.float32)
        zero = torch.zeros((), dtype=dtype, device=allowed.device)
        return torch.where(allowed, zero, torch.finfo(dtype).min)

    mask._specdec_original = original  # type: ignore[attr-defined]
    return mask


def ragged_mask(
    queries: int,
    keys: int,
    offset: Tensor,
    mask_function: Callable[..., Tensor],
    padding: Tensor | None,
    *,
    by_vmap: bool,
) -> Tensor:
    """(B, 1, Q, S) True where query i of row b, at column ``offset[b] + i``, may see column j.

    Args:
        queries: Q.
        keys: S, columns from 0.
        offset: (B,) column of the first query of each row.
        mask_function: transformers' index function (row, head, query column, key column) -> bool.
        padding: (B, S) False where a column is padding, or None.
        by_vmap: the function is a caller's own and takes single indices only.
    """
    if padding is not None:
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    device = offset.device
    batch = offset.shape[0]
    row = torch.arange(batch, device=device)
    head = torch.arange(1, device=device)
    query = torch.arange(queries, device=device) + offset[:, None]
    key = torch.arange(keys, device=device)
    if not by_vmap:
        allowed = mask_function(row[:, None, None, None], head[None, :, None, None], query[:, None, :, None], key)
        return allowed.expand(batch, 1, queries, keys)
    # row and query together: every row has query columns of its own
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, 0, None)):
        mask_function = torch.vmap(mask_function, in_dims=dims, out_dims=0)
    with TransformGetItemToIndex():
        return mask_function(row, head, query, key)
