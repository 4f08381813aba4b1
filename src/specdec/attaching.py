"""Another ``generate`` on a model object, for a while; the object is then as it was.

Knows nothing of drafts. Read next: ``generator.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


@contextmanager
def attached(target: Any, generate: Callable[..., Any]) -> Iterator[None]:
    """Let ``target.generate`` be ``generate`` inside ``with``.

    A call with ``custom_generate`` goes to what was there before: that is how ``generate`` itself comes in.
    """
    before = vars(target).get("generate")
    plain = target.generate

    @wraps(plain)
    def instead(*args: Any, **kwargs: Any) -> Any:
        called = plain if kwargs.get("custom_generate") is not None else generate
        return called(*args, **kwargs)

    target.generate = instead
    try:
        yield
    finally:
        if before is None:
            del target.generate
        else:
            target.generate = before
