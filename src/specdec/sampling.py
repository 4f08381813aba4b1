"""How tokens are drawn: greedily, by rejection with fresh noise, or with noise that draft and target share.

Each way answers two questions with the same noise: what does a draft guess from its scores, and what does
the target accept. The mathematics is in ``verify/``; here it only meets its random numbers. Knows no model
and no cache. Read next: ``noise.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InvalidInput
from specdec.noise import Noise, draw_seed
from specdec.state import State
from specdec.transfer import to_device, to_host
from specdec.verify import Rule, choose, highest, keyed_gumbel, match, row_keys, sample, verify

VERIFICATIONS = ("block", "token", "coupled")


class Sampling(Protocol):
    """``scores`` are processed; ``positions``, on the host, count new tokens of a row from 0."""

    keeps_logits: bool

    def guess(self, scores: Tensor, positions: np.ndarray) -> Tensor:
        """(B, 1) guesses of a draft with ``scores`` (B, 1, V) for the new tokens at ``positions`` (B,)."""
        ...

    def verify(
        self, scores: Tensor, tokens: Tensor, lengths: Tensor, logits: Tensor | None, positions: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """(accepted (B,), next token (B,)) for the target's ``scores`` (B, K + 1, V).

        Args:
            scores: row i judges guess i and, if it is the last, draws the bonus.
            tokens: (B, K) guesses.
            lengths: (B,) guesses submitted.
            logits: (B, K, V) what the guesses were drawn from, or None.
            positions: (B,) index of the new token that row 0 draws.
        """
        ...


class Greedy:
    """One-hot rows held as an index: a guess is kept while it is the target's own choice."""

    keeps_logits = False

    def guess(self, scores: Tensor, positions: np.ndarray) -> Tensor:
        """See ``Sampling.guess``."""
        return highest(scores)

    def verify(
        self, scores: Tensor, tokens: Tensor, lengths: Tensor, logits: Tensor | None, positions: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """See ``Sampling.verify``."""
        return match(choose(scores), tokens, lengths)


class Rejection:
    """Speculative sampling (2211.17192, 2302.01318) or block verification (2403.10444), fresh noise."""

    keeps_logits = True

    def __init__(self, rule: Rule, seed: int, device: torch.device) -> None:
        """Use ``rule`` ("token" or "block"); the draft's noise is a stream of its own."""
        self._rule = rule
        self._noise = Noise(seed, device)
        self._draft_noise = Noise(seed ^ 0x5DEECE66D, device)

    def guess(self, scores: Tensor, positions: np.ndarray) -> Tensor:
        """See ``Sampling.guess``."""
        return sample(scores, self._draft_noise.uniforms(*scores.shape[:2]))

    def verify(
        self, scores: Tensor, tokens: Tensor, lengths: Tensor, logits: Tensor | None, positions: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """See ``Sampling.verify``."""
        uniforms = self._noise.uniforms(*scores.shape[:2])
        return verify(scores, tokens, lengths, logits, rule=self._rule, uniforms=uniforms)


class Coupled:
    """Shared noise (2408.07978): the text is a function of target, seed and prompt, whatever the draft."""

    keeps_logits = False

    def __init__(self, keys: Tensor) -> None:
        """Use one key (B,) a row; see ``verify/coupled.py``."""
        self._keys = keys

    def guess(self, scores: Tensor, positions: np.ndarray) -> Tensor:
        """See ``Sampling.guess``."""
        return highest(scores.double() + self._gumbel(positions[:, None], scores.shape[-1]))

    def verify(
        self, scores: Tensor, tokens: Tensor, lengths: Tensor, logits: Tensor | None, positions: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """See ``Sampling.verify``."""
        noise = self._gumbel(positions[:, None] + np.arange(scores.shape[1]), scores.shape[-1])
        # log p and the scores differ by a constant per row, which no argmax sees
        return match(choose(scores.double(), noise), tokens, lengths)

    def _gumbel(self, positions: np.ndarray, vocabulary: int) -> Tensor:
        """(B, N, V) noise for the new tokens at ``positions`` (B, N)."""
        where = to_device(positions, self._keys.device)
        return keyed_gumbel(self._keys, where, vocabulary, torch.float64)


def sampling_for(
    verification: str,
    do_sample: bool,
    seed: int | list[int] | None,
    device: torch.device,
    prompts: Callable[[], list[list[int]]],
) -> Sampling:
    """The way to draw in one call: greedy draws no random number; without a seed, one is drawn.

    Args:
        verification: one of ``VERIFICATIONS``.
        do_sample: False is greedy, whatever the verification.
        seed: one; with "coupled" also one a row.
        device: where the noise is made.
        prompts: tells what each row was asked, as numbers, without padding: part of the keys of shared noise.
    """
    if not do_sample:
        return Greedy()
    if verification == "coupled":
        seed = draw_seed() if seed is None else seed
        asked = prompts()
        seeds = seed if isinstance(seed, list) else [seed] * len(asked)
        if len(seeds) != len(asked):
            raise InvalidInput(f"{len(seeds)} seeds for {len(asked)} rows; give one seed a row")
        return Coupled(torch.tensor(row_keys(seeds, asked), dtype=torch.int64, device=device))
    if isinstance(seed, list):
        raise InvalidInput("one seed a row needs verification='coupled'; give a single seed")
    rule: Rule = "token" if verification == "token" else "block"
    return Rejection(rule, draw_seed() if seed is None else seed, device)


def asked_of(state: State, inputs: dict[str, Any]) -> list[list[int]]:
    """What each row was asked, as numbers: its ids without padding, and a digest of anything beside them.

    An encoder-decoder model is asked through its encoder, a multimodal one through pictures and sounds too.
    """
    rows = zip(state.host_tokens, state.starts, strict=True)
    prompts = [row[start : state.prompt_length].tolist() for row, start in rows]
    mask = inputs.get("attention_mask")
    for name in sorted(inputs):
        value = inputs[name]
        beside = name != "decoder_input_ids" and "mask" not in name and "position" not in name
        if not beside or value.shape[:1] != (state.batch,):
            continue
        for row, prompt in enumerate(prompts):
            part = value[row]
            # ids, their types, their embeddings; not what happens to have as many columns
            if mask is not None and mask.shape == value.shape[:2] and value.ndim <= 3:
                part = part[mask[row].bool()]
            content = to_host(part.contiguous().flatten().view(torch.uint8)).tobytes()
            prompt.append(int.from_bytes(blake2b(content, digest_size=7).digest(), "big"))
    return prompts
