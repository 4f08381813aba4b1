"""Layouts: where a ragged batch keeps its keys and values, and how it forgets rejected tokens.

One file a layout; all answer to the same verbs (``Layout``) and pass the same tests. Which one runs is
settled by what configs say (``choices.py``, ``facts.py``) and a self-check on the live batch (``check.py``).
Knows nothing of proposals or verification. Read next: ``columns.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

NEVER: int = np.iinfo(np.int64).max  # a column that no row reaches


class Layout(Protocol):
    """A model with a cache of some kind; B rows. ``columns`` count tokens of a row, padding included."""

    name: str
    forwards: int

    @property
    def outputs(self) -> Any:
        """What the model returned in the last forward."""
        ...

    def pick(self, states: Tensor) -> Tensor:
        """Of ``states`` (B, W, ...) of the last forward the part (B, count, ...) that its scores are."""
        ...

    def forward(self, tokens: Tensor, lengths: np.ndarray, first: np.ndarray, count: int) -> Tensor:
        """Feed what is missing of every row; return the scores of ``count`` columns a row.

        Args:
            tokens: (B, capacity) the rows.
            lengths: (B,) columns of each row that shall be fed.
            first: (B,) the first column whose scores are wanted.
            count: scores wanted a row; those past a row's length are meaningless.

        Returns:
            (B, count, V), in the model's dtype.
        """
        ...

    def steps(self, tokens: Tensor, ends: Sequence[np.ndarray], live: np.ndarray) -> Iterator[Tensor]:
        """A forward up to ``ends[0]`` (B,), one up to ``ends[1]``, and so on; each time the last scores, (B, 1, V).

        Rows end one column further each time, or at the same one. Between two passes the caller writes into
        ``tokens``, and no other verb is used. What follows the last pass that was asked for was not fed.
        """
        ...

    def rewind(self, kept: np.ndarray, live: np.ndarray) -> None:
        """Forget every column from ``kept[b]`` (B,) on; rows that are not ``live`` keep nothing of worth."""
        ...

    def hand_over(self, columns: int) -> Any:
        """The cache as transformers keeps it; it holds the first ``columns`` of every row, nothing else."""
        ...

    def reach(self, limits: np.ndarray, lengths: np.ndarray, live: np.ndarray) -> np.ndarray:
        """(B,) ``limits``, lowered to what a row of ``lengths`` columns can have scored in the next forward."""
        ...
