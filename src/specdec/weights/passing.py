"""The pass of ours that is under way in this thread, as the layers that it runs through may know it.

A layer that is called from inside a model is told its input and nothing else. What serves it beside that - whether
anybody needs its very bits, which tokens only fill up a batch - is said here while the pass lasts, by whoever makes
the pass. Knows no layer and no kernel. Read next: ``race.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

_here = threading.local()  # .passing
Layer = tuple[dict[str, Any], Any]  # a module's own attributes, and the ``forward`` to put there


class Real(NamedTuple):
    """The tokens of a pass over (B, W) ids that mean something; see ``filling.py``.

    Attributes:
        shape: (B, W).
        spared: tokens that only fill up.
        picked: (n,) places of the others among the B * W.
        back: (B * W,) for each token which of the n to take in its place.
    """

    shape: tuple[int, int]
    spared: int
    picked: Tensor
    back: Tensor


class Pass(AbstractContextManager["Pass"]):
    """While this lasts, a pass of ours is under way in this thread; for one pass at a time.

    Attributes:
        of_draft: its scores may end in any bits (``blocks.py``).
        real: tokens that mean something; None is all.
        masks: made for attention by groups so far, by what they are of (``layouts/grouped.py``); None where
            attention goes the model's own way.
    """

    def __init__(
        self,
        layers: Sequence[Layer] = (),
        *,
        of_draft: bool = False,
        real: Real | None = None,
        by_groups: bool = False,
    ) -> None:
        """Put the ``layers``' way to multiply in their place meanwhile (``thin.py``)."""
        self._layers = layers
        self.of_draft, self.real = of_draft, real
        self.masks: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = {} if by_groups else None

    def __enter__(self) -> Pass:
        for own, forward in self._layers:
            own.setdefault("forward", forward)
        self._before = under_way()
        _here.passing = self
        return self

    def __exit__(self, *_: object) -> None:
        _here.passing = self._before
        for own, forward in self._layers:
            if own.get("forward") is forward:  # another thread may have a pass of its own under way
                del own["forward"]


UNTOLD: AbstractContextManager[Any] = nullcontext()  # what to enter for a pass of which there is nothing to say


def under_way() -> Pass | None:
    """The innermost pass of this thread."""
    found: Pass | None = getattr(_here, "passing", None)
    return found
