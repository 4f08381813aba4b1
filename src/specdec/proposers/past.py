"""A model's cache during one call, for a proposer that feeds it text which may be taken back.

The draft's own ``generate()`` prepares the prompt; it is fed with the first guess that is asked for. Knows no way
to guess. Read next: ``cascade.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from specdec.errors import UnsupportedModel
from specdec.layouts.compiled import CompiledSteps
from specdec.proposers import Call
from specdec.proposers.prompt import embedded, prepare
from specdec.scorer import Scorer
from specdec.state import State, device_of


def work(model: Any) -> int:
    """Multiplications that a token of the prompt takes, about: all weights but the vocabulary's tables."""
    if model is None:
        return 0
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    total = 0
    for module in model.modules():
        if any(module is table for table in tables):
            continue
        columns, rows = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(columns, int) and isinstance(rows, int):  # whatever its weights are stored as
            total += columns * rows
        else:
            total += sum(weight.numel() for weight in module._parameters.values() if weight is not None)
    return total


class Past:
    """A draft's cache, and for which rows it may be used.

    Attributes:
        scorer: the model, prepared for the call.
        device: where it is.
        embeds: ids from this one on it does not know.
        longest: columns that it has positions for.
    """

    def __init__(self, model: Any, call: Call, layout: str, steps: CompiledSteps | None) -> None:
        """Prepare ``model`` for ``call``; nothing is fed yet.

        Args:
            model: the draft.
            call: what it drafts in.
            layout: "auto", or the one to use.
            steps: its graphs, or None to run it eagerly.

        Raises:
            UnsupportedModel: the draft's prompt would have other columns than the target's.
        """
        self.device = device_of(model, call.prompt.device)
        self.embeds = embedded(model)
        prompt, kwargs, config, inner = prepare(model, call, self.embeds)
        if prompt.shape != call.prompt.shape:
            raise UnsupportedModel(
                f"{type(model).__name__} prepares a prompt of shape {tuple(prompt.shape)} where the target "
                f"has {tuple(call.prompt.shape)}; give a draft with the same special tokens"
            )
        text = model.config.get_text_config(decoder=True)
        self.longest = getattr(text, "max_position_embeddings", None) or call.max_length
        self.scorer = Scorer(
            inner,
            kwargs,
            config,
            max_length=call.max_length,
            layout=layout,
            is_draft=True,
            steps=steps,
        )
        self._prompt: Tensor | None = prompt.to(self.device)
        self._share = work(model) / max(work(call.target), 1)
        self._usable = np.ones(call.prompt.shape[0], dtype=bool)
        self._looked = 0

    @property
    def opening(self) -> float:
        """What has to be done before the first guess; see ``DraftLength.begins``."""
        return 0.0 if self._prompt is None else self._share

    def feed_prompt(self) -> None:
        """Feed the prompt, once: a draft that does not pay must not even cost that."""
        if self._prompt is not None:
            self.scorer.prefill(self._prompt, speculate=True)
            self.longest -= self.scorer.hidden
            self._prompt = None

    def known(self, ids: Tensor) -> Tensor:
        """``ids`` where the model is, with others in place of those that it does not know."""
        return ids.to(self.device).clamp(0, self.embeds - 1)

    def limits(self, state: State, limits: np.ndarray) -> np.ndarray:
        """(B,) ``limits``, lowered to what the model can do; a row with an id unknown to it is lost to it."""
        new = state.host_tokens[:, self._looked : int(state.lengths.max())]
        self._usable &= (new < self.embeds).all(axis=1)
        self._looked = max(int(state.settled.min()) - 1, 0)
        room = np.maximum(self.longest - state.lengths, 0)
        return np.where(self._usable & state.live, np.minimum(limits, room), 0)
