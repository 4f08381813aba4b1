"""The rounds: guess, score, verify, commit, forget. The heart of the library; the rest serves these lines.

A *proposer* guesses the next few tokens of every row. The *target* scores all guesses in one forward pass.
``verify`` keeps what may be kept and draws one more token, so that what comes out is distributed exactly as
if the target had written every token itself. The cache forgets what was not kept. Repeat.

The loop is a generator of ``Round``: streaming, statistics, early stop and tests are its consumers. Apart from
the round's one copy (``State.commit``) nothing in it waits for the device.
Knows no option of ``generate()``. Read next: ``records.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from specdec.clock import clock
from specdec.length import DraftLength
from specdec.lockstep import verify_in_lockstep
from specdec.processing import Processing
from specdec.proposers import Proposer, checked
from specdec.records import Proposal, Round, Stats
from specdec.sampling import Sampling
from specdec.scorer import Scorer
from specdec.state import State, span
from specdec.transfer import to_device


def decode(
    state: State,
    target: Scorer,
    proposer: Proposer,
    length: DraftLength,
    processing: Processing,
    sampling: Sampling,
    stats: Stats,
    *,
    keep_logits: bool = False,
    keep_states: tuple[str, ...] = (),
) -> Iterator[Round]:
    """Yield rounds until every row has ended. Rows may also be ended from outside, between rounds."""
    observe: Callable[[Round], None] | None = getattr(proposer, "observe", None)
    proposal = Proposal.empty(state.batch, state.device)
    began = clock()
    # where the text depends on the number of guesses, a seed must not meet another one on a model's first call
    logits = target.prefill(state.prompt, speculate=length.most > 0, at_once=sampling.keeps_logits)
    state.vocabulary = int(logits.shape[-1])
    stats.seconds_scoring += clock() - began
    start = clock()
    while True:
        accepted, next_token, scores = _verify(logits, state, proposal, processing, sampling)
        round_ = state.commit(
            proposal, accepted, next_token, scores, logits if keep_logits else None, target.states(keep_states)
        )
        stats.count(round_)
        if observe is not None:
            observe(round_)
        if stats.rounds == 1:
            length.fed(clock() - began, state.batch, max(state.prompt_length, 1))
        else:
            length.observe(round_, clock() - began)
        stats.seconds_verifying += clock() - start
        yield round_
        start = clock()
        if not target.settled and state.room().any():
            target.decide(state.tokens)
        began = clock()
        stats.seconds_scoring += began - start
        # all but the last committed token were fed and are final
        target.rollback(state.tokens, state.lengths - 1, state.live)
        if state.done:
            return
        limits = _limits(state, target, length, processing)
        asked = clock()
        proposal = checked(proposer.propose(state, limits), state, limits)
        drafted = clock()
        state.write_guesses(proposal)
        logits = target.score(
            state.tokens,
            state.lengths + proposal.lengths,
            state.lengths - 1,
            proposal.tokens.shape[1] + 1,
        )
        stats.seconds_drafting += drafted - asked
        start = clock()
        stats.seconds_scoring += start - drafted + asked - began


def _verify(
    logits: Tensor, state: State, proposal: Proposal, processing: Processing, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """(accepted, next token, processed scores) for the target's ``logits`` (B, K + 1, V)."""
    if processing.in_lockstep:
        return verify_in_lockstep(logits.float(), state, proposal, processing, sampling)
    scores = processing.target(logits, state.tokens, state.lengths, proposal.lengths, state.live)
    void = _void(scores) if processing.forbids else None
    if void is not None:
        scores = scores.masked_fill(void[..., None], 0)
    submitted = to_device(proposal.lengths, state.device)
    positions = state.lengths - state.prompt_length
    accepted, next_token = sampling.verify(scores, proposal.tokens, submitted, proposal.logits, positions)
    if void is not None:
        accepted, next_token = _up_to(void, proposal.tokens, accepted, next_token)
    return accepted, next_token, scores


def _void(scores: Tensor) -> Tensor | None:
    """(B, K + 1) bool, places behind a guess where processors have left ``scores`` (B, K + 1, V) no law.

    That is an error only if the text comes there and nothing ends it before.
    """
    if scores.shape[1] == 1:
        return None
    void = ~(scores.amax(dim=-1) > -torch.inf)
    void[:, 0] = False
    return None if scores.device.type == "cpu" and not void.any() else void


def _up_to(void: Tensor, guesses: Tensor, accepted: Tensor, next_token: Tensor) -> tuple[Tensor, Tensor]:
    """(accepted, next token) of a text that stops before the first ``void`` place, where the next round begins."""
    first = torch.where(void.any(dim=1), void.int().argmax(dim=1), void.shape[1])
    last = (first - 1).clamp(max=guesses.shape[1] - 1)  # the guess before it comes as the token drawn
    comes = accepted >= first
    return torch.where(comes, last, accepted), torch.where(
        comes, guesses.gather(1, last[:, None])[:, 0], next_token
    )


def _limits(state: State, target: Scorer, length: DraftLength, processing: Processing) -> np.ndarray:
    """(B,) guesses that each row may submit: the draft length, cut to the room left and the layout's reach."""
    limits: np.ndarray = target.reach(state.room(), state.lengths, state.live)
    if processing.in_lockstep:
        limits = np.where(state.live, limits[state.live].min(), 0)
    drafted: int | np.ndarray = length.next(span(limits)[1])
    if processing.foresees and drafted < length.most:
        known = processing.foresee(state.tokens, state.lengths, np.minimum(limits, length.most))
        runs = np.array([len(ids) for ids in known], dtype=np.int64)
        drafted = np.maximum(drafted, np.minimum(runs, length.free(runs[state.live])))
    limits = np.minimum(limits, drafted)
    return limits
