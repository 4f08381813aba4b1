"""The token rule: keep guesses one by one, each with chance min(1, p/q), until one fails.

Leviathan, Kalman and Matias 2023 (arXiv 2211.17192, algorithm 1); Chen et al. 2023 (arXiv
2302.01318, algorithm 2), who call the target q and the draft p. Here p is the target's row, q the
row the guess was drawn from.

Why the output has law p: a token x comes out if it was guessed and kept, q(x) min(1, p(x)/q(x)) =
min(p(x), q(x)), or if some guess failed, probability 1 - sum min(p, q) = sum (p - q)+, and x was
drawn from (p - q)+ normalised, which gives (p(x) - q(x))+. The two add up to p(x).

It does not know where rows come from, and it draws nothing. Read next: `block.py`.
"""

import torch
from torch import Tensor

from specdec.verify.rows import drafted, of_tokens


def likelihood_ratio(target_probs: Tensor, draft_tokens: Tensor, draft_probs: Tensor | None) -> Tensor:
    """p(x) / q(x) of every guess x; a guess without probabilities was certain, q(x) = 1.

    Args:
        target_probs: (B, K + 1, V) the target's rows.
        draft_tokens: (B, K) the guesses.
        draft_probs: (B, K, V) the rows that the guesses were drawn from, or None.

    Returns:
        (B, K), exactly 0 where the target forbids the token, whatever the draft's row says.
    """
    target = of_tokens(target_probs[:, : draft_tokens.shape[1]], draft_tokens)
    if draft_probs is None:
        return target
    return torch.where(target > 0, target / of_tokens(draft_probs, draft_tokens), 0)


def token_acceptance(
    target_probs: Tensor, draft_tokens: Tensor, draft_lengths: Tensor, draft_probs: Tensor | None = None
) -> Tensor:
    """Probability that each guess is kept, given that all before it were.

    Args:
        target_probs: (B, K + 1, V) the target's rows.
        draft_tokens: (B, K) the guesses.
        draft_lengths: (B,) how many of them are real.
        draft_probs: (B, K, V) the rows that the guesses were drawn from, or None for guesses
            without probabilities.

    Returns:
        (B, K), 0 past each row's length.
    """
    ratio = likelihood_ratio(target_probs, draft_tokens, draft_probs)
    return torch.where(drafted(draft_lengths, draft_tokens.shape[1]), ratio.clamp(max=1), 0)


def leading_successes(successes: Tensor) -> Tensor:
    """How many trials (B, K) succeeded before the first failure: (B,) int64."""
    return successes.cumprod(dim=1).sum(dim=1)
