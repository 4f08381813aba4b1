"""Another method or setting on a model object, for a while; the object is then as it was.

Knows nothing of drafts. Read next: ``generator.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock, get_ident
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
    plain = target.generate

    @wraps(plain)
    def instead(*args: Any, **kwargs: Any) -> Any:
        called = plain if kwargs.get("custom_generate") is not None else generate
        return called(*args, **kwargs)

    with _lent(target, "generate", instead):
        yield


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
    with _lent(target, "generation_config", config), _lent(inner_model(target), "generation_config", config):
        yield


def own_settings(target: Any) -> Any:
    """The ``generation_config`` of ``target``, also while a call in another thread has lent it one (``having``)."""
    with _lock:
        lent = _loans.get(uncompiled(target), {}).get("generation_config")
        return target.generation_config if lent is None else lent[0]


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
