"""What ``generate()`` returns: ids alone, or its output classes with scores and logits a step.

A ragged round is taken apart: the scores of step t of row b go where plain ``generate()`` would put them.
After a row has ended its scores and hidden states are zeros (plain ``generate()`` has rows computed from
padding there).
Knows no rule. Read next: ``streaming.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from specdec.layouts.facts import CACHE, feeds_all, odd_states
from specdec.records import Round, Stats
from specdec.state import State
from specdec.transfer import to_device


class Collector:
    """Gathers what the caller asked for, round by round.

    Attributes:
        keeps_logits: scores before processing are asked for.
        keeps_states: names of the hidden states and attentions that are.
        takes_steps: among them are attentions, or hidden states with shapes of their own, such as those of a whole
            text where there is no cache: then no guess may be made.
    """

    def __init__(self, config: Any, state: State, model: Any, model_kwargs: dict[str, Any]) -> None:
        """Read from the prepared ``config`` what to keep; the encoder's part is in ``model_kwargs`` already."""
        self._as_dict = bool(config.return_dict_in_generate)
        self.keeps_logits = self._as_dict and bool(config.output_logits)
        self.scores: list[Tensor] | None = [] if self._as_dict and config.output_scores else None
        self._logits: list[Tensor] | None = [] if self.keeps_logits else None
        self._prompt_length = state.prompt_length
        self._encodes = bool(model.config.is_encoder_decoder)
        self.keeps_states: tuple[str, ...] = ()
        self._encoded: dict[str, Any] = {}
        for kind in ("attentions", "hidden_states"):
            if self._as_dict and getattr(config, f"output_{kind}"):
                self.keeps_states += _names(kind, self._encodes)
                if self._encodes:
                    self._encoded[f"encoder_{kind}"] = model_kwargs["encoder_outputs"].get(kind)
        self._states: dict[str, list[list[Tensor]]] = {name: [] for name in self.keeps_states}  # by layer and step
        # what has the shapes of plain's steps can only come from such steps
        attends = any("attentions" in name for name in self.keeps_states)
        odd = odd_states(model)
        self.takes_steps = attends
        if self.keeps_states and not attends:
            self.takes_steps = odd is not None or feeds_all(model, model_kwargs)
        self._rows_of_states = odd or 0

    def add(self, round_: Round) -> None:
        """Take the rows that drew a committed token."""
        for steps, given in ((self.scores, round_.scores), (self._logits, round_.logits)):
            if steps is not None and given is not None:
                rows = given.float()
                self._place(steps, rows, rows[:, 0], round_)
        for name, held in self._states.items():
            layers = (round_.states or {})[name]
            held += [[] for _ in layers[len(held) :]]
            for steps, rows in zip(held, layers, strict=True):
                if not steps or self.takes_steps:
                    steps.append(rows)  # of the whole prompt, or of a one-token step of all rows
                else:
                    self._place(steps, rows, rows[:, :1], round_)

    def output(self, sequences: Tensor, stats: Stats, cache: Any) -> Any:
        """Ids (B, L), or the output class with ``speculation`` beside."""
        if not self._as_dict:
            return sequences
        kept: dict[str, Any] = {
            "sequences": sequences,
            "scores": _cut(self.scores, stats.row_emitted),
            "logits": _cut(self._logits, stats.row_emitted),
            CACHE: cache,
            **self._encoded,
        }
        for name, held in self._states.items():
            rows_in = self._rows_of_states if "hidden" in name else 0
            layers = [_cut(steps, stats.row_emitted, rows_in) or () for steps in held]
            count = int(stats.row_emitted.max())
            kept[name] = tuple(zip(*layers, strict=True)) if layers else ((),) * count
        out: Any = (GenerateEncoderDecoderOutput if self._encodes else GenerateDecoderOnlyOutput)(**kept)
        out.speculation = stats
        return out

    def _place(self, steps: list[Tensor], rows: Tensor, one: Tensor, round_: Round) -> None:
        """Put ``rows`` (B, K + 1, ...) where plain ``generate()`` has them; a step is of the shape of ``one``."""
        first = round_.before - self._prompt_length
        needed = int((first + round_.counts).max())
        while len(steps) < needed:
            steps.append(torch.zeros_like(one))
        for row, count in enumerate(round_.counts):
            for i in range(int(count)):
                steps[int(first[row]) + i][row] = rows[row, i]


def _names(kind: str, encodes: bool) -> tuple[str, ...]:
    if not encodes:
        return (kind,)
    return ("decoder_attentions", "cross_attentions") if kind == "attentions" else ("decoder_hidden_states",)


def _cut(steps: list[Tensor] | None, emitted: np.ndarray, rows_in: int = 0) -> tuple[Tensor, ...] | None:
    """The steps that came out, without what a row (dimension ``rows_in``) had written past an end found later."""
    if steps is None:
        return None
    kept = steps[: int(emitted.max())]
    for step, rows in enumerate(kept):
        if rows is None:  # a kind of attention that the model does not tell (pix2struct's cross-attention)
            continue
        rows.index_fill_(rows_in, to_device(np.flatnonzero(emitted <= step), rows.device), 0)
    return tuple(kept)
