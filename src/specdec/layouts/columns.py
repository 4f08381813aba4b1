"""Columns: the universal layout. transformers' own cache, mask and positions; one column for all rows.

The cache holds columns 0..C-1 of every row, C being what the slowest live row has committed. A row that is
ahead feeds its own committed tokens again from column C on, then its guesses; a shorter row is filled up on
the right with whatever stands in the buffer, which causality hides and the next rewind drops. So column j of
row b holds exactly what plain ``generate()`` has there, padding included, and every model sees the inputs it
would build itself: nothing is registered, nothing patched.

Three ways to forget, by what the cache can do:
* attention layers are cropped;
* recurrent and convolution states cannot be cropped: a snapshot is kept at column C and put back, and the
  next forward feeds the tokens committed since before its guesses (``Snapshots``);
* nothing can be forgotten: one-token steps only (``reach`` is 0), the layout called "plain".

Knows nothing of proposals or verification. Read next: ``snapshot.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, GenerationMixin

from specdec.layouts.facts import CACHE_NAMES, OLD_CACHES, uncounted_padding
from specdec.layouts.forget import can_drop, drop, level, own_cache, trim
from specdec.layouts.handover import cached_columns, end_recording, write_into
from specdec.layouts.picking import rows_from_the_end
from specdec.layouts.snapshot import Snapshots
from specdec.transfer import to_device
from specdec.weights.thin import ThinProducts

LEAD = 6  # a row further ahead of the slowest one than this guesses nothing until that one has caught up
STRETCH = 12  # a snapshot further behind than this is brought up by a forward pass of its own


class Columns:
    """See the file's text. ``kwargs`` is what ``generate()`` prepared for the model's first forward."""

    def __init__(self, model: Any, kwargs: dict[str, Any], config: Any, *, is_draft: bool = False) -> None:
        """Take one-token steps until told to ``become`` something else.

        Args:
            model: the Hugging Face model, as ``generate()`` handed it over.
            kwargs: model inputs beside the ids; the dictionary is copied, the cache in it is used.
            config: the prepared ``GenerationConfig``, read by the model's own prefill.
            is_draft: the last bits of its scores are free.
        """
        self.model, self.thin = model, ThinProducts(model, is_draft=is_draft)
        self.forwards = 0
        self._kwargs, self._config = dict(kwargs), config
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        update = type(model)._update_model_kwargs_for_generation
        # an override may know one new token only (mllama's cross-attention mask): then go one by one
        self._stepwise = update is not GenerationMixin._update_model_kwargs_for_generation
        # several new tokens repeat the last token types, not the last one
        self._stepwise |= kwargs.get("token_type_ids") is not None
        self._padding = uncounted_padding(model)
        self._snapshots: Snapshots | None = None
        self._columns = 0  # columns that ``_kwargs`` describes; the cache may hold more until a rewind
        self.fed = 0  # columns in the cache, without those that no id stands for (``hidden``)
        self.outputs: Any = None  # of the last forward
        self._fed_kwargs = self._kwargs
        self._wanted = (np.zeros(0, dtype=np.int64), 0)  # what ``pick`` takes: rows counted from the last one
        self.given = self.cache
        self.hidden = 0
        self.become("nothing")

    def prefill(self, prompt: Tensor) -> Tensor:
        """Feed the whole prompt (B, P) the model's own way; scores of its last column, (B, 1, V)."""
        self.outputs = self.model._prefill(prompt, self._config, self._kwargs)
        self.forwards += 1
        self._columns = self.fed = int(prompt.shape[1])
        self._take_cache()
        # a past that the caller gave, or embeddings in the place of ids, lies before the first column
        held = cached_columns(self.cache)
        self.hidden = held - self.fed if held else 0
        return self._scores(1)

    def give_hidden(self) -> str:
        """To be asked before the prefill: passes return hidden states; under which name."""
        self._kwargs["output_hidden_states"] = True
        return "decoder_hidden_states" if self.encoder_decoder else "hidden_states"

    def mark(self) -> tuple[Any, ...]:
        """Where the model stands, for ``go_back``; the cache is kept by others."""
        return dict(self._kwargs), dict(self._fed_kwargs), self.outputs, self._columns, self.fed

    def go_back(self, mark: tuple[Any, ...], cache: Any) -> None:
        """Stand at ``mark`` again, one-token steps only, with ``cache`` as it was there."""
        self.become("nothing")
        kwargs, fed_kwargs, self.outputs, self._columns, self.fed = mark
        self._kwargs, self._fed_kwargs = dict(kwargs), dict(fed_kwargs)
        self._put_cache(cache)

    def become(self, forget: str, wide: bool = True) -> Columns:
        """Change the way to forget; allowed when the cache holds exactly the committed columns.

        Args:
            forget: "crop", "snapshot" or "nothing".
            wide: feed several tokens a forward; False feeds one after the other.

        Raises:
            ValueError: the cache cannot be cropped.
        """
        if forget == "crop" and not can_drop(self.cache):
            raise ValueError("its layers keep what cannot be cropped")
        self.name = {"crop": "columns", "snapshot": "columns+snapshot", "nothing": "plain"}[forget]
        self._forget, self._wide = forget, wide
        self._snapshots = Snapshots() if forget == "snapshot" else None
        if forget == "crop" and isinstance(self.cache, Cache):
            # only now: while it records, a sliding layer keeps every column, a whole prompt's too
            own_cache(self.cache).activate_past_recording()
        return self

    @property
    def cache(self) -> Any:
        """The model's cache, whatever it is called, or None."""
        return next((self._kwargs[n] for n in CACHE_NAMES if self._kwargs.get(n) is not None), None)

    @property
    def is_foreign(self) -> bool:
        """The model keeps its past in a form that we cannot copy or put back."""
        return any(self.outputs.get(name) is not None for name in OLD_CACHES)

    def forward(self, tokens: Tensor, lengths: np.ndarray, first: np.ndarray, count: int) -> Tensor:
        """See ``Layout.forward``."""
        start, upto = self.fed, int(lengths.max())
        if upto <= start:
            raise RuntimeError("columns are to be fed that were not forgotten; this is a bug in specdec")
        self._wanted = (first - upto, count)
        if upto == start + 1 or (self._wide and not self._skips(tokens[:, start:upto], lengths - start)):
            return self.pick(self._feed(tokens, upto))
        scores, passes = [], []
        for column in range(start + 1, upto + 1):
            scores.append(self._feed(tokens, column))
            passes.append(self.outputs)
        self.outputs = _joined(passes)
        return self.pick(torch.cat(scores, dim=1))

    def steps(self, tokens: Tensor, ends: Sequence[np.ndarray], live: np.ndarray) -> Iterator[Tensor]:
        """See ``Layout.steps``."""
        for place, lengths in enumerate(ends):
            if place:  # rows of different lengths overwrite what filled them up
                self.rewind(ends[place - 1], live)
            yield self.forward(tokens, lengths, lengths - 1, 1)

    def _skips(self, tokens: Tensor, lengths: np.ndarray) -> bool:
        """Whether ``tokens`` (B, n), ``lengths`` (B,) of them real, hold a word behind padding, if that matters."""
        if self._padding is None:
            return False
        padding = tokens == self._padding
        real = to_device(np.arange(tokens.shape[1]) < lengths[:, None], tokens.device)
        return bool(((padding.cumsum(dim=1) > 0) & ~padding & real).any())

    def pick(self, states: Tensor) -> Tensor:
        """See ``Layout.pick``."""
        return rows_from_the_end(states, *self._wanted)

    def rewind(self, kept: np.ndarray, live: np.ndarray) -> None:
        """See ``Layout.rewind``."""
        target = int(kept[live].min(initial=self.fed))
        if self._forget == "crop":
            drop(self.cache, self.fed - target)
            self.fed = target
        elif target < self.fed and self._snapshots is not None:
            self._put_cache(self._snapshots.put_back())
            self.fed = self._columns
        elif target < self.fed:
            raise RuntimeError("the plain layout cannot forget; this is a bug in specdec")

    def undo(self) -> None:
        """The last pass may have broken off, with more columns in some layers than in others: take them back."""
        if self._forget == "crop":
            level(self.cache, self.fed + self.hidden)
        elif self._snapshots is not None and self._snapshots.taken:
            self._put_cache(self._snapshots.put_back())
            self.fed, self._snapshots = self._columns, None  # no pass follows

    def settle(self, columns: int) -> None:
        """Columns below this one are final: no later ``rewind`` goes behind them."""
        if columns <= self._columns:
            return
        if self._forget == "crop":
            self._kwargs = self.described(columns - self._columns)
            self._columns = columns
            if columns == self.fed:
                trim(self.cache)
        elif columns == self.fed:
            # a snapshot stays where it is until everything that was fed is final
            self._kwargs, self._columns = self._fed_kwargs, self.fed
            if self._snapshots is not None:
                self._snapshots.drop()

    def hand_over(self, columns: int) -> Any:
        """See ``Layout.hand_over``."""
        cache = self.cache
        if self.is_foreign and self.given is None:  # what the kwargs have of it is a step old
            return next(self.outputs[name] for name in OLD_CACHES if self.outputs.get(name) is not None)
        if self._forget == "crop":
            trim(cache)
            end_recording(cache)
        return write_into(self.given, cache)

    def reach(self, limits: np.ndarray, lengths: np.ndarray, live: np.ndarray) -> np.ndarray:
        """See ``Layout.reach``."""
        if self._forget == "nothing" or not self._wide or not live.any():
            return np.zeros_like(limits)
        return limits * (lengths - int(lengths[live].min()) <= LEAD)

    def _feed(self, tokens: Tensor, upto: int) -> Tensor:
        """One forward pass over columns ``fed``..``upto`` - 1; their scores."""
        width = upto - self._columns
        if self._snapshots is not None and not self._snapshots.taken:
            self._snapshots.take(self.cache)
        kwargs = self.described(width)
        fresh = upto - self.fed
        # a model without a cache takes the whole text again; one-token steps leave that to the model
        remembers = self._forget == "nothing" or self._has_cache()
        cached = kwargs.get("use_cache", True) and remembers
        inputs = self.model.prepare_inputs_for_generation(
            tokens[:, :upto], next_sequence_length=fresh if cached else None, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = fresh  # several models set 1 there by themselves
        with self.thin.over(len(tokens) * fresh):
            self.outputs = self.model(**inputs, return_dict=True)
        self.forwards += 1
        self.fed = upto
        self._fed_kwargs = kwargs
        self._take_cache()
        return self._scores(fresh)

    def described(self, width: int) -> dict[str, Any]:
        """Model inputs for ``width`` columns more than are settled."""
        kwargs = dict(self._kwargs)
        for step in [1] * width if self._stepwise else [width] * (width > 0):
            kwargs = self.model._update_model_kwargs_for_generation(
                self.outputs, kwargs, is_encoder_decoder=self.encoder_decoder, num_new_tokens=step
            )
        return kwargs

    def catch_up(self, tokens: Tensor, kept: np.ndarray, live: np.ndarray) -> None:
        """Bring a snapshot that is far behind up to the slowest row, by a forward pass without guesses."""
        if self._snapshots is None or not live.any():
            return
        target = int(kept[live].min())
        if target - self.fed > STRETCH:
            lengths = np.full_like(kept, target)
            self.forward(tokens, lengths, lengths - 1, 1)
            self.settle(target)

    def _has_cache(self) -> bool:
        given = (self.outputs.get(name) for name in (*CACHE_NAMES, *OLD_CACHES))
        return self.cache is not None or any(value is not None for value in given)

    def _take_cache(self) -> None:
        for name in CACHE_NAMES:
            if self.outputs.get(name) is not None:
                self._kwargs[name] = self.outputs[name]

    def _put_cache(self, cache: Any) -> None:
        """Go on with ``cache``: the next inputs are built from the last outputs and from the kwargs."""
        for name in CACHE_NAMES:
            for kwargs in (self._kwargs, self._fed_kwargs):
                if kwargs.get(name) is not None:
                    kwargs[name] = cache
            if self.outputs.get(name) is not None:
                self.outputs = copy.copy(self.outputs)
                self.outputs[name] = cache

    def _scores(self, columns: int) -> Tensor:
        scores: Tensor = self.outputs.logits
        if scores.shape[1] < columns:
            raise RuntimeError(f"{type(self.model).__name__} gave {scores.shape[1]} scores for {columns} tokens")
        return scores[:, -columns:]


def _joined(passes: Sequence[Any]) -> Any:
    """The outputs of several passes as those of one over all their columns, as far as states are looked at."""
    outputs = copy.copy(passes[-1])
    for name in ("hidden_states", "decoder_hidden_states"):
        if outputs.get(name):
            layers = zip(*(one[name] for one in passes), strict=True)
            outputs[name] = tuple(torch.cat(states, dim=1) for states in layers)
    return outputs
