"""Another method or setting on a model object, for a while; the object is then as it was.

Knows nothing of drafts. Read next: ``generator.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from specdec.weights.adapters import inner_model


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
    plain = target.heal_tokens

    @wraps(plain)
    def instead(input_ids: Any, _: Any = None) -> Any:
        return plain(input_ids, tokenizer)

    with _lent(target, "heal_tokens", instead):
        yield


@contextmanager
def having(target: Any, config: Any) -> Iterator[None]:
    """Let ``target``'s own ``generation_config`` be ``config``; that of the model inside too, if PEFT wraps it."""
    with _lent(target, "generation_config", config), _lent(inner_model(target), "generation_config", config):
        yield


@contextmanager
def _lent(target: Any, name: str, thing: Any) -> Iterator[None]:
    before = vars(target).get(name)
    setattr(target, name, thing)
    try:
        yield
    finally:
        if before is None:
            delattr(target, name)
        else:
            setattr(target, name, before)
