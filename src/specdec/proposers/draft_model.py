"""A smaller model drafts, token by token, with its own cache (Leviathan et al. 2211.17192, Chen et al. 2302.01318).

The draft compares the committed tokens with what it has been fed, forgets from the first difference on and
feeds the rest; so "all guesses kept" (it has not seen its own last guess) and "rejected at i" are not two
cases. Its rows get the call's processors exactly once, and what is recorded as the guesses' distribution is
exactly what they were drawn from. Tokens that a grammar foresees are guessed without a pass, and fed with the
next one. Knows nothing of verification. Read next: ``prompt.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.layouts.compiled import compiled_steps
from specdec.proposers import Call, Nothing, Proposer
from specdec.proposers.drafting import Sure, draft
from specdec.proposers.foresight import Foresight
from specdec.proposers.past import Past, model_of, tried, warn_refused
from specdec.records import Proposal, Round
from specdec.state import State, in_common, put, put_on_host, span, widened
from specdec.transfer import to_host


class DraftModel(Sure):
    """Any Hugging Face causal LM (or encoder-decoder, for such a target) that shares the token ids."""

    def __init__(
        self, model: Any, *, confidence: float | None = None, layout: str = "auto", compile: bool = False
    ) -> None:
        """Draft with ``model``.

        Args:
            model: the draft.
            confidence: a row stops after a guess whose own chance is below this, in [0, 1]; 0 never stops.
                The guess is still submitted: whether a token is submitted is settled before it is drawn,
                so the output's law is untouched. None leaves it to the call's draft length, which is told the
                chances where reading a number costs nothing, on the CPU.
            layout: forces one, for tests.
            compile: run the model's steps as graphs, as ``SpeculativeGenerator(compile=True)`` does.
        """
        super().__init__(confidence)
        self.model = model_of("DraftModel", model)
        self._layout = layout
        self._steps = compiled_steps(self.model) if compile else None

    def begin(self, call: Call) -> Proposer:
        """A drafting run for one call: the draft's prompt is prepared by its own ``generate()``."""
        return self.open(call, _Run)

    def open(self, call: Call, run: Callable[[Past, Call, float | None], Proposer]) -> Proposer:
        """``run`` with the model's past and confidence; nothing, and a warning, where it cannot take the call."""
        encodes = self.model.config.is_encoder_decoder
        name = type(self.model).__name__
        if encodes and self.model.main_input_name not in call.inputs:
            warn_refused(name, f"the call gives no {self.model.main_input_name} for its encoder")
            return Nothing()
        made = tried(name, lambda: run(Past(self.model, call, self._layout, self._steps), call, self._confidence))
        return made or Nothing()


class _Run:
    """The draft's cache and tokens during one call."""

    foresees = True

    def __init__(self, past: Past, call: Call, confidence: float | None) -> None:
        self._past, self._call, self._confidence = past, call, confidence
        self._scorer = past.scorer
        self._on_cpu, self._apart = past.device.type == "cpu", past.device != call.prompt.device
        self._tokens = torch.zeros(0, 0, dtype=torch.int64)  # what the draft was fed, in its own ids
        self._fed = np.zeros(0)  # on the host; on a CPU the same memory, elsewhere -1 where others guessed
        self._settled = 0  # columns of them that nothing takes back
        self._drafted: tuple[np.ndarray, Proposal] | None = None  # lengths before, guesses
        self._observed: np.ndarray | None = None
        self._limits = np.zeros(0, dtype=np.int64)
        self._passes: Iterator[tuple[Tensor, np.ndarray]] = iter(())
        self._next = 0  # the guess whose scores come next from them
        self._translates = True  # the draft's ids are not the guesses as they are

    @property
    def forwards(self) -> int:
        """Forward passes of the draft model."""
        return self._scorer.forwards

    @property
    def layout(self) -> str:
        """The draft's layout."""
        return self._scorer.layout.name

    def observe(self, round_: Round) -> None:
        """Remember the guesses as the host saw them: no copy of our own is needed then."""
        if self._drafted is not None and round_.proposal is self._drafted[-1]:
            self._observed = round_.drafted

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        limits = self._past.limits(state, limits)
        if not span(limits)[1]:
            return Proposal.empty(state.batch, state.device)
        foresight = Foresight(self._call.processing, state, limits)
        begins = self._call.length.begins
        if foresight.covers(limits) or not begins(self._past.opening) or not self._past.feed_prompt():
            return foresight.proposal()
        # past the prompt, which may hold ids as for pictures, all are below the target's vocabulary
        self._translates = self._apart or state.vocabulary > self._past.embeds or not self._settled
        self._sync(state)
        self._limits, self._next = limits, -1
        proposal = draft(self, state, limits, self._call, self._confidence, foresight)
        self._drafted, self._observed = (state.lengths, proposal), None
        return proposal

    def next_scores(self, state: State, step: int, guessing: np.ndarray) -> Tensor:
        """See ``Steps``."""
        if step != self._next:  # the first, or guesses were foreseen since
            count = span(self._limits)[1] - step
            self._passes = self._scorer.steps(
                self._tokens, state.lengths + step, state.live, count, self._past.longest
            )
        self._next = step + 1
        logits, lengths = next(self._passes)
        if self._apart:
            logits = logits.to(state.device)
        return self._call.processing.draft(logits, self.history(state, step), lengths, state.vocabulary, guessing)

    def history(self, state: State, step: int) -> Tensor:
        """See ``Steps``."""
        if not step:
            return state.tokens
        return self._tokens.to(state.device) if self._apart else self._tokens

    def write(self, state: State, guess: Tensor, columns: np.ndarray) -> None:
        """See ``Steps``."""
        put(self._tokens, columns, self._past.known(guess) if self._translates else guess)

    def _sync(self, state: State) -> None:
        """Bring the draft's tokens to the committed ones; forget what it was fed and was not kept."""
        kept = self._scorer.kept
        old, upto = self._settled, span(state.lengths)[1]
        if not old:
            self._tokens = torch.zeros(state.tokens.shape, dtype=torch.int64, device=self._past.device)
            self._fed = self._tokens.numpy() if self._on_cpu else np.zeros(state.tokens.shape, dtype=np.int64)
        missing = state.tokens.shape[1] - self._tokens.shape[1]
        if missing > 0:
            self._tokens = widened(self._tokens, missing)
            self._fed = (self._tokens if self._on_cpu else widened(torch.from_numpy(self._fed), missing)).numpy()
        if self._drafted is not None:
            if not self._on_cpu:  # where it is, ``write`` has left the guesses
                before, proposal = self._drafted
                guesses = self._observed if self._observed is not None else to_host(proposal.tokens)
                put_on_host(self._fed, before, guesses)
            kept = np.minimum(kept, old + in_common(state.host_tokens[:, old:upto], self._fed[:, old:upto]))
        if self._translates or not self._on_cpu:
            self._tokens[:, old:upto] = self._past.known(state.tokens[:, old:upto])
        if not (self._translates and self._on_cpu):
            self._fed[:, old:upto] = state.host_tokens[:, old:upto]
        self._settled, self._drafted = state.foundation, None
        # the last committed token is always fed again: its scores are what the next guess needs
        self._scorer.rollback(self._tokens, np.minimum(kept, state.lengths - 1), state.live, state.settled - 1)
