"""Logits processors over several positions of ragged rows: each sees what plain ``generate()`` would show it.

transformers' processors take ``(B, L)`` ids of one length and ``(B, V)`` scores, with all rows, because some
know row indices and prompts. Three kinds:

* scores only (temperature, top-k, top-p, ...): one call over all rows and positions;
* pure functions of the history (penalties, lengths, bad words, ...): one call for each distinct length, with
  the whole batch; rows of other lengths are not used;
* anything else (guidance, SynthID, a user's own): may hold state, so it must see exactly the calls of plain
  ``generate()``. Then ``in_lockstep`` is True and the loop verifies one position after the other.

A processor of your own that is a pure function of each row's tokens and scores may say so with a class attribute
``specdec_pure = True``; it then belongs to the second kind and touches the draft's rows as well.
Knows no model, cache or rule. Read next: ``warpers.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

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
PURE = (
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.WatermarkLogitsProcessor,
)
BIASES = (hf.SequenceBiasLogitsProcessor, hf.NoBadWordsLogitsProcessor)


class Processing:
    """The processors of a call, in their order."""

    def __init__(self, processors: Any) -> None:
        """Sort ``processors`` (a ``LogitsProcessorList``) into the three kinds."""
        self.processors = processors
        self.in_lockstep = not all(_reads_scores_only(p) or _is_pure(p) for p in processors)
        self._known = [p for p in processors if _reads_scores_only(p) or _is_pure(p)]

    def target(self, logits: Tensor, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        """Processed scores (B, n, V) in float32, as plain ``generate()`` processes.

        Args:
            logits: (B, n, V) of the target.
            tokens: (B, capacity) committed tokens and guesses.
            lengths: (B,) tokens before position 0; position i of row b sees ``lengths[b] + i`` tokens.
        """
        return self._apply(logits.float(), tokens, lengths)

    def draft(self, logits: Tensor, tokens: Tensor, lengths: np.ndarray, vocabulary: int) -> Tensor:
        """The same for a draft's (B, V) rows, once, cut or filled up to the target's ``vocabulary``.

        Processors that may hold state are left out: their calls belong to the target.
        """
        logits = logits[:, :vocabulary].float()
        if not self._known and logits.shape[1] == vocabulary:
            return logits
        missing = vocabulary - logits.shape[1]
        if missing:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return self._apply(logits[:, None], tokens, lengths)[:, 0]

    def _apply(self, scores: Tensor, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        batch, count, vocabulary = scores.shape
        for processor in self._known:
            if _reads_scores_only(processor):
                flat = scores.reshape(batch * count, vocabulary)
                ids = tokens[:, :1].repeat_interleave(count, dim=0)
                scores = warp(processor, ids, flat).view(batch, count, vocabulary)
            else:
                scores = _by_length(processor, scores, tokens, lengths)
        return scores


def _by_length(processor: Any, scores: Tensor, tokens: Tensor, lengths: np.ndarray) -> Tensor:
    """One call for each distinct history length, with every row of the batch."""
    count = scores.shape[1]
    columns = lengths[:, None] + np.arange(count)
    if (columns == columns[0]).all():
        rows = [processor(tokens[:, : columns[0, i]], scores[:, i]) for i in range(count)]
        return torch.stack(rows, dim=1)
    out = scores.clone()
    for length in np.unique(columns):
        which, at = (torch.from_numpy(i).to(scores.device) for i in np.nonzero(columns == length))
        here = scores[:, 0].clone()
        here[which] = scores[which, at]
        out[which, at] = processor(tokens[:, :length], here)[which]
    return out


def _reads_scores_only(processor: Any) -> bool:
    if type(processor) in BIASES:
        return all(len(ids) == 1 for ids in processor.sequence_bias)
    return type(processor) in SCORES_ONLY


def _is_pure(processor: Any) -> bool:
    return type(processor) in PURE or bool(getattr(processor, "specdec_pure", False))
