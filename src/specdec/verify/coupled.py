"""Noise that draft and target share: a Gumbel variable for every row, new token and token id.

Draft and target both take the argmax of their scores plus the same noise (`draw.choose`, for a
guess `draw.highest`), and `match` keeps what agrees. Every token that comes out is then the target's
own choice under that noise: the text depends on target, seed and prompt, and not on the draft, the
number of guesses or the batch (Daliri, Musco and Suresh, arXiv 2408.07978). Somewhat fewer guesses
are kept than by rejection.

The noise is computed from a counter, not drawn from a generator, so any part of it can be had at
any time and in any order. It does not know models, seeds' origin or padding.
Read next: `matching.py`.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

# SplitMix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with the
# multipliers of Stafford's variant 13. torch has no unsigned 64-bit arithmetic, but int64 wraps
# around, which is the same bits. Steps overwrite their own temporaries: 2.5 times as fast on a CPU.
_WORD = 1 << 64
_STEP = 0x9E3779B97F4A7C15
_OTHER_STEP = 0xD1342543DE82EF95  # odd, so that distinct positions stay distinct


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD >> 1 else word


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift fills with the sign."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mixed(word: Tensor) -> Tensor:
    """SplitMix64's output function: one-to-one, every input bit reaches every output bit."""
    word = _shifted(word, 30).bitwise_xor_(word).mul_(_signed(0xBF58476D1CE4E5B9))
    word = _shifted(word, 27).bitwise_xor_(word).mul_(_signed(0x94D049BB133111EB))
    return _shifted(word, 31).bitwise_xor_(word)


def keyed_gumbel(keys: Tensor, positions: Tensor, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise that depends on (key, position, token id) and on nothing else.

    A larger vocabulary adds columns, more positions add rows, and neither changes what was there.
    The random integers are the same on every device; the two logarithms taken in float64 may differ
    in their last bit.

    Args:
        keys: (B,) int64, one per row (`row_keys`).
        positions: (B, N) int64, the index of the new token in its row.
        vocabulary: V, the number of token ids.
        dtype: of the result. In float32 and above no value is infinite.

    Returns:
        (B, N, V).
    """
    start = _mixed(_mixed(keys[:, None] + _signed(_STEP)) + positions * _signed(_OTHER_STEP))
    token = torch.arange(1, vocabulary + 1, device=keys.device)
    # From here on it is SplitMix64's own stream, started at `start`: its n-th output can be had
    # without the others.
    word = _mixed(start[..., None] + token * _signed(_STEP))
    # 52 bits and a half, not 53: the sum is then exact and lies strictly between 0 and 1.
    uniform = _shifted(word, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().to(dtype)


def row_keys(seeds: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
    """One key per row, from its seed, its prompt, and how often that pair came before in the batch.

    Two copies of a prompt so get different samples, and a prompt gets the same samples in every
    batch.

    Args:
        seeds: one per row, any integers.
        prompts: the token ids of each row, without padding.

    Returns:
        Keys in 0 .. 2^63 - 1, the same in every process and on every machine.
    """
    seen: Counter[str] = Counter()
    keys = []
    for seed, prompt in zip(seeds, prompts, strict=True):
        row = f"{seed}:{','.join(map(str, prompt))}"
        words = f"{seen[row]}:{row}".encode()
        digest = hashlib.blake2b(words, digest_size=8, person=b"specdec row key").digest()
        keys.append(int.from_bytes(digest, "big") >> 1)
        seen[row] += 1
    return keys
