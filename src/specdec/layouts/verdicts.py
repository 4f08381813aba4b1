"""What a verdict of the self-check is kept for: the kind of call, and a model whose passes are what they were.

A model may be changed between two calls, by hooks, by other methods, by layers put in the place of its own
(quantised ones): then a layout that was exact may be so no longer, and is tried anew.
Knows no layout. Read next: ``facts.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_modules

from specdec.layouts.columns import Columns
from specdec.layouts.forget import own_cache
from specdec.weights.thin import is_as_made

METHODS = ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


def kept_for(plain: Columns, prompt: Tensor, names: tuple[str, ...]) -> Any:
    """What the verdict depends on beside the model object itself; ``names`` are those of the layouts."""
    model, kwargs = plain.model, plain.described(0)
    cache, device = own_cache(plain.cache), prompt.device.type
    return (
        names,
        getattr(model.config, "_attn_implementation", None),
        model.dtype,
        model.training,  # dropout makes every pass another
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        device,
        prompt.shape[0] > 1,
        frozenset(name for name, value in kwargs.items() if value is not None),
        bool(kwargs.get("use_cache", True)),
        type(cache),
        frozenset(type(layer).__name__ for layer in getattr(cache, "layers", ())),
        *changes(model),
    )


def changes(model: Any) -> Iterator[Any]:
    """What somebody may have done to a model's passes: hooks, checkpoints, other layers, weights or methods."""
    modules = list(model.modules())
    hooks = [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
    for held in map(vars, modules):
        hooks += held["_forward_hooks"], held["_forward_pre_hooks"]
        if held.get("gradient_checkpointing"):
            yield "gradient_checkpointing"
    for registered in hooks:
        yield from map(_written, list(registered.values()))
    yield from (_written(vars(module).get("forward")) for module in modules if not is_as_made(module))
    kinds: set[Any] = set(map(type, modules))
    yield frozenset(kinds)
    yield frozenset(_written(getattr(kind, "forward", None)) for kind in kinds)  # TorchScript's are not there
    yield frozenset(type(weight) for module in modules for weight in list(module._parameters.values()))
    for method in (vars(model)[name] for name in METHODS if name in vars(model)):
        # a bound one, as PEFT puts there for every call, is another object whenever it is asked for
        yield from map(Very, (getattr(method, "__self__", method), getattr(method, "__func__", method)))


def _written(function: Any) -> tuple[Any, ...]:
    """What is written in ``function`` and in what it wraps: the same one may be made for every call anew."""
    code = getattr(getattr(function, "func", function), "__code__", None) or type(function)
    wrapped = getattr(function, "__wrapped__", None)
    return (code,) if wrapped is None else (code, *_written(wrapped))


class Very:
    """An object as part of a key: equal to itself alone, however alike another is, and not kept alive by it."""

    def __init__(self, one: Any) -> None:
        self._hash = id(one)
        try:
            self._one: Callable[[], Any] = weakref.ref(one)
        except TypeError:  # then it is equal to nothing, and layouts are tried again
            self._one = lambda: None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        mine = self._one()
        return isinstance(other, Very) and mine is not None and mine is other._one()
