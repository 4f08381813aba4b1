"""Proposers: whatever guesses the next tokens. One method, one file; a draft model is one of them.

A proposer needs one method, ``propose``. Its guesses depend on the committed tokens and its own past, nothing
of the running round. It may have more, each asked for once when a call starts:

* ``begin(call)`` returns the proposer to use for this call, so that what a call needs (a cache, a table)
  lives as long as the call and nothing is left behind, exception or not;
* ``observe(round)`` sees every finished round. With an attribute ``wants_hidden = True`` there are the target's
  last hidden states as well, ``round.hidden``;
* ``foresees = True`` says that it asks ``call.processing.foresee`` itself; for others that is done before them
  (``jump.py``);
* ``finish(state, stats)`` is told when a call is over and has not failed: ``state`` holds what came out, stop
  conditions applied. For what should outlive the call, and for counts.

Read next: ``words.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import gt
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidInput, InvalidProposal
from specdec.length import DraftLength
from specdec.length.fixed import Fixed
from specdec.processing import Processing
from specdec.records import Proposal
from specdec.sampling import Sampling
from specdec.scorer import Scorer
from specdec.state import State, span

T = TypeVar("T")


@runtime_checkable
class Proposer(Protocol):
    """Guesses tokens for every row of a batch."""

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """Guess up to ``limits[b]`` (B,) tokens for row b; at most ``limits.max()`` columns wide.

        Args:
            state: the committed tokens, on the device (``state.tokens``) and on the host
                (``state.host_tokens``), row b's being the first ``state.lengths[b]``.
            limits: (B,) int64, 0 for rows that must not guess.
        """
        ...


@dataclass(frozen=True)
class Call:
    """What a proposer may want to know when a call of ``generate()`` starts.

    Attributes:
        target: the model that judges.
        prompt: (B, P) ids, left padding included.
        inputs: the user's model inputs beside the ids (attention mask, pictures, audio), one row a
            row of ``prompt``.
        max_length: columns that a row may reach.
        processing: the call's logits processors.
        sampling: how tokens are drawn.
        length: how many guesses a round; it wants to be asked (``begins``) before a draft model guesses, and told
            the chances of its guesses (``goes_on``). What it allows a row is in the limits already.
        tenants: whose text a row is, one for all rows or one each; None where nobody said.
        clock: tells the seconds; None where a seed promises one text, which must not depend on them.
        scorer: the target with its cache, for drafts that are part of it; it belongs to the loop. None in tests.
    """

    target: Any
    prompt: Tensor
    inputs: dict[str, Any]
    max_length: int
    processing: Processing
    sampling: Sampling
    length: DraftLength = field(default_factory=partial(Fixed, 4))
    tenants: list[str] | None = None
    clock: Callable[[], float] | None = None
    scorer: Scorer | None = None


def is_proposer(thing: Any) -> bool:
    """Whether ``thing`` guesses, or begins what does."""
    return hasattr(thing, "propose") or hasattr(thing, "begin")


def begun(proposer: Any, call: Call) -> Any:
    """What ``proposer`` gives for ``call``; one without a ``begin`` serves every call itself."""
    return proposer.begin(call) if hasattr(proposer, "begin") else proposer


def one_a_row(values: list[T], rows: int, name: str) -> list[T]:
    """``values`` with one for each of ``rows``; ``num_return_sequences`` makes several rows of one prompt.

    Raises:
        InvalidInput: the numbers do not fit.
    """
    if not values or rows % len(values):
        raise InvalidInput(f"{len(values)} of `{name}` for {rows} rows; give one a row")
    return [value for value in values for _ in range(rows // len(values))]


def checked(proposal: Proposal, state: State, limits: np.ndarray) -> Proposal:
    """A foreign proposal, looked at from outside: shapes, lengths, dtypes; its values are the verifier's."""
    if not isinstance(proposal, Proposal):
        raise InvalidProposal(
            f"a proposer returned a {type(proposal).__name__}; wanted is a specdec.Proposal, e.g. "
            "Proposal.empty(state.batch, state.device) when there is nothing to guess"
        )
    tokens, lengths, logits = proposal.tokens, np.asarray(proposal.lengths), proposal.logits
    if tokens.ndim != 2 or tokens.shape[0] != state.batch or tokens.dtype != torch.int64:
        raise InvalidProposal(
            f"a proposer returned tokens of shape {tuple(tokens.shape)} and {tokens.dtype}; "
            f"wanted is ({state.batch}, K) and torch.int64"
        )
    fits = lengths.shape == (state.batch,) and lengths.dtype.kind in "iu"
    lowest, highest = span(lengths) if fits else (-1, 0)
    if lowest < 0 or highest > tokens.shape[1]:
        raise InvalidProposal(
            f"a proposer returned lengths {lengths.tolist()} for tokens of shape {tuple(tokens.shape)}; "
            f"wanted are {state.batch} whole numbers from 0 to {tokens.shape[1]}"
        )
    if logits is not None and logits.shape != (*tokens.shape, state.vocabulary):
        raise InvalidProposal(
            f"a proposer returned logits of shape {tuple(logits.shape)} for tokens of shape "
            f"{tuple(tokens.shape)}; wanted is None, or {state.vocabulary} scores for each guess"
        )
    if lengths.dtype != np.int64:
        lengths = lengths.astype(np.int64)
    if any(map(gt, lengths.tolist(), limits.tolist())):
        lengths = np.minimum(lengths, limits)
    width = span(lengths)[1]
    if width < tokens.shape[1]:
        tokens = tokens[:, :width]
        logits = None if logits is None else logits[:, :width]
    if tokens is proposal.tokens and lengths is proposal.lengths:
        return proposal
    return Proposal(tokens, lengths, logits)


def existing(guess: list[int], vocabulary: int) -> list[int]:
    """The guesses before the first id that the target cannot write: prompts may hold some, as for pictures."""
    wrong = next((place for place, token in enumerate(guess) if not 0 <= token < vocabulary), len(guess))
    return guess[:wrong]


class Nothing:
    """Guesses nothing: plain decoding through the same loop, the reference for everything."""

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        return Proposal.empty(state.batch, state.device)
