"""The block rule: judge the guesses as a block and keep the longest prefix that succeeds.

Sun et al. 2024, block verification (arXiv 2403.10444, algorithm 2). With p the target's rows, q the
draft's, X the guesses and c_0 = 1, for i = 1 .. length:

    c_i = min(1, c_(i-1) p(X_i) / q(X_i))
    S_i = sum over x of (c_i p(x) - q(x))+          with the rows after X_i
    h_i = S_i / (S_i + 1 - c_i)                     but h_i = c_i at i = length: no row of q follows

Guess i succeeds with probability h_i, on noise of its own, and the last success counts: failures
before it do not. Given X_1 .. X_i, at least i guesses are kept with probability c_i. The next token
is drawn from (c_i p - q)+ normalised, or from p if all were kept (`residual.py`).

Against the token rule, a very likely guess may pay for an unlikely one after it, so that in
expectation never fewer tokens are kept. At length 1 the two are the same rule. For guesses without
probabilities, which count as certain (q = 1), nothing is gained, and they go by the token rule.

It does not know where rows come from, and it draws nothing. Read next: `residual.py`.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.verify.rows import drafted
from specdec.verify.token import likelihood_ratio


def block_acceptance(
    target_probs: Tensor, draft_tokens: Tensor, draft_lengths: Tensor, draft_probs: Tensor
) -> tuple[Tensor, Tensor]:
    """Chance h that each guess succeeds, and the target's scale c after each number of guesses.

    Args:
        target_probs: (B, K + 1, V) the target's rows.
        draft_tokens: (B, K) the guesses.
        draft_lengths: (B,) how many of them are real.
        draft_probs: (B, K, V) the rows that the guesses were drawn from.

    Returns:
        The acceptance (B, K), 0 past each row's length, and the scales (B, K + 1), constant there.
    """
    width = draft_tokens.shape[1]
    real = drafted(draft_lengths, width)
    scales = block_scales(target_probs, draft_tokens, draft_lengths, draft_probs)

    # S and h after guesses 1 .. K - 1: the rows at those places are the ones that follow the guess.
    ours, theirs, scale = target_probs[:, 1:width], draft_probs[:, 1:], scales[:, 1:width]
    mass = (scale[..., None] * ours - theirs).clamp(min=0).sum(dim=-1)
    room = mass + 1 - scale
    inner = torch.where(room > 0, mass / room, 1)  # 0/0: p = q and nothing lost so far, so keep
    inner = torch.where(scale > 0, inner, 0)  # behind a forbidden guess, where a row may hold no numbers

    place = torch.arange(width, device=draft_lengths.device)
    last = place == draft_lengths[:, None] - 1
    acceptance = torch.where(last, scales[:, 1:], pad(inner, (0, width - inner.shape[1])))
    return torch.where(real, acceptance, 0), scales


def block_scales(target_probs: Tensor, draft_tokens: Tensor, draft_lengths: Tensor, draft_probs: Tensor) -> Tensor:
    """The target's scale c after each number of guesses, (B, K + 1): ratios multiplied, capped at every step."""
    ratio = likelihood_ratio(target_probs, draft_tokens, draft_probs)
    real = drafted(draft_lengths, draft_tokens.shape[1])
    scales = [ratio.new_ones(ratio.shape[0])]
    for step, counts in zip(ratio.unbind(1), real.unbind(1), strict=True):
        scales.append(torch.where(counts, (scales[-1] * step).clamp(max=1), scales[-1]))
    return torch.stack(scales, dim=1)


def longest_success(successes: Tensor) -> Tensor:
    """The last success among trials (B, K), counted from 1, or 0 if none: (B,) int64."""
    place = torch.arange(1, successes.shape[1] + 1, device=successes.device)
    return pad(successes * place, (1, 0)).amax(dim=1)
