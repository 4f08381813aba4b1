"""A draft whose output head knows only the most frequent tokens (FR-Spec, Zhao et al. 2502.14856).

The head is the largest matrix of a small draft, and most of its rows are rarely right. The tokens left out get
the score -inf: the draft never guesses them, and what the target gives them comes out of the residual, so the
output's law is untouched and only acceptance can fall. Read next: ``share.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.errors import InvalidInput, UnsupportedModel
from specdec.weights.share import shared_copy
from specdec.whole import at_least


def prune_head(model: Any, text_ids: Any, n: int) -> Any:
    """A draft that shares everything with ``model`` but scores only ``n`` tokens.

    Kept are the model's special ids (end of sequence and the like), then the tokens most frequent in
    ``text_ids``, then, where the text has fewer, the lowest ids: in a vocabulary of merged pairs those are the
    commonest. To combine with quantisation, prune first.

    Args:
        model: a decoder-only model whose head is a ``torch.nn.Linear``; left as it is.
        text_ids: token ids of a calibration text, any shape, a tensor or nested lists; may be empty.
        n: how many tokens to keep, 1 <= n <= vocabulary. A multiple of 16 can be quantised to 4 bits.

    Returns:
        The draft, with rows (B, L, V) as before.

    Raises:
        InvalidInput: ``n`` or an id is out of range.
        UnsupportedModel: the head is no plain linear layer.
    """
    if not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModel(f"prune_head was given a {type(model).__name__}; wanted is a Hugging Face model")
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise UnsupportedModel(
            f"the head of {type(model).__name__} is a {type(head).__name__}; wanted is a torch.nn.Linear. "
            "Prune before quantising, and use other kinds of head as they are"
        )
    kept = frequent_tokens(text_ids, n, head.out_features, _special_ids(model))
    return shared_copy(model, {head: PrunedHead(head, kept.to(head.weight.device))})


def frequent_tokens(text_ids: Any, n: Any, vocabulary: int, special: set[int]) -> Tensor:
    """(n,) ids to keep, ascending; see ``prune_head``."""
    wanted = f"a whole number from 1 to the head's {vocabulary} tokens"
    n = at_least(1, "n", n, wanted)
    if n > vocabulary:
        raise InvalidInput(f"n={n}; give {wanted}")
    try:
        rows = [torch.as_tensor(row, device="cpu").flatten() for row in _rows(text_ids)]
        ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(row for row in rows if row.numel())])
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"text_ids is no token ids ({error}); give a tokenizer's input_ids") from error
    if ids.numel() and (ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise InvalidInput(f"text_ids holds {ids.dtype} up to {ids.max()}; wanted are ids below {vocabulary}")
    counts = torch.bincount(ids.long(), minlength=vocabulary).double()
    counts[[one for one in special if one < vocabulary]] = torch.inf
    return counts.argsort(descending=True, stable=True)[:n].sort().values


def _rows(text_ids: Any) -> list[Any]:
    """Texts may be of different lengths, as a tokenizer returns several."""
    nested = isinstance(text_ids, (list, tuple)) and any(isinstance(one, (list, tuple, Tensor)) for one in text_ids)
    return [part for one in text_ids for part in _rows(one)] if nested else [text_ids]


class PrunedHead(torch.nn.Module):
    """Scores (..., V) of which only those of the kept tokens are computed; the others are -inf."""

    kept: Tensor

    def __init__(self, head: torch.nn.Linear, kept: Tensor) -> None:
        super().__init__()
        self.in_features = head.in_features
        self.out_features = head.out_features
        self.linear = torch.nn.Linear(head.in_features, len(kept), bias=False, device="meta")
        self.linear.weight = torch.nn.Parameter(head.weight.detach()[kept], requires_grad=False)
        if head.bias is not None:
            self.linear.bias = torch.nn.Parameter(head.bias.detach()[kept], requires_grad=False)
        self.register_buffer("kept", kept)

    @property
    def weight(self) -> Tensor:
        """The kept rows (n, K): some models ask their head for its dtype (Mamba)."""
        return self.linear.weight

    def forward(self, states: Tensor) -> Tensor:
        """Scores (..., V) of hidden states (..., K)."""
        scores: Tensor = self.linear(states)
        rows: Tensor = scores.new_full((*scores.shape[:-1], self.out_features), -torch.inf)
        return rows.index_copy_(-1, self.kept, scores)


def _special_ids(model: Any) -> set[int]:
    """End of sequence, beginning and padding, wherever the model says so."""
    found: set[int] = set()
    for holder in (model.config.get_text_config(decoder=True), model.generation_config):
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(holder, name, None)
            if value is not None:
                found.update(torch.as_tensor(value, device="cpu").flatten().tolist())
    return {one for one in found if one >= 0}
