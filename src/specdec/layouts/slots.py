"""Slots: the fast layout. A buffer of columns in which every row writes at its own place.

Rejected tokens are not removed but overwritten: nothing moves, nothing is concatenated, rows never wait for one
another, and shapes change only when the buffer grows by a block. The prompt is fed into transformers' own
cache and copied in. Causality hides stale columns: a query at column j sees columns up to j only, and those
were all written by this row. Each model builds its own masks; ``masks.py`` gives every row its own query
offset. Positions continue from those of the prompt.

Exact where positions come from ``position_ids`` and layers keep plain keys and values: 228 of 295 architectures;
the self-check finds out. Knows nothing of proposals. Read next: ``slot_cache.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DummyLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from specdec.layouts import grouped, masks
from specdec.layouts.columns import Columns
from specdec.layouts.compiled import CompiledSteps
from specdec.layouts.facts import CACHE, prepares_as_usual
from specdec.layouts.forget import own_cache
from specdec.layouts.handover import cached_columns, give_back, is_callers
from specdec.layouts.picking import rows_from_the_end
from specdec.layouts.slot_cache import Place, SlotCache, SlotLayer, slot_layer
from specdec.state import span
from specdec.transfer import to_device
from specdec.weights.adapters import device_of
from specdec.weights.filling import real_tokens
from specdec.weights.thin import ThinProducts

BLOCK = 64
RESERVE = 8 * BLOCK  # columns are made for so many tokens ahead: every time all that are there are copied


class _Plan(NamedTuple):
    """A forward pass over W columns of B rows, all but the tokens known.

    Attributes:
        ids: gives the tokens (B, W) as they then are.
        positions: (B, W) of them.
        place: the columns (B, W) that it writes, and the lowest and highest that a row begins at.
        lengths: (B,) columns of each row when it is done.
        fed: (B,) columns of it that mean something.
        rows: scores to ask for, counted from the last one.
        wanted: which of them ``pick`` takes.
    """

    ids: Callable[[], Tensor]
    positions: Tensor
    place: tuple[Tensor, int, int]
    lengths: np.ndarray
    fed: np.ndarray
    rows: int
    wanted: tuple[np.ndarray, int]


class Slots:
    """See the file's text."""

    name = "slots"

    def __init__(self, columns: Columns, longest: int | None = None) -> None:
        """Take over from ``columns``, whose cache holds exactly the prompt; rows reach ``longest`` columns at most.

        Raises:
            ValueError: the cache has layers that are no plain keys and values, or no mask can be given.
        """
        masks.install()
        grouped.install()
        self._plain, self._model, self._thin = columns, columns.model, columns.thin
        self.forwards = columns.forwards
        if getattr(self._model.config, "_attn_implementation", None) not in masks.SUPPORTED:
            raise ValueError(f"slots need an attention of {masks.SUPPORTED}")
        self._width = columns.fed
        native = columns.cache
        own = own_cache(native)
        if not isinstance(own, Cache) or not own.layers:
            raise ValueError("slots need a transformers cache of layers")
        if not type(own).__module__.startswith("transformers."):
            raise ValueError(f"a {type(own).__name__} may do more than keep keys and values")
        held = cached_columns(native)
        self._hidden = held - self._width
        self._longest = None if longest is None else longest + self._hidden
        where = Place()
        self._cache = SlotCache([slot_layer(layer, held, where) for layer in own.layers], where)
        for layer in own.layers:
            if not isinstance(layer, (DummyLayer, StaticLayer)) and not is_callers(native):
                layer.keys = layer.values = None  # the prompt shall not be held twice
        self._handed: Any = self._cache
        if isinstance(native, EncoderDecoderCache):
            self._handed = EncoderDecoderCache(self._cache, native.cross_attention_cache)
            self._handed.is_updated = dict(native.is_updated)
        kwargs = columns.described(0)
        self._mask_key = "decoder_attention_mask" if columns.encoder_decoder else "attention_mask"
        self._position_key = "decoder_position_ids" if columns.encoder_decoder else "position_ids"
        self._prompt_mask = kwargs.get(self._mask_key)
        positions = kwargs.get(self._position_key)
        self._last_position = None if positions is None else positions[..., -1:]
        self._starts = np.array([self._width])
        self._live = np.ones(1, dtype=bool)  # all rows
        self.outputs: Any = columns.outputs
        self._wanted = (self._starts, 0)  # what ``pick`` takes: rows counted from the last one
        self._mask: Tensor | None = None
        self._columns = self._positions = torch.zeros(0, 0, dtype=torch.int64)  # all there is room for
        self._encodes = columns.encoder_decoder
        self._ids_key = "decoder_input_ids" if self._encodes else "input_ids"
        self._reuses = prepares_as_usual(self._model)
        self._prepared: dict[int, dict[str, Any]] = {}
        self._steps: CompiledSteps | None = None
        self._least_room = 0
        self._lender: Slots | None = None

    def share(self, model: Any, layers: Sequence[int]) -> Slots | None:
        """These slots for ``model``, whose layer i is this model's layer ``layers[i]``: one memory for both.

        What either writes the other sees. A pass of ``model`` must therefore begin, row by row, where the next pass
        of this one will begin (``stand_at``), so that this one overwrites or never looks at what was written there.
        None where the cache does not keep plain keys and values for each layer.
        """
        own = self._cache.layers
        if max(layers) >= len(own) or not all(isinstance(own[layer], SlotLayer) for layer in layers):
            return None
        other = copy.copy(self)
        other._model, other._thin, other._lender = model, ThinProducts(model, is_draft=True), self
        other._cache = other._handed = SlotCache([own[layer] for layer in layers], self._cache.where)
        other._cache.room = self._cache.room
        other._prepared, other._steps, other.forwards = {}, None, 0
        return other

    def stand_at(self, columns: np.ndarray, live: np.ndarray) -> None:
        """The next pass, of ``live`` rows, writes from ``columns`` (B,) on; others have filled what lies before."""
        self._starts, self._live = columns, live

    def compile_with(self, steps: CompiledSteps, max_length: int) -> None:
        """Make passes through the graphs of ``steps`` from now on; rows reach ``max_length`` columns at most."""
        self._steps, self._least_room = steps, steps.room(max_length + self._hidden)
        self.name = "slots" if steps.refused else "slots+compiled"

    def forward(self, tokens: Tensor, lengths: np.ndarray, first: np.ndarray, count: int) -> Tensor:
        """See ``Layout.forward``."""
        return self._run(self._plan(tokens, self._starts, lengths, first, count))

    def steps(self, tokens: Tensor, ends: Sequence[np.ndarray], live: np.ndarray) -> Iterator[Tensor]:
        """See ``Layout.steps``. All are planned at once: behind a pass all is slow that was not just done."""
        self._grow(tokens, span(ends[-1])[1] + self._hidden)
        starts = [self._starts, *ends[:-1]]
        plans = [self._plan(tokens, at, end, end - 1, 1) for at, end in zip(starts, ends, strict=True)]
        for plan in plans:
            yield self._run(plan)

    def _plan(
        self, tokens: Tensor, starts: np.ndarray, lengths: np.ndarray, first: np.ndarray, count: int
    ) -> _Plan:
        """What ``forward`` will do, rows having been fed up to ``starts`` (B,)."""
        starts = np.minimum(starts, lengths - 1)
        (lowest, longest), hidden = span(starts), self._hidden
        fed = lengths - starts
        width = span(fed)[1]
        if self._steps is not None:
            width = self._steps.width(width)
        self._grow(tokens, longest + width + hidden)
        if self._steps is None and lowest == longest:
            here = slice(lowest, lowest + width)
            columns = self._columns[:, lowest + hidden : lowest + hidden + width]
            ids, positions = tokens[:, here].contiguous, self._positions[..., here]
        else:
            where = starts[:, None] + np.arange(width)
            last = lengths[:, None] - 1  # fills up rows that feed less than others
            read = to_device(np.minimum(where, last), tokens.device)
            columns = to_device(where + hidden, tokens.device)
            ids, positions = partial(tokens.gather, 1, read), self._positions_of(read)
        wanted = first - starts  # nobody wants the scores before the first; a graph has one number of rows
        rows = width - span(wanted)[0] if self._steps is None else width
        place = (columns, lowest + hidden, longest + hidden)
        return _Plan(ids, positions.contiguous(), place, lengths, fed, rows, (wanted - width, count))

    def _run(self, plan: _Plan) -> Tensor:
        """One forward pass; the scores that are wanted."""
        inputs = self._inputs(plan.ids(), plan.positions)
        self._cache.place(*plan.place)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = plan.rows
        self.outputs = self._pass(inputs, plan)
        self._starts, self._wanted = plan.lengths, plan.wanted
        return rows_from_the_end(self.outputs.logits, *plan.wanted)

    def pick(self, states: Tensor) -> Tensor:
        """See ``Layout.pick``."""
        return rows_from_the_end(states, *self._wanted)

    def _inputs(self, ids: Tensor, positions: Tensor) -> dict[str, Any]:
        """What the model is given for ``ids`` (B, W) at ``positions``, as it prepares that itself.

        transformers' own preparation passes everything but ids and positions on unchanged, so for a width that
        was prepared before only these two are exchanged. A model with a preparation of its own is always asked.
        """
        width = ids.shape[1]
        prepared = self._prepared.get(width)
        if prepared is not None:
            return {**prepared, self._ids_key: ids, self._position_key: positions}
        kwargs = self._plain.described(width)
        kwargs[CACHE] = self._handed
        kwargs[self._mask_key] = self._mask
        kwargs[self._position_key] = positions
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=width, **kwargs
        )
        if self._reuses:
            self._prepared[width] = inputs
            return dict(inputs)
        return inputs

    def _pass(self, inputs: dict[str, Any], plan: _Plan) -> Any:
        """What the model, compiled or not, returns for ``inputs``."""
        self.forwards += 1
        if self._steps is not None:
            graphs = self._steps.graphs
            with self._thin.compiled():
                scores = self._steps.run(self._model, inputs, self._cache, span(plan.fed)[1])
            self.forwards += 2 * (self._steps.graphs > graphs)  # a new graph is compared first, with an eager pass
            if scores is not None:
                return CausalLMOutputWithPast(logits=scores)
            self._cache.place(*plan.place)
            self.name = "slots" if self._steps.refused else self.name
        batch, width = plan.place[0].shape
        # beside an encoder an input of this shape need not be the tokens; only a CPU computes rather than reads
        whole = self._encodes or not plan.positions.is_cpu
        real = None if whole else real_tokens(plan.fed, width, self._live)
        with self._thin.over(batch * width, real, by_groups=width > 1):  # transformers groups a single query itself
            return self._model(**inputs, return_dict=True)

    def rewind(self, kept: np.ndarray, live: np.ndarray) -> None:
        """See ``Layout.rewind``: what is forgotten will be overwritten."""
        self._live, self._starts = live, np.minimum(self._starts, kept)

    def hand_over(self, columns: int) -> Any:
        """See ``Layout.hand_over``."""
        native = self._plain.cache
        for layer, slots in zip(own_cache(native).layers, self._cache.layers, strict=True):
            if isinstance(slots, SlotLayer):
                give_back(layer, slots.keys, slots.values, columns + self._hidden)
                slots.let_go()
        return native

    def reach(self, limits: np.ndarray, lengths: np.ndarray, live: np.ndarray) -> np.ndarray:
        """See ``Layout.reach``: rows never wait for one another."""
        return limits

    def _positions_of(self, columns: Tensor) -> Tensor:
        """Positions of ``columns`` (B, W): those of the prompt go on; without any, columns are counted."""
        if self._last_position is None:
            return columns + self._hidden
        positions: Tensor = self._last_position + 1 + (columns - self._width)
        return positions

    def _grow(self, tokens: Tensor, columns: int) -> None:
        """Room for ``columns`` columns of ``tokens`` (B, capacity), in blocks: attention cost follows the room."""
        lender = self._lender
        if lender is not None:
            # buffers that are lent must not grow apart from the others
            lender._grow(tokens, columns)
            if self._mask is not lender._mask:
                self._cache.room, self._mask = lender._cache.room, lender._mask
                self._columns, self._positions = lender._columns, lender._positions
                self._prepared.clear()
            return
        if columns <= self._cache.room >= self._least_room:
            return
        room = max(-(-columns // BLOCK) * BLOCK, self._least_room)
        self._prepared.clear()  # they hold the mask
        reserve = room
        if self._steps is None:  # graphs know buffers of one size only
            ahead = room + RESERVE
            reserve = max(room, ahead if self._longest is None else min(ahead, self._longest))
        self._cache.grow(room, reserve)
        if self._steps is not None:
            self._steps.lend(self._cache)
        batch = len(tokens)
        self._columns = torch.arange(room, device=tokens.device).expand(batch, -1)
        self._positions = self._positions_of(self._columns)
        prompt = self._prompt_mask
        if prompt is None:
            device = device_of(self._model, self._cache.device)
            self._mask = torch.ones(batch, room, dtype=torch.int64, device=device)
        else:
            self._mask = torch.nn.functional.pad(prompt, (0, room - prompt.shape[1]), value=1)
