"""A draft model with another tokenizer (Timor et al. 2502.05202: token-level intersection, string-level match).

The committed text is said again in the draft's ids (``rewriting.py``), compared with what the draft has been
fed, forgotten from the first difference on and the rest fed; rows have lengths of their own there. Then one of
two ways to guess:

* "tokens" (algorithm 4, TLI): the draft's scores are cut to the ids that both vocabularies have, moved to the
  target's ids and processed like the target's; guesses are drawn from just these rows, which are what the
  verifier gets. Exact whatever the pairs are, as long as drawn and recorded rows are one.
* "strings" (algorithm 2, SLEM): the draft writes its likeliest text freely; what the target's tokenizer makes
  of it is the guess, without probabilities, which is exact for any guess.

Neither way looks at the running round. Knows nothing of verification. Read next: ``draft_model.py``.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidInput
from specdec.proposers import Call, Proposer
from specdec.proposers.draft_model import _chance, _prepare, _sound, embedded
from specdec.proposers.rewriting import LOOK_BEHIND, DraftRow, Translator
from specdec.proposers.vocabulary import Shared, Vocabulary, shared_ids
from specdec.records import Proposal, Round
from specdec.sampling import Greedy
from specdec.scorer import Scorer
from specdec.state import State, to_host

METHODS = ("auto", "tokens", "strings")
# below this part of the draft's vocabulary its rows lose too much by being cut to the shared ids
ENOUGH = 0.5
# below this part of the draft's vocabulary the user is told that there is little to gain
POOR = 0.1
# a row stops where less than this of the draft's own distribution is on shared ids
LEAST_MASS = 0.05


class TranslatedDraft:
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
    ) -> None:
        """Draft with ``model``.

        Args:
            model: the draft, a decoder-only model.
            tokenizer: the target's.
            draft_tokenizer: the draft's.
            method: "tokens" guesses shared ids with their probabilities, "strings" text without; "auto" takes
                tokens for sampling if they are at least half of the draft's vocabulary, else strings.
            confidence: a row stops after a guess whose own chance is below this; as for ``DraftModel``.
            layout: forces one, for tests.
        """
        if method not in METHODS:
            raise InvalidInput(f"method={method!r} does not exist; use one of {METHODS}")
        if confidence is not None and not 0 <= confidence <= 1:
            raise InvalidInput(f"confidence={confidence!r}; give a probability, or None")
        self.model = model
        self.shared = shared_ids(tokenizer, draft_tokenizer)
        self._translator = Translator(Vocabulary(tokenizer), Vocabulary(draft_tokenizer), self.shared)
        if self.shared.of_draft < POOR:
            warnings.warn(
                f"the vocabularies of draft and target have little in common ({self.shared.of_draft:.1%} of the "
                "draft's tokens), so few guesses may be kept; look at stats.acceptance_rate",
                stacklevel=2,
            )
        self._method = method
        self._confidence = confidence
        self._layout = layout

    def choose(self, *, greedy: bool) -> tuple[str, str]:
        """The method for a call, "tokens" or "strings", and why."""
        if self._method != "auto":
            return self._method, "asked for"
        if greedy:
            return "strings", "greedy text has no use for probabilities"
        if self.shared.of_draft >= ENOUGH:
            return "tokens", "sampling, with enough ids in common"
        return "strings", "too few ids in common"

    def begin(self, call: Call) -> Proposer:
        """A drafting run for one call."""
        confidence = self._confidence
        if confidence is None:
            confidence = 0.4 if self.model.device.type == "cpu" else 0.0
        past = _Past(self.model, call, self._translator, self._layout)
        method, reason = self.choose(greedy=isinstance(call.sampling, Greedy))
        described = f"{method}: {reason}; {self.shared.of_draft:.0%} of the draft's ids are shared"
        if method == "tokens":
            return _Tokens(past, call, self.shared, confidence, described)
        return _Strings(past, self._translator, confidence, described)


class _Past:
    """The draft's cache, and the committed text in its ids, during one call.

    Attributes:
        lengths: (B,) the committed text in columns of the draft, padding included.
    """

    def __init__(self, model: Any, call: Call, translator: Translator, layout: str) -> None:
        self._model, self._call, self._translator, self._layout = model, call, translator, layout
        self.device = model.device
        self._embeds = embedded(model)
        self._scorer: Scorer | None = None
        self._failed = False
        self._rows: list[DraftRow] = []
        self.lengths = np.zeros(0, dtype=np.int64)
        self._guesses: np.ndarray | None = None  # (B, K) the draft's ids behind ``lengths``

    @property
    def forwards(self) -> int:
        return self._scorer.forwards if self._scorer is not None else 0

    @property
    def layout(self) -> str:
        return self._scorer.layout.name if self._scorer is not None else ""

    def follow(self, state: State, limits: np.ndarray) -> np.ndarray:
        """Bring the draft to the committed text; (B,) guesses that each row can make, at most ``limits``."""
        none = np.zeros_like(limits)
        if self._failed or not limits.any():
            return none
        if self._scorer is None:
            try:
                self._open(state)
            except (TypeError, ValueError, IndexError) as error:
                self._failed, self._scorer = True, None
                warnings.warn(f"specdec drafts nothing with {type(self._model).__name__}: {error}", stacklevel=2)
                return none
        self._translate(state)
        usable = self._active & np.array([row.known for row in self._rows])
        return np.where(usable, np.minimum(limits, self._longest - self.lengths), 0).clip(min=0)

    def scores(self, step: int) -> Tensor:
        """(B, V of the draft) scores for guess ``step`` of every row."""
        assert self._scorer is not None
        lengths = np.minimum(self.lengths + step, self._longest)
        if step:
            self._scorer.hold(self._active)
        return self._scorer.score(self._tokens, lengths, lengths - 1, 1)[:, 0]

    def write(self, ids: Tensor, step: int) -> None:
        """Put the draft's guess ``step``, ids (B,), behind the text."""
        columns = torch.from_numpy(self.lengths + step).to(self.device)[:, None]
        self._tokens.scatter_(1, columns, ids.to(self.device).clamp(0, self._embeds - 1)[:, None])

    def remember(self, guesses: np.ndarray) -> None:
        """(B, K) the draft's guesses as they were written, for the next round to compare with."""
        self._guesses = guesses.clip(0, self._embeds - 1)

    def _open(self, state: State) -> None:
        """Feed the prompt in the draft's ids."""
        rows = [state.host_tokens[b, state.starts[b] : state.prompt_length] for b in range(state.batch)]
        prompts, unfinished = self._translator.prompts(rows)
        width = max(map(len, prompts))
        # the same text has more tokens here or fewer; a row that goes past the limit guesses no more
        new = state.max_length - state.prompt_length
        text = self._model.config.get_text_config(decoder=True)
        longest = getattr(text, "max_position_embeddings", None) or np.iinfo(np.int32).max
        self._longest = min(int(longest), width + 2 * new + 64)
        if width >= self._longest:
            raise ValueError(f"the prompt has {width} of its tokens, more than it can take")
        most = state.tokens.shape[1] - state.max_length
        ids = np.zeros((state.batch, self._longest + most), dtype=np.int64)
        mask = np.zeros((state.batch, width), dtype=np.int64)
        for b, prompt in enumerate(prompts):
            ids[b, width - len(prompt) : width] = prompt
            mask[b, width - len(prompt) :] = 1
        ids = ids.clip(0, self._embeds - 1)
        prompt_ids = torch.from_numpy(ids[:, :width].copy()).to(self.device)
        inputs = {"attention_mask": torch.from_numpy(mask).to(self.device)}
        call = replace(self._call, target=None, prompt=prompt_ids, inputs=inputs, max_length=self._longest + 1)
        prepared, kwargs, config, inner = _prepare(self._model, call, self._embeds)
        if prepared.shape != prompt_ids.shape:
            raise ValueError("its generate() changes the prompt")
        scorer = Scorer(inner, kwargs, config, max_length=call.max_length, layout=self._layout, is_draft=True)
        scorer.prefill(prepared, speculate=True)
        self._scorer = scorer
        self._host, self._tokens = ids, torch.from_numpy(ids.copy()).to(self.device)
        self._starts = width - mask.sum(axis=1)
        self._rows = [DraftRow(width, rest) for rest in unfinished]
        self.lengths = np.full(state.batch, width, dtype=np.int64)
        self._translated = np.full(state.batch, state.prompt_length, dtype=np.int64)
        self._active = np.ones(state.batch, dtype=bool)

    def _translate(self, state: State) -> None:
        """Say what was committed since in the draft's ids; forget what it was fed and does not fit."""
        assert self._scorer is not None
        self._active = self._active & state.live
        active = np.flatnonzero(self._active)
        said = []
        for b in active:
            new = state.host_tokens[b, self._translated[b] : state.lengths[b]]
            said.append(self._rows[b].add(self._translator.bytes_of(new)))
        self._translated = np.where(self._active, state.lengths, self._translated)
        kept = self._scorer.kept.copy()
        guesses = np.zeros((state.batch, 0), dtype=np.int64) if self._guesses is None else self._guesses
        self._guesses = None
        for b, ids in zip(active, self._translator.draft.encode(said), strict=True):
            row = self._rows[b]
            start = row.settled
            head = row.encoded(ids, self._translator)
            fed = np.concatenate([self._host[b, start : self.lengths[b]], guesses[b]])
            now = np.array([*head, *row.tail], dtype=np.int64).clip(0, self._embeds - 1)
            if start + len(now) > self._longest:
                self._active[b] = False
                continue
            self._host[b, start : start + len(now)] = now
            self.lengths[b] = start + len(now)
            # the last id is always fed again: its scores are what the next guess needs
            kept[b] = min(kept[b], start + min(_common(fed, now), len(now) - 1))
        if self._active.any():
            # rows that take no part any more must not hold up or stretch the others
            shortest = int(self.lengths[self._active].min())
            self.lengths = np.where(self._active, self.lengths, np.minimum(self.lengths, shortest))
        kept = np.minimum(kept, self.lengths - 1)
        low, high = int(kept.min()), int(self.lengths.max())
        self._tokens[:, low:high] = torch.from_numpy(self._host[:, low:high]).to(self.device)
        settled = np.array([row.settled for row in self._rows])
        self._scorer.rollback(self._tokens, kept, self._active, np.minimum(kept, settled))


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many entries two arrays (n,) and (m,) have in common from their beginning on."""
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size


class _Tokens:
    """Guesses shared ids, drawn from the draft's scores cut to them."""

    def __init__(self, past: _Past, call: Call, shared: Shared, confidence: float, drafting: str) -> None:
        self._past, self._call, self._shared = past, call, shared
        self._confidence = confidence
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
            scores, mass = self._moved(self._past.scores(step).to(state.device), state.vocabulary)
            lengths = state.lengths + step
            scores = self._call.processing.draft(scores, history, lengths, state.vocabulary)
            guess = sampling.guess(scores, state.device_lengths - state.prompt_length + step)
            scores, guess = _sound(scores, guess)
            guesses.append(guess)
            if sampling.keeps_logits:
                rows.append(scores)
            if self._confidence > 0:
                # settled before the draw: where hardly any of the draft's mass is shared, nothing is submitted
                limits = np.where((mass >= LEAST_MASS).cpu().numpy(), limits, np.minimum(limits, step))
                sure = (_chance(scores, guess) * mass >= self._confidence).cpu().numpy()
                limits = np.where(sure, limits, np.minimum(limits, step + 1))
            if step + 1 >= int(limits.max()):
                break
            if not step:
                history = state.tokens.clone()
            history.scatter_(1, (state.device_lengths + step)[:, None], guess[:, None])
            self._past.write(self._to_draft[guess], step)
        width = int(limits.max())
        if width == 0:
            return Proposal.empty(state.batch, state.device)
        logits = torch.stack(rows, dim=1)[:, :width] if rows else None
        self._proposal = Proposal(torch.stack(guesses, dim=1)[:, :width], limits, logits)
        return self._proposal

    def _moved(self, logits: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """The draft's scores (B, V of the draft) at the target's ids, (B, V), and the chance (B,) left on them."""
        if self._ids is None:
            self._map(logits.shape[1], vocabulary, logits.device)
        assert self._ids is not None
        theirs, ours = self._ids
        logits = logits.float()
        cut = logits.index_select(1, theirs)
        moved = logits.new_full((logits.shape[0], vocabulary), -torch.inf)
        moved.index_copy_(1, ours, cut)
        return moved, (cut.logsumexp(dim=1) - logits.logsumexp(dim=1)).exp()

    def _map(self, draft_size: int, vocabulary: int, device: torch.device) -> None:
        """The pairs on the device, without ids that a model has no scores for."""
        theirs, ours = self._shared.draft_ids, self._shared.target_ids
        real = (theirs < draft_size) & (ours < vocabulary)
        theirs, ours = theirs[real], ours[real]
        self._ids = (torch.from_numpy(theirs).to(device), torch.from_numpy(ours).to(device))
        self._host_to_draft = np.zeros(vocabulary, dtype=np.int64)
        self._host_to_draft[ours] = theirs
        self._to_draft = torch.from_numpy(self._host_to_draft).to(device)

    def _take(self, guesses: np.ndarray) -> None:
        self._proposal = None
        self._past.remember(self._host_to_draft[guesses])


class _Strings:
    """Writes text with the draft and guesses what the target's tokenizer makes of it."""

    def __init__(self, past: _Past, translator: Translator, confidence: float, drafting: str) -> None:
        self._past, self._translator, self._confidence = past, translator, confidence
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
        lengths = np.minimum([len(ids) for ids in guesses], limits)
        tokens = np.zeros((state.batch, int(lengths.max(initial=0))), dtype=np.int64)
        for row, ids in enumerate(guesses):
            tokens[row, : lengths[row]] = ids[: lengths[row]]
        return Proposal(torch.from_numpy(tokens).to(state.device), lengths)

    def _write(self, limits: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The draft's likeliest ids (B, K), and how many of each row (B,) count."""
        counts = limits.copy()
        steps: list[Tensor] = []
        for step in range(most):
            scores = self._past.scores(step).float()
            ids = scores.argmax(dim=1)
            steps.append(ids)
            if self._confidence > 0:
                sure = (_chance(scores, ids) >= self._confidence).cpu().numpy()
                counts = np.where(sure, counts, np.minimum(counts, step + 1))
                if step + 1 >= int(counts.max()):
                    break
            if step + 1 < most:
                self._past.write(ids, step)
        return to_host(torch.stack(steps, dim=1)), counts

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
            known = (at for at, one in enumerate(guesses[row]) if not 0 <= one < state.vocabulary)
            guesses[row] = guesses[row][: next(known, None)]
        return guesses
