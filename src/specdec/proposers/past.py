"""A model's cache during one call, for a proposer that feeds it text which may be taken back.

The draft's own ``generate()`` prepares the prompt; it is fed with the first guess that is asked for. Knows no way
to guess. Read next: ``cascade.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from specdec.errors import FAULTS, SpecdecError, UnsupportedModel
from specdec.layouts.check import FED
from specdec.layouts.compiled import CompiledSteps
from specdec.length import Opening
from specdec.proposers import Call
from specdec.proposers.prompt import embedded, input_table, positions, prepare
from specdec.scorer import Scorer
from specdec.state import State
from specdec.weights.adapters import device_of, inner_model, is_model

T = TypeVar("T")


def opening(draft: Any, target: Any) -> Opening:
    """What ``draft`` costs beside ``target``, about, as their weights have it; nothing where there is no target."""
    if target is None:
        return Opening(0.0, 0.0)
    (work, read), (of_target, read_of_target) = _weights(draft), _weights(target)
    return Opening(work / max(of_target, 1), read / max(read_of_target, 1))


def _weights(model: Any) -> tuple[int, int]:
    """Multiplications for a token of the prompt, which needs no head; bytes that a pass reads, the head's too."""
    table, head = input_table(model), model.get_output_embeddings()
    work = read = 0
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        tensors = [one for one in own if one is not None and one.ndim > 1]
        if module is not table:
            # a matrix in a kernel's own form is no buffer, and its layer says how much that is
            read += sum(one.nbytes for one in tensors) + getattr(module, "kernel_bytes", 0)
        if module is not table and module is not head:
            size: list[Any] = [getattr(module, name, None) for name in ("in_features", "out_features")]
            # whatever the weights of a linear layer are stored as
            linear = all(isinstance(one, int) for one in size)
            work += size[0] * size[1] if linear else sum(one.numel() for one in tensors)
    return work, read


def warn_refused(draft: str, reason: Any) -> None:
    """Say that ``draft``, such as the name of a model's class, cannot take what the call gives."""
    warnings.warn(f"specdec drafts nothing with {draft}: {reason}", stacklevel=3)


def tried(draft: str, attempt: Callable[[], T]) -> T | None:
    """What ``attempt()`` returns, or None and a warning where the model fails: a draft must not break the call.

    What we refuse on purpose is no failure of the model, and is raised.
    """
    try:
        return attempt()
    except SpecdecError:
        raise
    except FAULTS as error:
        warn_refused(draft, error)
        return None


def model_of(name: str, draft: Any) -> Any:
    """The model that writes in the end where ``name`` was given ``draft``.

    Raises:
        UnsupportedModel: it is no model.
    """
    if not is_model(draft):
        raise UnsupportedModel(
            f"{name} was given a {type(draft).__name__}; wanted is a Hugging Face model, such as "
            "AutoModelForCausalLM.from_pretrained(...) returns"
        )
    return inner_model(draft)


class Past:
    """A draft's cache, and for which rows it may be used.

    Attributes:
        name: of the model's class.
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
        self.name = type(model).__name__
        self.device = device_of(model, call.prompt.device)
        self.embeds = embedded(model)
        prompt, kwargs, config, inner = prepare(model, call, self.embeds)
        if prompt.shape != call.prompt.shape:
            raise UnsupportedModel(
                f"{type(model).__name__} prepares a prompt of shape {tuple(prompt.shape)} where the target "
                f"has {tuple(call.prompt.shape)}; give a draft with the same special tokens"
            )
        # embeddings that the text goes on from have positions, and are no columns of it
        before = kwargs.get("inputs_embeds", prompt).shape[1] - prompt.shape[1]
        self.longest = min(positions(model) - before, call.max_length)
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
        self._opening = opening(model, call.target)
        fits = call.prompt.shape[1] + FED <= self.longest  # its layout can be tried
        self._usable = np.full(call.prompt.shape[0], fits)
        self._looked = 0

    @property
    def opening(self) -> Opening | None:
        """See ``DraftLength.begins``."""
        return None if self._prompt is None else self._opening

    def feed_prompt(self) -> bool:
        """Feed the prompt, once: a draft that does not pay must not even cost that.

        Returns:
            False where the draft cannot take it; it then guesses nothing more, as it must not break the call.
        """
        if self._prompt is not None:
            prompt, self._prompt = self._prompt, None
            scores = tried(self.name, lambda: self.scorer.prefill(prompt, speculate=True))
            self._usable &= scores is not None
        return any(self._usable.tolist())

    def known(self, ids: Tensor) -> Tensor:
        """``ids`` where the model is, with others in place of those that it does not know."""
        return ids.to(self.device).clamp(0, self.embeds - 1)

    def limits(self, state: State, limits: np.ndarray) -> np.ndarray:
        """(B,) ``limits``, lowered to what the model can do; a row with an id unknown to it is lost to it."""
        if not self._looked or self.embeds < state.vocabulary:
            columns = np.arange(self._looked, int(state.lengths.max()))
            real = (columns >= state.starts[:, None]) & (columns < state.lengths[:, None])
            self._usable &= ~(real & (state.host_tokens[:, columns] >= self.embeds)).any(axis=1)
            self._looked = max(state.foundation - 1, 0)
        room = np.maximum(self.longest - state.lengths, 0)
        lowered: np.ndarray = np.minimum(limits, room) * (self._usable & state.live)
        return lowered
