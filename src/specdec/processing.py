"""Logits processors over several positions of ragged rows: each sees what plain ``generate()`` would show it.

transformers' processors take ``(B, L)`` ids of one length and ``(B, V)`` scores, with all rows where they may know
row indices and prompts. Five kinds (how each is called: ``positions.py``):

* scores only (temperature, top-k, top-p, ...): one call over all rows and positions;
* which tokens there are already, no matter where (repetition penalty), or only whether there are enough of them
  (``min_new_tokens``): one call as well;
* other pure functions of the history (bad words, n-grams, ...): one call for each distinct length;
* those whose state is a value (grammars, ``prefix_allowed_tokens_fn``): the state of every guess is worked out
  along the guesses before it (``stepwise.py``), for the draft's rows as well;
* anything else (guidance, SynthID, a user's own): may hold state, so it must see exactly the calls of plain
  ``generate()``. Then ``in_lockstep`` is True and the loop verifies one position after the other (``at``).

A processor of your own that is a pure function of each row's tokens and scores may say so with a class attribute
``specdec_pure = True``; it then belongs to the third kind and touches the draft's rows as well.
Knows no model, cache or rule. Read next: ``positions.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec import positions
from specdec.stepwise import Allowed, Seen, Stepwise, Walk
from specdec.warpers import warp

SCORES_ONLY = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.SuppressTokensLogitsProcessor,
)
ALONE = (  # look at each row by itself; other pure ones may know rows by their number
    hf.NoRepeatNGramLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.WatermarkLogitsProcessor,
)
# a length from which on they change nothing; below it they know nothing but that they are below it
FLOORS: dict[type, Callable[[Any], int]] = {
    hf.MinLengthLogitsProcessor: lambda processor: processor.min_length,
    hf.MinNewTokensLengthLogitsProcessor: lambda processor: (
        processor.prompt_length_to_skip + processor.min_new_tokens
    ),
}
PURE = (
    *ALONE,
    *FLOORS,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
)
BIASES = (hf.SequenceBiasLogitsProcessor, hf.NoBadWordsLogitsProcessor)


class Processing:
    """The processors of a call, in their order.

    Attributes:
        in_lockstep: one of them may hold state, so that the loop must go position by position.
        forbids: one of them looks at the text, and so may forbid everything behind an impossible one.
        host_copies: copies from the device, made for processors whose state follows the guesses.
    """

    def __init__(self, processors: Any, prompt: Tensor | None = None, ends: frozenset[int] = frozenset()) -> None:
        """Sort ``processors`` (a ``LogitsProcessorList``) into the five kinds.

        Args:
            processors: as ``generate()`` prepared them.
            prompt: (B, P) ids of the call, for processors whose state begins behind it.
            ends: ids that end a row, behind which such processors are not asked.
        """
        self.host_copies = 0
        self._known: list[Any] = []
        self._in_order: list[Any] = []  # what lockstep calls
        self._walks: list[Walk] = []
        self.in_lockstep = False
        self.forbids = any(type(one) not in SCORES_ONLY for one in processors)
        for place, processor in enumerate(processors):
            stepwise = _stepwise(processor, processors[place + 1 :])
            self._in_order.append(LogitsProcessorList([processor]))
            if is_function(processor):
                self._known.append(processor)
            elif stepwise is not None and prompt is not None:
                self._walks.append(Walk(stepwise, prompt, ends))
                self._known.append(self._walks[-1])
                if stepwise is processor:
                    # what it remembers of the calls that plain generate() makes is of one text at a time
                    self._in_order[-1] = self._walks[-1]
            else:
                self.in_lockstep = True

    @property
    def foresees(self) -> bool:
        """Some processor's state may know what follows; see ``foresee``."""
        return any(walk.foresees for walk in self._walks)

    def target(
        self, logits: Tensor, tokens: Tensor, lengths: np.ndarray, guesses: np.ndarray, live: np.ndarray
    ) -> Tensor:
        """Processed scores (B, n, V), as plain ``generate()`` processes: in float32, where anything is processed.

        Args:
            logits: (B, n, V) of the target.
            tokens: (B, capacity) committed tokens and guesses.
            lengths: (B,) committed tokens; position i of row b sees ``lengths[b] + i`` tokens.
            guesses: (B,) of each row, 0 for ended ones; a token may be drawn at their positions and at one more.
            live: (B,) bool, rows that have not ended.
        """
        if not self._known:
            return _single(logits)
        return self._apply(logits.float(), tokens, lengths, guesses + live, final=True)

    def at(self, length: int, tokens: Tensor, scores: Tensor, live: np.ndarray) -> Tensor:
        """Processed scores (B, V) of one position in lockstep, by the calls of plain ``generate()``.

        Only those whose state is a value are asked as anywhere else, and not about ended rows.

        Args:
            length: tokens of every live row before the position, all of them final.
            tokens: (B, capacity) of them.
            scores: (B, V) of the target, in float32.
            live: (B,) bool, the rows that go on.
        """
        walks = any(isinstance(one, Walk) for one in self._in_order)
        lengths = np.full(len(tokens), length)
        seen = self._seen(tokens, lengths, live.astype(np.int64)) if walks else None
        # plain generate() shows whole tensors, of which a processor may take other views, or write into them
        ids, scores = tokens[:, :length].contiguous(), positions.copied(scores)
        for processor in self._in_order:
            if isinstance(processor, Walk):
                assert seen is not None
                scores = processor.process(scores[:, None], seen, final=True)[:, 0].contiguous()
            else:
                scores = positions.whole(processor(ids, scores), processor[0], scores)
        return scores

    def draft(
        self, logits: Tensor, tokens: Tensor, lengths: np.ndarray, vocabulary: int, live: np.ndarray | None = None
    ) -> Tensor:
        """The same for a draft's (B, n, V) rows, once, cut or filled up to the target's ``vocabulary``.

        Processors that may hold state are left out: their calls belong to the target. ``live`` (B,) are the rows
        that guess, None for all.
        """
        missing = vocabulary - logits.shape[-1]
        if missing < 0:
            logits = logits[..., :vocabulary]
        if missing > 0:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        if not self._known:
            return _single(logits)
        count = logits.shape[1]
        wanted = np.full(len(lengths), count) if live is None else count * live.astype(np.int64)
        return self._apply(logits.float(), tokens, lengths, wanted, final=False)

    def foresee(self, tokens: Tensor, lengths: np.ndarray, most: np.ndarray) -> list[list[int]]:
        """For each row up to ``most[b]`` ids that will very probably follow its first ``lengths[b]`` tokens.

        Said by a processor's state, without a model; an empty list where it has no idea.
        """
        found: list[list[int]] = [[] for _ in lengths]
        if self.foresees and most.any():
            seen = self._seen(tokens, lengths, (most > 0).astype(np.int64))
            for walk in self._walks:
                others = walk.foresee(seen, np.where([not ids for ids in found], most, 0))
                found = [ids or other for ids, other in zip(found, others, strict=True)]
        return found

    def _seen(self, tokens: Tensor, lengths: np.ndarray, wanted: np.ndarray) -> Seen:
        self.host_copies += 1
        return Seen(tokens, lengths, wanted, np.min([walk.columns() for walk in self._walks], axis=0))

    def _apply(
        self, scores: Tensor, tokens: Tensor, lengths: np.ndarray, wanted: np.ndarray, *, final: bool
    ) -> Tensor:
        batch, count, vocabulary = scores.shape
        seen = self._seen(tokens, lengths, wanted) if self._walks else None
        for processor in self._known:
            if isinstance(processor, Walk):
                assert seen is not None
                scores = processor.process(scores, seen, final=final)
            elif _reads_scores_only(processor):
                flat = scores.reshape(batch * count, vocabulary)
                ids = tokens[:, :1].repeat_interleave(count, dim=0)
                scores = warp(processor, ids, flat).view(batch, count, vocabulary)
            elif type(processor) in FLOORS:
                scores = positions.by_floor(processor, FLOORS[type(processor)](processor), scores, lengths)
            elif _asks_for_presence(processor, batch):
                bare = hf.RepetitionPenaltyLogitsProcessor(processor.penalty)
                ignored = processor.prompt_ignore_length
                scores = positions.by_presence(bare, 0 if ignored is None else ignored, scores, tokens, lengths)
            else:
                alone = type(processor) in ALONE
                scores = positions.by_length(processor, scores, tokens, lengths, wanted, alone=alone)
        return scores


def _single(logits: Tensor) -> Tensor:
    """``logits`` as float32 has them, which plain ``generate()`` compares: narrower numbers stay the same."""
    return logits.float() if logits.dtype == torch.float64 else logits


def is_function(processor: Any) -> bool:
    """What ``processor`` gives depends on ids and scores alone, so it may be called as often as anybody likes."""
    is_pure = type(processor) in PURE or bool(getattr(processor, "specdec_pure", False))
    return is_pure or _reads_scores_only(processor)


def _reads_scores_only(processor: Any) -> bool:
    if type(processor) in BIASES:
        return all(len(ids) == 1 for ids in processor.sequence_bias)
    return type(processor) in SCORES_ONLY


def _asks_for_presence(processor: Any, batch: int) -> bool:
    """Apart from what it ignores, the padding of each row as ``generate()`` has it."""
    if type(processor) is not hf.RepetitionPenaltyLogitsProcessor:
        return False
    ignored = processor.prompt_ignore_length
    return not isinstance(ignored, Tensor) or len(ignored) == batch  # otherwise it says itself what is wrong


def _stepwise(processor: Any, later: Any) -> Stepwise | None:
    """``processor`` as one whose state is a value, or None."""
    if isinstance(processor, Stepwise):
        return processor
    # a later processor that forces a token would lead to prefixes that the function never allowed
    if type(processor) is hf.PrefixConstrainedLogitsProcessor and all(map(_keeps_forbidden, later)):
        return Allowed(processor)
    return None


def _keeps_forbidden(processor: Any) -> bool:
    """What was -inf stays so; with ``remove_invalid_values`` it is a number, and may be all that others leave."""
    return type(processor) is not hf.InfNanRemoveLogitsProcessor and (
        _reads_scores_only(processor) or isinstance(processor, Stepwise)
    )
