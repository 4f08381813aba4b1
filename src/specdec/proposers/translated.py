"""A draft model with another tokenizer (Timor et al. 2502.05202: token-level intersection, string-level match).

The draft follows the committed text in its own ids (``draft_past.py``). Two ways to guess:

* "tokens" (algorithm 4, TLI): the draft's scores are cut to the ids that both vocabularies have, moved to the
  target's ids and processed like the target's; guesses are drawn from just these rows, which are what the
  verifier gets. Exact whatever the pairs are, as long as drawn and recorded rows are one.
* "strings" (algorithm 2, SLEM): the draft writes its likeliest text freely; what the target's tokenizer makes
  of it is the guess, without probabilities, which is exact for any guess.

Neither way looks at the running round. Knows nothing of verification. Read next: ``../length/__init__.py``.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidInput
from specdec.layouts.compiled import compiled_steps
from specdec.proposers import Call, Proposer, existing
from specdec.proposers.draft_past import DraftPast
from specdec.proposers.drafting import Sure, asked
from specdec.proposers.drawn import chance_of, sound
from specdec.proposers.past import model_of
from specdec.proposers.rewriting import LOOK_BEHIND, Translator
from specdec.proposers.vocabulary import Shared, Vocabulary, shared_ids
from specdec.records import Proposal, Round
from specdec.sampling import Greedy
from specdec.state import State, put
from specdec.transfer import to_device, to_host
from specdec.weights.adapters import device_of

METHODS = ("auto", "tokens", "strings")
# below this part of the smaller vocabulary the draft's rows lose too much by being cut to the shared ids
ENOUGH = 0.5
# below this part of the smaller vocabulary the user is told that there is little to gain
POOR = 0.1
# a row stops where less than this of the draft's own distribution is on shared ids
LEAST_MASS = 0.05


class TranslatedDraft(Sure):
    """Any Hugging Face causal LM as a draft for a target with another tokenizer.

    Attributes:
        shared: the ids that stand for the same in both vocabularies, and which fraction they are.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        draft_tokenizer: Any,
        *,
        method: str = "auto",
        confidence: float | None = None,
        layout: str = "auto",
        compile: bool = False,
    ) -> None:
        """Draft with ``model``.

        Args:
            model: the draft, a decoder-only model.
            tokenizer: the target's.
            draft_tokenizer: the draft's.
            method: "tokens" guesses shared ids with their probabilities, "strings" text without; "auto" takes
                tokens for sampling if they are at least half of the smaller vocabulary, else strings.
            confidence: a row stops after a guess whose own chance is below this, 0 never stops, None leaves it to
                the call's draft length; as for ``DraftModel``.
            layout: forces one, for tests.
            compile: run the draft's steps as graphs; as for ``DraftModel``.
        """
        if method not in METHODS:
            raise InvalidInput(f"method={method!r} does not exist; use one of {METHODS}")
        super().__init__(confidence)
        self.model = model_of("TranslatedDraft", model)
        self.shared = shared_ids(tokenizer, draft_tokenizer)
        self._translator = Translator(Vocabulary(tokenizer), Vocabulary(draft_tokenizer), self.shared)
        self._part = max(self.shared.of_draft, self.shared.of_target)  # of the smaller vocabulary
        if self._part < POOR:
            warnings.warn(
                f"the vocabularies of draft and target have little in common ({self._part:.1%} of the smaller "
                "one), so few guesses may be kept; look at stats.acceptance_rate",
                stacklevel=2,
            )
        self._method = method
        self._layout = layout
        self._steps = compiled_steps(self.model) if compile else None

    def choose(self, *, greedy: bool) -> tuple[str, str]:
        """The method for a call, "tokens" or "strings", and why."""
        if self._method != "auto":
            return self._method, "asked for"
        if greedy:
            return "strings", "greedy text has no use for probabilities"
        if self._part >= ENOUGH:
            return "tokens", "sampling, with enough ids in common"
        return "strings", "too few ids in common"

    def begin(self, call: Call) -> Proposer:
        """A drafting run for one call."""
        past = DraftPast(self.model, call, self._translator, self._layout, self._steps)
        method, reason = self.choose(greedy=isinstance(call.sampling, Greedy))
        described = f"{method}: {reason}; {self._part:.0%} of the smaller vocabulary is shared"
        if method == "tokens":
            stop = _Stop(call, self._confidence, call.prompt.device)
            return _Tokens(past, call, self.shared, stop, described)
        stop = _Stop(call, self._confidence, device_of(self.model, call.prompt.device))
        return _Strings(past, self._translator, stop, described)


class _Stop:
    """When a row makes no more guesses in a round; asks nothing where chances are on a ``device`` to wait for.

    Attributes:
        reads: numbers on the device may be looked at.
        looks: the chances of guesses are.
    """

    def __init__(self, call: Call, confidence: float | None, device: torch.device) -> None:
        self._confidence = confidence or 0.0
        self._goes_on = asked(call, confidence, device)
        self.looks = bool(self._confidence) or self._goes_on is not None
        self.reads = self.looks or (confidence is None and device.type == "cpu")

    def after(self, limits: np.ndarray, step: int, chance: Tensor) -> np.ndarray:
        """(B,) limits, lowered where the guess at ``step``, of ``chance`` (B, 1) by the draft, is the last."""
        if self._goes_on is None:
            sure = (chance >= self._confidence).cpu().numpy()[:, 0]
            return np.where(sure, limits, np.minimum(limits, step + 1))
        told = np.where(limits > step, chance.double().numpy()[:, 0], 0.0)
        return limits if self._goes_on(told) else np.minimum(limits, step + 1)


class _Tokens:
    """Guesses shared ids, drawn from the draft's scores cut to them."""

    def __init__(self, past: DraftPast, call: Call, shared: Shared, stop: _Stop, drafting: str) -> None:
        self._past, self._call, self._shared = past, call, shared
        self._stop = stop
        self.drafting = drafting
        self._ids: tuple[Tensor, Tensor] | None = None
        self._proposal: Proposal | None = None

    @property
    def forwards(self) -> int:
        """Forward passes of the draft model."""
        return self._past.forwards

    @property
    def layout(self) -> str:
        """The draft's layout."""
        return self._past.layout

    def observe(self, round_: Round) -> None:
        """The guesses as the host saw them: no copy of our own is needed then."""
        if round_.proposal is self._proposal:
            self._take(round_.drafted)

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        if self._proposal is not None:
            self._take(to_host(self._proposal.tokens))
        limits = self._past.follow(state, limits)
        most = int(limits.max(initial=0))
        if most == 0:
            return Proposal.empty(state.batch, state.device)
        sampling, history = self._call.sampling, state.tokens
        guesses: list[Tensor] = []
        rows: list[Tensor] = []
        for step in range(most):
            logits = self._past.scores(step).to(state.device).float()
            scores, cut = self._moved(logits, state.vocabulary)
            lengths = state.lengths + step
            scores = self._call.processing.draft(scores, history, lengths, state.vocabulary, limits > step)
            guess = sampling.guess(scores, state.lengths - state.prompt_length + step)
            if sampling.keeps_logits:
                rows.append(sound(scores, guess < 0))
            guess = guess.clamp(min=0)
            guesses.append(guess)
            if self._stop.reads:
                # settled before the draw: where hardly any of the draft's mass is shared, nothing is submitted
                mass = (cut.logsumexp(dim=-1) - logits.logsumexp(dim=-1)).exp()
                limits = np.where((mass >= LEAST_MASS).cpu().numpy()[:, 0], limits, np.minimum(limits, step))
            if self._stop.looks:
                limits = self._stop.after(limits, step, chance_of(scores, guess) * mass)
            if step + 1 >= int(limits.max()):
                break
            if not step:
                history = state.tokens.clone()
            put(history, state.lengths + step, guess)
            self._past.write(self._to_draft[guess], step)
        width = int(limits.max())
        if width == 0:
            return Proposal.empty(state.batch, state.device)
        drawn = torch.cat(rows, dim=1)[:, :width] if rows else None
        self._proposal = Proposal(torch.cat(guesses, dim=1)[:, :width], limits, drawn)
        return self._proposal

    def _moved(self, logits: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """The draft's scores (B, 1, V of the draft) at the target's ids, (B, 1, V), and those of shared ids."""
        if self._ids is None:
            self._map(logits.shape[-1], vocabulary, logits.device)
        assert self._ids is not None
        theirs, ours = self._ids
        cut = logits.index_select(-1, theirs)
        moved = logits.new_full((*logits.shape[:-1], vocabulary), -torch.inf)
        moved.index_copy_(-1, ours, cut)
        return moved, cut

    def _map(self, draft_size: int, vocabulary: int, device: torch.device) -> None:
        """The pairs on the device, without ids that a model has no scores for."""
        theirs, ours = self._shared.draft_ids, self._shared.target_ids
        real = (theirs < draft_size) & (ours < vocabulary)
        theirs, ours = theirs[real], ours[real]
        self._ids = (to_device(theirs, device), to_device(ours, device))
        self._host_to_draft = np.zeros(vocabulary, dtype=np.int64)
        self._host_to_draft[ours] = theirs
        self._to_draft = to_device(self._host_to_draft, device)

    def _take(self, guesses: np.ndarray) -> None:
        self._proposal = None
        self._past.remember(np.where(guesses < 0, -1, self._host_to_draft[guesses]))


class _Strings:
    """Writes text with the draft and guesses what the target's tokenizer makes of it."""

    def __init__(self, past: DraftPast, translator: Translator, stop: _Stop, drafting: str) -> None:
        self._past, self._translator, self._stop = past, translator, stop
        self.drafting = drafting
        shared = translator.shared
        self._to_target = dict(zip(shared.draft_ids.tolist(), shared.target_ids.tolist(), strict=True))

    @property
    def forwards(self) -> int:
        """Forward passes of the draft model."""
        return self._past.forwards

    @property
    def layout(self) -> str:
        """The draft's layout."""
        return self._past.layout

    def propose(self, state: State, limits: np.ndarray) -> Proposal:
        """See ``Proposer.propose``."""
        limits = self._past.follow(state, limits)
        most = int(limits.max(initial=0))
        if most == 0:
            return Proposal.empty(state.batch, state.device)
        written, counts = self._write(limits, most)
        self._past.remember(written)
        guesses = self._guesses(state, [ids[:n].tolist() for ids, n in zip(written, counts, strict=True)])
        return Proposal.certain([ids[:n] for ids, n in zip(guesses, limits, strict=True)], state.device)

    def _write(self, limits: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The draft's likeliest ids (B, K), and how many of each row (B,) count."""
        counts = limits.copy()
        steps: list[Tensor] = []
        for step in range(most):
            scores = self._past.scores(step).float()
            ids = scores.argmax(dim=-1)
            steps.append(ids)
            if self._stop.looks:
                counts = self._stop.after(counts, step, chance_of(scores, ids))
                if step + 1 >= int(counts.max()):
                    break
            if step + 1 < most:
                self._past.write(ids, step)
        return to_host(torch.cat(steps, dim=1)), counts

    def _guesses(self, state: State, written: list[list[int]]) -> list[list[int]]:
        """What the target's tokenizer makes of the ids that the draft wrote in each row."""
        pieces = self._translator.draft.pieces
        texts, ends = [], []
        for ids in written:
            stop = next((at for at, one in enumerate(ids) if one in pieces.special), None)
            texts.append(pieces.join(ids[:stop]))
            ends.append(None if stop is None else self._to_target.get(ids[stop]))
        committed = [
            state.host_tokens[b, max(state.starts[b], state.lengths[b] - LOOK_BEHIND[0]) : state.lengths[b]]
            for b in range(state.batch)
        ]
        guesses = self._translator.follow(committed, texts)
        for row, end in enumerate(ends):
            if end is not None and (guesses[row] or not texts[row]):
                guesses[row].append(end)
            # the last guess might merge with what the draft would write next: it stays all the same, for a wrong
            # guess costs a column, and dropping it a guess in every round
            guesses[row] = existing(guesses[row], state.vocabulary)
        return guesses
