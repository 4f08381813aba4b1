"""Another method or setting on a model object, for a while; the object is then as it was.

Knows nothing of drafts. Read next: ``abroad.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper, wraps
from threading import Lock, get_ident
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from specdec.weights.adapters import inner_model, uncompiled

# model -> attribute -> what it was before the first loan, and what was lent since; loans of threads may overlap
_loans: WeakKeyDictionary[Any, dict[str, list[Any]]] = WeakKeyDictionary()
_lock = Lock()


@contextmanager
def attached(target: Any, generate: Callable[..., Any]) -> Iterator[None]:
    """Let ``target.generate`` be ``generate`` inside ``with``.

    A call with ``custom_generate`` goes to what was there before: that is how ``generate`` itself comes in.
    """
    with _lent(target, "generate", _Instead(target, generate)):
        yield


class _Instead:
    """What stands in the place of ``target.generate``; a copy of the target gets its own plain one."""

    def __init__(self, target: Any, generate: Callable[..., Any]) -> None:
        update_wrapper(self, target.generate)
        self._target, self._plain, self._generate = target, target.generate, generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        called = self._plain if kwargs.get("custom_generate") is not None else self._generate
        return called(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._target))
        return self if copied is None else MethodType(type(copied).generate, copied)

    def __reduce__(self) -> Any:  # while the target is being loaded it has only what its class has
        return getattr, (self._target, "generate")


@contextmanager
def healing_with(target: Any, tokenizer: Any) -> Iterator[None]:
    """Let ``target.heal_tokens`` use ``tokenizer``: ``generate()`` loses it when ``custom_generate`` is given."""
    target = inner_model(target)
    plain, here = target.heal_tokens, get_ident()

    @wraps(plain)
    def instead(input_ids: Any, given: Any = None) -> Any:
        return plain(input_ids, tokenizer if get_ident() == here else given)

    with _lent(target, "heal_tokens", instead):
        yield


@contextmanager
def having(target: Any, config: Any) -> Iterator[None]:
    """Let ``target``'s own ``generation_config`` be ``config``; that of the model inside too, if PEFT wraps it."""
    with _lent(inner_model(target), "generation_config", config), _lent(target, "generation_config", config):
        yield


def own_settings(target: Any) -> Any:
    """The ``generation_config`` of ``target``, also while a call in another thread has lent it one (``having``)."""
    with _lock:
        for model in (target, inner_model(target)):  # a wrapper has none of its own
            lent = _loans.get(uncompiled(model), {}).get("generation_config")
            if lent is not None and lent[0] is not None:
                return lent[0]
        return target.generation_config


@contextmanager
def _lent(target: Any, name: str, thing: Any) -> Iterator[None]:
    """Let the attribute ``name`` be ``thing``, the newest loan counting; after the last it is what it was."""
    target = uncompiled(target)
    with _lock:
        lent = _loans.setdefault(target, {}).setdefault(name, [vars(target).get(name)])
        lent.append(thing)
        setattr(target, name, thing)
    try:
        yield
    finally:
        with _lock:
            last = max(place for place, one in enumerate(lent) if one is thing)
            del lent[last]
            if len(lent) == 1:
                del _loans[target][name]
            if lent[-1] is None:
                delattr(target, name)
            else:
                setattr(target, name, lent[-1])
