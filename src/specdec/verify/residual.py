"""The last token of a round: from the residual after a rejection, else from the target's row.

With p the target's row and q the draft's at the first place that was not kept, the replacement is
drawn from (c p - q)+, where c is 1 for the token rule and the running scale for the block rule; the
bonus is drawn from p.

It does not know by which rule the guesses were kept, only how many were. Read next: `rows.py`.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.verify.rows import at_position, drafted, of_tokens


def residual_weights(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_lengths: Tensor,
    draft_probs: Tensor | None,
    accepted: Tensor,
    scales: Tensor,
) -> Tensor:
    """Unnormalised weights of the token that follows the kept guesses.

    Args:
        target_probs: (B, K + 1, V) the target's rows.
        draft_tokens: (B, K) the guesses.
        draft_lengths: (B,) how many of them are real.
        draft_probs: (B, K, V) the rows that the guesses were drawn from, or None for guesses
            without probabilities: then q is 1 at the guess, and p - q leaves p without that token.
        accepted: (B,) how many were kept.
        scales: (B, K + 1) the factor c of the target's row, by number kept.

    Returns:
        (B, V), positive only where the target's own row is.
    """
    bonus = at_position(target_probs, accepted)
    width = draft_tokens.shape[1]
    if width == 0:
        return bonus

    refused = accepted.clamp(max=width - 1)
    if draft_probs is None:
        guess = draft_tokens.gather(1, refused[:, None])
        tokens = torch.arange(bonus.shape[-1], device=bonus.device)
        replacement = torch.where(tokens == guess, 0, bonus)
    else:
        scale = scales.gather(1, accepted[:, None])
        replacement = (scale * bonus - at_position(draft_probs, refused)).clamp(min=0)

    # Nothing left means p = q up to rounding, where a rejection has no probability: p itself is
    # then the answer.
    use = (accepted < draft_lengths) & (replacement.sum(dim=-1) > 0)
    return torch.where(use[:, None], replacement, bonus)


def usable(target_probs: Tensor, draft_tokens: Tensor, draft_lengths: Tensor, draft_probs: Tensor | None) -> Tensor:
    """Which rows of the batch can be judged at all: (B,) bool.

    A row cannot if a row of scores that it needs has no distribution (softmax turns a NaN, a +inf,
    or nothing but -inf into NaN from end to end, so one column tells), or if a guess is not in the
    vocabulary or has probability 0 under the very row that it is said to come from. What stands
    behind a guess that the target forbids is not needed: no rule keeps that guess.
    """
    width = draft_tokens.shape[1]
    possible = of_tokens(target_probs[:, :width], draft_tokens) > 0
    reached = pad(possible.cumprod(dim=1), (1, 0), value=1) > 0
    target_fails = torch.isnan(target_probs[..., 0]) & reached & drafted(draft_lengths + 1, width + 1)
    guess_fails = (draft_tokens < 0) | (draft_tokens >= target_probs.shape[-1])
    if draft_probs is not None:
        guess_fails = guess_fails | ~(of_tokens(draft_probs, draft_tokens) > 0)
    guess_fails = guess_fails & drafted(draft_lengths, width)
    return ~(target_fails.any(dim=1) | guess_fails.any(dim=1))
