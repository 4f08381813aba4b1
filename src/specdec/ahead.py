"""Generators and threads: one that runs ahead of its reader, and what torch keeps for each thread.

For releases on a clock (``shaping.py``): a tick may fall into the middle of a round, so whoever watches the clock
cannot be the one who generates. Knows no tokens. Read next: ``shaping.py``.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Runs ``items`` to the end; what has come so far can be taken at any time.

    The thread sees what the caller's thread has set for itself: autocast, inference mode, CUDA device and
    stream, context variables; so the numbers are those of a call in the caller's thread.
    """

    def __init__(self, items: Generator[Item, None, Any]) -> None:
        """Take over ``items``; nothing runs before ``start``."""
        self._items = items
        self._come: deque[Item] = deque()
        self._news = threading.Event()
        self._left = self._over = False
        self._error: BaseException | None = None
        self._value: Any = None
        self._within, self._context = surroundings(), contextvars.copy_context()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        # a daemon: a program that ends in the middle of a text does not wait for the rest of it
        self._thread = threading.Thread(
            target=self._context.run, args=(self._run,), name="specdec-ahead", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the first item has come, or the end."""
        self._news.wait()

    def taken(self) -> list[Item]:
        """Items that came since the last call; what ended the generator is raised when all of them are taken."""
        over = self._over  # asked first: what comes afterwards belongs to the next call
        items = [self._come.popleft() for _ in range(len(self._come))]
        if over and not items and self._error is not None:
            raise self._error
        return items

    def result(self) -> Any:
        """What the generator returned; waits for it."""
        self._join()
        if self._error is not None:
            raise self._error
        return self._value

    def close(self) -> None:
        """End the generator after the item that is under way; nothing of it is left when this returns."""
        self._left = True
        if self._thread is None:
            self._items.close()
        self._join()
        self._come.clear()

    def _join(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()  # the garbage collector may close from the thread itself

    def _run(self) -> None:
        try:
            with self._within():
                while not self._left:
                    self._come.append(next(self._items))
                    self._news.set()
        except StopIteration as end:
            self._value = end.value
        except BaseException as error:
            self._error = error
        finally:
            self._items.close()
            self._over = True
            self._news.set()


def resumed(items: Generator[Item, None, Any]) -> Generator[Item, None, Any]:
    """``items`` and their result; every step sees what torch keeps for each thread as it is now."""
    return _resumed(items, surroundings())


def _resumed(
    items: Generator[Item, None, Any], within: Callable[[], AbstractContextManager[Any]]
) -> Generator[Item, None, Any]:
    try:
        while True:
            with within():
                try:
                    item = next(items)
                except StopIteration as end:
                    return end.value
            yield item
    finally:
        with within():
            items.close()


def surroundings() -> Callable[[], AbstractContextManager[Any]]:
    """What torch keeps for each thread, as it is in this one: a maker of the same for another thread."""
    inference = torch.is_inference_mode_enabled()
    # asking for a stream would wake CUDA up where nobody uses it
    kinds = ["cpu", "cuda"] if torch.cuda.is_initialized() else ["cpu"]  # type: ignore[no-untyped-call]
    casts = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    stream = torch.cuda.current_stream() if "cuda" in kinds else None

    def within() -> ExitStack:
        stack = ExitStack()
        if inference != torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(inference))
        for kind in kinds:
            if kind in casts or torch.is_autocast_enabled(kind):
                dtype = casts.get(kind)
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))  # and with it the device
        return stack

    return within
