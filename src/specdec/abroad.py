"""Inputs on another device than the target: the call runs where the target is, and what comes out is brought home.

``generate()`` of transformers takes inputs on the CPU for a model on a GPU, keeps ids and scores on the CPU and
moves what a pass needs right before it. Here a round lives where the target is, so the inputs move once; what the
caller wrote (processors, conditions, functions) is still called with tensors on the inputs' device, and its answers
are taken back. Knows nothing of rounds. Read next: ``call.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.pytorch_utils import move_to_device
from transformers.utils import ModelOutput

from specdec.processing import is_function
from specdec.stepwise import Stepwise
from specdec.weights.adapters import device_of


def home_of(target: Any, inputs: Tensor | None, options: dict[str, Any]) -> torch.device | None:
    """The device of the call's inputs, or None where that is the target's."""
    named = ("input_ids", "inputs_embeds", getattr(target, "main_input_name", "input_ids"))
    given = [inputs, *(options.get(name) for name in named)]
    home = next((one.device for one in given if isinstance(one, Tensor)), None)
    return None if home is None or device_of(target, home) == home else home


def taken_abroad(
    target: Any, home: torch.device, inputs: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Any]]:
    """Inputs and options for a call where ``target`` is; nothing of the caller's is changed."""
    abroad = device_of(target, home)
    moved = {
        name: move_to_device(value, abroad) if isinstance(value, Tensor | ModelOutput) else value
        for name, value in options.items()
    }
    processors, criteria = options.get("logits_processor"), options.get("stopping_criteria")
    if processors:
        called = [_called(_Processor, one, home, abroad) for one in processors]
        moved["logits_processor"] = LogitsProcessorList(called)
    if criteria:
        called = [_called(_Criterion, one, home, abroad) for one in criteria]
        moved["stopping_criteria"] = StoppingCriteriaList(called)
    allows = options.get("prefix_allowed_tokens_fn")
    if allows is not None:
        moved["prefix_allowed_tokens_fn"] = lambda row, ids: allows(row, ids.to(home))
    return None if inputs is None else inputs.to(abroad), moved


def brought_home(out: Any, home: torch.device) -> Any:
    """What ``generate()`` returns, with ids and scores where plain ``generate()`` keeps them."""
    if isinstance(out, Tensor):
        return out.to(home)
    for name in ("sequences", "scores", "logits"):
        if out.get(name) is not None:
            out[name] = move_to_device(out[name], home)
    return out


def _called(kind: Any, one: Any, home: torch.device, abroad: torch.device) -> Any:
    """``one`` as it is to be called: ``generate()`` must recognise transformers' own kinds, whose tensors move."""
    if isinstance(one, Stepwise):
        return one  # its state is no tensor
    own = type(one).__module__.startswith("transformers.")
    if not own or (kind is _Processor and not _moves(one)):
        return kind(one, home)
    one = copy.copy(one)
    for name, value in vars(one).items():
        if isinstance(value, Tensor):
            setattr(one, name, value.to(abroad))
    return one


def _moves(processor: Any) -> bool:
    """``processor`` is at home wherever its tensors are; one with a state may make others, where it was told to."""
    fixed = any(isinstance(one, torch.Generator) for one in vars(processor).values())
    return is_function(processor) and not fixed


class _Processor(LogitsProcessor):  # type: ignore[misc]
    """A processor of the caller's, or one of transformers' that cannot be moved, called at home."""

    def __init__(self, inner: Callable[..., Tensor], home: torch.device) -> None:
        self._inner, self._home = inner, home
        self.specdec_pure = is_function(inner)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores, from where they are wanted."""
        return self._inner(input_ids.to(self._home), scores.to(self._home)).to(scores.device)


class _Criterion(StoppingCriteria):  # type: ignore[misc]
    """A condition of the caller's, called at home."""

    def __init__(self, inner: Callable[..., Any], home: torch.device) -> None:
        self._inner, self._home = inner, home

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """(B,) whether each row ends, or one answer for all."""
        ended = self._inner(input_ids.to(self._home), move_to_device(scores, self._home), **kwargs)
        return move_to_device(ended, input_ids.device)
